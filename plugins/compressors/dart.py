"""`dart`: keeps pivots and the visual tokens least alike to them (DART, arXiv:2502.11494, section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor


class DartSpec(plugin.CompressorSpec):
    """Pivots are the tokens with the largest L1 norm of their key in layer K-1; duplicates of pivots go.

    Visual pivots are kept. Then each pivot in turn, visual ones first and each kind by falling norm, takes its share of
    the rest of the budget: the visual tokens left over whose hidden states have the lowest cosine to its own. Shares
    differ by at most one, the first pivots having the larger. Kept tokens keep order and position ids. No attention
    weight is needed. Paper: layer 2.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.dart:Dart"
    needs: ClassVar[tuple[str, ...]] = ("keys",)

    kind: Literal["dart"] = "dart"
    visual_pivots: plugin.Count = 4
    """Pivots among an image's own tokens; fewer where fewer are kept."""
    text_pivots: plugin.Whole = 4
    """Pivots among the text of the prompt (answers choose nothing); fewer where there is less text."""


class Dart:
    """Works on all images of a grid at once; the only loop runs over the few pivots."""

    def __init__(self, spec: DartSpec) -> None:
        self.spec = spec

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`; kept tokens keep their order and position ids.

        Raises:
            ValueError: more tokens are asked for than there are, or the context brings no keys.
        """
        import torch

        kept, (images, tokens) = self.spec.kept_tokens(grid), visual_BND.shape[:2]
        if kept == tokens:
            return plugin.take(visual_BND, torch.arange(tokens, device=visual_BND.device), context)
        with torch.no_grad():
            own = min(self.spec.visual_pivots, kept)
            own_BP, own_BPD, text_BPD, num_text_B = self._pivots(visual_BND, context, own)
            pivots_BPD = torch.cat([own_BPD, text_BPD], dim=1)
            quotas_BP = _quotas(kept - own, own, num_text_B, text_BPD.shape[1])
            chosen_BN = torch.zeros(images, tokens, dtype=torch.bool, device=visual_BND.device)
            chosen_BN.scatter_(1, own_BP, True)
            cosine_BPN = plugin.cosines(pivots_BPD, visual_BND)
            for pivot in range(cosine_BPN.shape[1]):
                unlike_BN = (-cosine_BPN[:, pivot]).masked_fill(chosen_BN, -torch.inf)
                chosen_BN |= plugin.is_top(unlike_BN, quotas_BP[:, pivot : pivot + 1], scale=1)
            index_BM = plugin.places_of(chosen_BN, kept)  # exactly `kept` are chosen in every row
        return plugin.take(visual_BND, index_BM, context)

    def _pivots(self, visual_BND: Tensor, context: plugin.Context, own: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the indices and hidden states of the visual pivots; hidden states of the text pivots and how many
        are real.
        """
        if context.row_keys_RND is None or context.text_RN is None or context.columns_BN is None:
            raise ValueError("the keys of the layer before it are not known here")
        assert context.hidden_RND is not None
        norms_RN = context.row_keys_RND.float().abs().sum(2)
        rows_B = context.rows_B.to(norms_RN.device)
        norms_BN = norms_RN[rows_B].gather(1, context.columns_BN)
        own_BP = plugin.ranked(norms_BN, own)
        text_RP = plugin.ranked(norms_RN.masked_fill(~context.text_RN, -1), self.spec.text_pivots)
        text_RPD = plugin.tokens_at(context.hidden_RND, text_RP)
        num_text_R = context.text_RN.sum(1).clamp(max=self.spec.text_pivots)
        return own_BP, plugin.tokens_at(visual_BND, own_BP), text_RPD[rows_B], num_text_R[rows_B]


def _quotas(budget: int, own: int, num_text_B: Tensor, most_text: int) -> Tensor:
    """Return how many tokens each pivot takes, B x (own + text): even shares, 0 where there is no pivot."""
    import torch

    number_P = torch.arange(own + most_text, device=num_text_B.device)
    pivots_B1 = (own + num_text_B).unsqueeze(1)
    share_BP = budget // pivots_B1 + (number_P < budget % pivots_B1).long()
    return share_BP * (number_P < pivots_B1)

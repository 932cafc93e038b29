"""`visionzip`: keeps what the vision tower's CLS token looks at and merges the rest (VisionZip, arXiv:2412.04467)."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor


class VisionZipSpec(plugin.CompressorSpec):
    """Dominant tokens by CLS attention in the last tower layer that is used, and contextual ones merged of the others.

    Of a budget M, round(contextual_ratio * M) tokens are contextual. Dominant ones are those with the highest CLS
    attention. Of the R others every (R // contextual)-th is a target, beginning with the first; each other one goes to
    the target whose key (mean over heads) has the highest cosine to its own. A contextual token is, as published
    (section 3.2), its target plus the mean of those that went to it; a target without any stays as it is, so keeping
    all changes nothing. All stay in raster order with their position ids, contextual ones at their target's place.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.visionzip:VisionZip"
    points: ClassVar[tuple[str, ...]] = ("decoder", "projector")
    needs: ClassVar[tuple[str, ...]] = ("cls",)

    kind: Literal["visionzip"] = "visionzip"
    contextual_ratio: plugin.Share = Fraction(10, 64)
    """Share of the budget that is contextual (paper: 10 of 64)."""
    merge: Literal["published", "mean"] = "published"
    """How a contextual token is made: `published` adds the mean of its members to the target; `mean` is the mean over
    target and members, which keeps the length of hidden states that follow no norm.
    """


class VisionZip:
    """Selection is under no_grad; gradients flow through kept and merged tokens alike."""

    def __init__(self, spec: VisionZipSpec) -> None:
        self.spec = spec

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`; sums are taken in float32.

        Raises:
            ValueError: more tokens are asked for than there are, or the context brings no CLS attention.
        """
        import torch

        if context.cls_attention_BN is None or context.cls_keys_BND is None:
            raise ValueError("the vision tower's CLS attention is not known here")
        kept = self.spec.kept_tokens(grid)
        contextual = round(self.spec.contextual_ratio * kept)
        with torch.no_grad():
            dominant = kept - contextual
            is_dominant_BN = plugin.is_top(context.cls_attention_BN, dominant)
            others_BR = plugin.places_of(~is_dominant_BN, visual_BND.shape[1] - dominant)
            step = max(1, others_BR.shape[1] // max(1, contextual))
            is_target_R = torch.zeros(others_BR.shape[1], dtype=torch.bool, device=visual_BND.device)
            is_target_R[: step * contextual : step] = True
            targets_BC, members_BE = others_BR[:, is_target_R], others_BR[:, ~is_target_R]
            index_BM = plugin.places_of(is_dominant_BN.scatter(1, targets_BC, True), kept)
        if not contextual or not members_BE.shape[1]:
            return plugin.take(visual_BND, index_BM, context)
        nearest_BE = _nearest(context.cls_keys_BND, targets_BC, members_BE)
        merged_BND = self._merge(visual_BND, targets_BC, members_BE, nearest_BE)
        gained_BE = context.sizes_BN.gather(1, members_BE)
        sizes_BN = context.sizes_BN.scatter_add(1, targets_BC.gather(1, nearest_BE), gained_BE)
        return plugin.take(merged_BND, index_BM, replace(context, sizes_BN=sizes_BN))

    def _merge(self, visual_BND: Tensor, targets_BC: Tensor, members_BE: Tensor, nearest_BE: Tensor) -> Tensor:
        """Return the visual tokens with every target replaced by its contextual token."""
        import torch

        wide_BND = plugin.at_least_float32(visual_BND)
        joins_BCE = torch.nn.functional.one_hot(nearest_BE, targets_BC.shape[1]).transpose(1, 2).to(wide_BND.dtype)
        counts_BC1 = joins_BCE.sum(2, keepdim=True)
        with plugin.full_precision(visual_BND.device):
            sums_BCD = joins_BCE @ plugin.tokens_at(wide_BND, members_BE)
        targets_BCD = plugin.tokens_at(wide_BND, targets_BC)
        if self.spec.merge == "published":
            contextual_BCD = targets_BCD + sums_BCD / counts_BC1.clamp(min=1)
        else:
            contextual_BCD = (targets_BCD + sums_BCD) / (1 + counts_BC1)
        index_BCD = targets_BC.unsqueeze(2).expand_as(contextual_BCD)
        return visual_BND.scatter(1, index_BCD, contextual_BCD.to(visual_BND.dtype))


def _nearest(keys_BND: Tensor, targets_BC: Tensor, members_BE: Tensor) -> Tensor:
    """Return the target each member goes to, by number (B x E): the highest cosine of keys; of equal ones the first."""
    return plugin.argmax(
        plugin.cosines(plugin.tokens_at(keys_BND, members_BE), plugin.tokens_at(keys_BND, targets_BC)), scale=1
    )

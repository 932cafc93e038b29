"""`divprune`: keeps the tokens that lie farthest from one another (DivPrune, arXiv:2503.02175 section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor


class DivPruneSpec(plugin.CompressorSpec):
    """A greedy max-min subset by cosine distance; `stride` S means that ceil(tokens / S) tokens are kept.

    The paper selects among the projected tokens, `layer: projector` or `layer: 0`; any deeper layer works as well.
    Kept tokens keep their order and position ids.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.divprune:DivPrune"
    points: ClassVar[tuple[str, ...]] = ("decoder", "projector")

    kind: Literal["divprune"] = "divprune"


class DivPrune:
    """Selects for all images at once; the selection takes no gradient."""

    def __init__(self, spec: DivPruneSpec) -> None:
        self.spec = spec

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`.

        Raises:
            ValueError: more tokens are asked for than there are.
        """
        return plugin.take(visual_BND, farthest(visual_BND.detach(), self.spec.kept_tokens(grid)), context)


def farthest(visual_BND: Tensor, kept: int) -> Tensor:
    """Return the places of `kept` tokens of each image, rising, B x M (Algorithm 1; distance = 1 - cosine).

    The first is the token whose nearest neighbour is farthest; each next one the token whose nearest chosen one is
    farthest. Of equals (`ops.TOLERANCE` of cosine) the first in order is taken.
    """
    import torch

    images, tokens = visual_BND.shape[:2]
    if kept == tokens:
        return torch.arange(tokens, device=visual_BND.device).expand(images, -1)
    # Nearness (the cosine) instead of distance saves a pass; chosen tokens are infinitely near.
    nearness_BNN = plugin.cosines(visual_BND, visual_BND)
    nearness_BNN.diagonal(dim1=1, dim2=2).fill_(-float("inf"))
    chosen_BM = torch.empty(images, kept, dtype=torch.long, device=visual_BND.device)
    nearest_BN = nearness_BNN.amax(2)
    rows = torch.arange(images, device=visual_BND.device)
    for number in range(kept):
        token_B = plugin.argmin(nearest_BN, scale=1)
        chosen_BM[:, number] = token_B
        near_BN = nearness_BNN[rows, token_B]
        nearest_BN = near_BN if number == 0 else torch.maximum(nearest_BN, near_BN, out=nearest_BN)
        nearest_BN[rows, token_B] = float("inf")
    return chosen_BM.sort(1).values  # places, no two alike

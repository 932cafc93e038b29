"""`tome`: merges the most alike tokens pair by pair (Token Merging, arXiv:2210.09461 section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor


class ToMeSpec(plugin.CompressorSpec):
    """Bipartite soft matching, repeated until ceil(tokens / `stride`) tokens, or the number asked for, are left.

    The paper merges a few tokens in each block of the vision tower, between its attention and its MLP, and measures
    likeness by the keys of that attention, mean over heads (section 3): `inside_layer` with `layer: tower:N` is this
    place. Without it `tower:N` merges before block N by the keys of block N - 1, so that the MLP of block N - 1 runs on
    all tokens. In the decoder and at the projector likeness is measured by the hidden states (Table 1a compares both;
    the keys did best there). At one point it merges in rounds of at most half of the tokens present, a merged token's
    key being the size-weighted mean.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.tome:ToMe"
    points: ClassVar[tuple[str, ...]] = ("decoder", "projector", "tower")
    needs: ClassVar[tuple[str, ...]] = ("tower_keys",)

    kind: Literal["tome"] = "tome"
    size_bias: plugin.Flag = True
    """Whether from here on, in the vision tower's later layers and in the decoder's, attention adds the logarithm of a
    token's size to the logits of its key (section 3, "proportional attention").
    """
    inside_layer: plugin.Flag = False
    """Whether at `tower:N` it merges inside block N, between its attention and its MLP and by its keys, the paper's
    place; else before block N.
    """
    positions: Literal["destination", "mean", "renumber"] = "destination"
    """Position id of a merged token: that of the token that others were merged into (`destination`), the mean of all it
    stands for, weighted by size and rounded down, or `renumber`: ids without gaps.
    """

    @model_validator(mode="after")
    def _in_a_tower(self) -> ToMeSpec:
        if self.inside_layer and self.place != "tower":
            raise PydanticCustomError("inside_layer", "inside_layer is for a layer of the vision tower: give tower:N")
        return self


class ToMe:
    """Matching takes no gradient; the size-weighted means of what was merged pass it to all their tokens."""

    def __init__(self, spec: ToMeSpec) -> None:
        self.spec = spec

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`; tokens stand in the order of their destinations.

        Raises:
            ValueError: more tokens are asked for than there are.
        """
        from dataclasses import replace

        tokens, kept = grid.tokens, self.spec.kept_tokens(grid)
        alike_BND = visual_BND if context.tower_keys_BND is None else context.tower_keys_BND
        slots_BN, sources_BM = match(alike_BND.detach(), context.sizes_BN, kept)
        result = replace(
            plugin.take(visual_BND, sources_BM, context),
            renumber=self.spec.positions == "renumber",
            size_bias=self.spec.size_bias,
        )
        if kept == tokens:
            return result
        sizes_BM = plugin.sum_members(context.sizes_BN, slots_BN, kept)
        if self.spec.positions == "mean":
            sums_ABM = plugin.sum_members(context.positions_ABN * context.sizes_BN, slots_BN, kept)
            result = replace(result, positions_ABM=sums_ABM // sizes_BM)
        merged_BMD = plugin.merge(visual_BND, slots_BN, kept, context.sizes_BN)
        return replace(result, hidden_BMD=merged_BMD, sizes_BM=sizes_BM)


def match(visual_BND: Tensor, sizes_BN: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return which of the `kept` tokens each token ends in, B x N, and the places of their destinations, rising, B x M.

    Each round: every second token present (the 1st, 3rd, ...) finds the most alike among the others; the pairs most
    alike are merged, at most half of the tokens present. Of equals (`ops.TOLERANCE` of cosine) the first
    in order is taken.
    """
    import torch

    images, tokens = visual_BND.shape[:2]
    slots_BN = sources_BN = torch.arange(tokens, device=visual_BND.device).expand(images, -1)
    tokens_BND = present_BnD = plugin.at_least_float32(visual_BND)
    left = tokens
    while left > kept:
        merges = min(left - kept, left // 2)
        next_Bn, stays_Bn = _round(present_BnD, merges)
        left -= merges
        slots_BN = next_Bn.gather(1, slots_BN)
        sources_BN = sources_BN.gather(1, plugin.places_of(stays_Bn, left))
        if left > kept:
            present_BnD = plugin.merge(tokens_BND, slots_BN, left, sizes_BN)
    return slots_BN, sources_BN


def _round(present_BnD: Tensor, merges: int) -> tuple[Tensor, Tensor]:
    """Merge one round: return where each of n tokens goes among those left, and which stay."""
    import torch

    images, present = present_BnD.shape[:2]
    alike_BAC = plugin.cosines(present_BnD[:, ::2], present_BnD[:, 1::2])
    partner_BA = plugin.argmax(alike_BAC, scale=1)
    merged_Br = plugin.top_tokens(alike_BAC.amax(2), merges, scale=1)
    goes_Bn = torch.arange(present, device=present_BnD.device).repeat(images, 1)
    goes_Bn.scatter_(1, 2 * merged_Br, 2 * partner_BA.gather(1, merged_Br) + 1)
    stays_Bn = torch.ones_like(goes_Bn, dtype=torch.bool).scatter_(1, 2 * merged_Br, False)
    return (stays_Bn.long().cumsum(1) - 1).gather(1, goes_Bn), stays_Bn

"""`average_pool`: the paper's compressor, 1-D average pooling of neighbouring visual tokens (LLaVolta section 3.1)."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor


class AveragePoolSpec(plugin.CompressorSpec):
    """Windows of `stride` neighbouring visual tokens of one image, in raster order, are averaged.

    `stride` leaves ceil(tokens / stride) tokens, the last window being shorter where it does not divide them.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.average_pool:AveragePool"
    points: ClassVar[tuple[str, ...]] = ("decoder", "projector", "tower")

    kind: Literal["average_pool"] = "average_pool"
    positions: Literal["mean", "first", "renumber"] = "mean"
    """Position id of a pooled token: the mean of its window rounded down, the window's first, or
    `renumber`: ids without gaps, so that text after the image moves up.
    """
    size_bias: plugin.Flag = False
    """Whether a token counts for as many as it stands for: after an earlier merging it weighs by its size in the mean
    (the paper's mean is plain), and from here on attention adds the logarithm of a token's size to the logits of its
    key (ToMe, arXiv:2210.09461 section 3, "proportional attention").
    """


class AveragePool:
    """Averages windows of neighbouring tokens; the last, shorter window is averaged over its own length."""

    def __init__(self, spec: AveragePoolSpec) -> None:
        self.spec = spec

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`; sums are taken in float32.

        Raises:
            ValueError: more windows are asked for than there are tokens.
        """
        import torch

        images, tokens = visual_BND.shape[:2]
        windows = self.spec.kept_tokens(grid)
        bounds = _bounds(tokens, windows, self.spec.stride)
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        first_M = torch.tensor(bounds[:-1], device=visual_BND.device)
        length_M = torch.tensor(lengths, device=visual_BND.device)
        index_MW = inside_MW = None
        if min(lengths) < max(lengths):
            within_W = torch.arange(max(lengths), device=visual_BND.device)
            inside_MW = within_W < length_M.unsqueeze(1)
            index_MW = torch.where(inside_MW, first_M.unsqueeze(1) + within_W, 0)
        if self.spec.size_bias:
            window_N = torch.arange(windows, device=visual_BND.device).repeat_interleave(length_M, output_size=tokens)
            hidden_BMD = plugin.merge(visual_BND, window_N.expand(images, -1), windows, context.sizes_BN)
        elif index_MW is None or inside_MW is None:
            hidden_BMD = visual_BND.unflatten(1, (windows, lengths[0])).mean(2)
        else:
            windows_BMWD = visual_BND[:, index_MW] * inside_MW.unsqueeze(-1)
            sums_BMD = windows_BMWD.sum(2, dtype=torch.float32 if visual_BND.itemsize < 4 else None)
            hidden_BMD = (sums_BMD / length_M.unsqueeze(-1)).to(visual_BND.dtype)
        if self.spec.positions == "first":
            positions_ABM = context.positions_ABN[:, :, first_M]
        else:
            positions_ABM = _sums(context.positions_ABN, windows, index_MW, inside_MW) // length_M
        return plugin.Kept(
            hidden_BMD,
            positions_ABM,
            _sums(context.sizes_BN, windows, index_MW, inside_MW),
            sources_BM=first_M.expand(images, -1),
            renumber=self.spec.positions == "renumber",
            size_bias=self.spec.size_bias,
        )


def _bounds(tokens: int, windows: int, stride: int | None) -> list[int]:
    """Return where windows begin and the last one ends: every `stride` tokens, or of lengths that differ by at most
    one.
    """
    if stride is not None:
        return [min(number * stride, tokens) for number in range(windows + 1)]
    return [number * tokens // windows for number in range(windows + 1)]


def _sums(values_XBN: Tensor, windows: int, index_MW: Tensor | None, inside_MW: Tensor | None) -> Tensor:
    """Sum integers over each window; without an index all windows are of one length."""
    if index_MW is None or inside_MW is None:
        return values_XBN.unflatten(-1, (windows, -1)).sum(-1)
    return (values_XBN[..., index_MW] * inside_MW).sum(-1)

"""`c_abstractor`: convolutions, adaptive pooling, convolutions (Honeybee, arXiv:2312.06742 section 3.2); it learns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator_plugins.compressors.average_pool_2d import window_means

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor, nn


class CAbstractorSpec(plugin.BlockCompressorSpec):
    """`depth` residual blocks over an image's map of tokens, adaptive average pooling to h' x w', `depth` blocks more.

    Blocks are bottlenecks as in RegNet, normalised token by token (nothing depends on other images). Their last maps
    begin at zero, so that training starts from `average_pool_2d`. A position id is the mean of its window rounded down.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.c_abstractor:CAbstractor"
    points: ClassVar[tuple[str, ...]] = ("decoder", "projector", "tower")
    learns: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = False

    kind: Literal["c_abstractor"] = "c_abstractor"
    depth: plugin.Count = 3
    """Residual blocks before the pooling, and as many after it."""
    hidden_size: plugin.Count | None = None
    """Channels inside a block; null takes a quarter of the tokens' width."""
    group_width: plugin.Count = 16
    """Channels of one group of the 3 x 3 convolution."""

    def inner_shape(self, width: int) -> tuple[int, int]:
        """Return the channels inside a block, and groups of its convolution, for tokens of `width`."""
        hidden = self.hidden_size or max(1, width // 4)
        return hidden, hidden // math.gcd(hidden, self.group_width)

    def module_operations(self, grid: plugin.Grid, width: int) -> int:
        """Linear maps and convolutions of the blocks before and after the pooling."""
        hidden, groups = self.inner_shape(width)
        a_token = 4 * width * hidden + 2 * 9 * hidden * hidden // groups
        return self.depth * a_token * (grid.tokens + self.kept_tokens(grid))


class CAbstractor:
    """The module does the work; this gives it the shapes."""

    def __init__(self, spec: CAbstractorSpec) -> None:
        self.spec = spec

    def create_module(self, width: int) -> nn.Module:
        """Return the blocks, for tokens of `width`."""
        return build_blocks(self.spec, width)

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`.

        Raises:
            ValueError: the amount is no block of this grid.
        """
        assert context.module is not None
        kept = self.spec.kept_grid(grid)
        return plugin.take_windows(context.module(visual_BND, grid, kept), grid, kept, context)


def build_blocks(spec: CAbstractorSpec, width: int) -> nn.Module:
    """Return a module that maps (visual_BND, grid, kept grid) to B x M x width."""
    from torch import nn
    from torch.nn import functional

    hidden, groups = spec.inner_shape(width)

    class Block(nn.Module):
        """x + up(conv(down(norm(x)))) on a map B x h x w x width, channels last."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.down = nn.Linear(width, hidden)
            self.convolution = nn.Conv2d(hidden, hidden, 3, padding=1, groups=groups)
            self.inner_norm = nn.LayerNorm(hidden)
            self.up = nn.Linear(hidden, width)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

        def forward(self, map_BhwD: Tensor) -> Tensor:
            inner_BhwD = functional.silu(self.down(self.norm(map_BhwD)))
            inner_BhwD = self.convolution(inner_BhwD.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            result: Tensor = map_BhwD + self.up(functional.silu(self.inner_norm(inner_BhwD)))
            return result

    class Blocks(nn.Module):
        """Blocks, pooling, blocks."""

        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Sequential(*(Block() for _ in range(spec.depth)))
            self.after = nn.Sequential(*(Block() for _ in range(spec.depth)))

        def forward(self, visual_BND: Tensor, grid: plugin.Grid, kept: plugin.Grid) -> Tensor:
            mapped_BND = self.before(visual_BND.unflatten(1, (grid.height, grid.width))).flatten(1, 2)
            pooled_BMD = plugin.along_both_axes(mapped_BND, grid, kept, window_means)
            result: Tensor = self.after(pooled_BMD.unflatten(1, (kept.height, kept.width))).flatten(1, 2)
            return result

    return Blocks()

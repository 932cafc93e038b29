"""`laco`: neighbouring patches become channels of one token in the vision tower (LaCo, arXiv:2507.02279); it learns."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor, nn


class LaCoSpec(plugin.CompressorSpec):
    """Windows of r x r tokens (`stride` r^2) become one: an MLP over their channels side by side, plus their mean.

    The paper's layer-wise pixel-shuffle, `layer: tower:25%` in its main table: space to channel, an MLP back to the
    tower's width, and a shortcut without parameters. After its abstract and public summaries, not its code: the
    shortcut is taken as the mean of the window (which averages the r^2 channels that pixel-shuffle makes of one), and
    the MLP as LayerNorm, Linear, GELU, Linear. Its last map begins at zero, so that training starts from the shortcut.
    With `layer: projector` it is the same layer behind the tower, what the paper compares with. A position id is the
    mean of its window's rounded down.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.laco:LaCo"
    points: ClassVar[tuple[str, ...]] = ("projector", "tower")
    learns: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = False

    kind: Literal["laco"] = "laco"
    hidden_size: plugin.Count | None = None
    """Width inside the MLP; null takes the tokens' width."""

    @model_validator(mode="after")
    def _is_square(self) -> LaCoSpec:
        if self.stride is None or isqrt(self.stride) ** 2 != self.stride:
            raise PydanticCustomError(
                "amount", "the window is a shape of the module: give stride, a square number (4 is 2 x 2 tokens)"
            )
        return self

    @property
    def window(self) -> int:
        """Tokens along a side of a window."""
        return isqrt(self.stride or 1)

    def kept_grid(self, grid: plugin.Grid) -> plugin.Grid:
        """Return the grid of windows.

        Raises:
            ValueError: the windows do not fill the grid.
        """
        if grid.height % self.window or grid.width % self.window:
            raise ValueError(
                f"windows of {self.window} x {self.window} (stride {self.stride}) do not fill {grid.height} x "
                f"{grid.width} tokens"
            )
        return plugin.Grid(grid.height // self.window, grid.width // self.window)

    def kept_tokens(self, grid: plugin.Grid) -> int:
        """Return the number of windows."""
        return self.kept_grid(grid).tokens

    def module_operations(self, grid: plugin.Grid, width: int) -> int:
        """Count the MLP's two maps for each window."""
        return self.kept_tokens(grid) * 2 * (self.hidden_size or width) * (self.window**2 * width + width)

    def module_shape(self) -> dict[str, Any]:
        """Return the window and the MLP's width."""
        return {"window": self.window, "hidden_size": self.hidden_size}


class LaCo:
    """The module is the MLP; the mean of the window needs none."""

    def __init__(self, spec: LaCoSpec) -> None:
        self.spec = spec

    def create_module(self, width: int) -> nn.Module:
        """Return the MLP, for tokens of `width`."""
        from torch import nn

        inside, window = self.spec.hidden_size or width, self.spec.window**2 * width
        last = nn.Linear(inside, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(nn.LayerNorm(window), nn.Linear(window, inside), nn.GELU(), last)

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`.

        Raises:
            ValueError: the windows do not fill this grid.
        """
        assert context.module is not None
        kept = self.spec.kept_grid(grid)
        windows_BMWD = visual_BND[:, plugin.windows_over(grid, kept, visual_BND.device).tokens_MW]
        channels_BMC = windows_BMWD.transpose(2, 3).flatten(2)  # a channel's r^2 values side by side
        merged_BMD = windows_BMWD.mean(2) + context.module(channels_BMC)
        return plugin.take_windows(merged_BMD, grid, kept, context)

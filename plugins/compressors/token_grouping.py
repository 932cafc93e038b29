"""`token_grouping`: every visual token joins one of M learned groups (VisToG, arXiv:2411.17773); it learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from orchestrator_plugins.compressors.random_drop import image_generators
from pydantic import model_validator
from pydantic_core import PydanticCustomError

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor, nn


class TokenGroupingSpec(plugin.CompressorSpec):
    """`keep_tokens` learned group tokens take the place of an image's visual tokens, each with the tokens that join it.

    VisToG's grouping layer before the projector, in its form without semantic tokens inside the vision tower. The
    formula is GroupViT's (arXiv:2202.11094, section 3.2, equations 3 to 6): with group tokens g and visual tokens x of
    width d, `L = (Wq g) (Wk x)^T / sqrt(d)`; each token joins the group of the highest softmax over groups (hard, its
    gradient the softmax's), in training of `L` plus Gumbel noise; `g + Wo sum_i A_gi Wv x_i / (sum_i A_gi + 1)` is what
    is left. Unlike a query's attention, no token counts twice. The noise is drawn from (seed, step, sample), so that
    recomputation and restarts see the same groups. A group may be empty; position ids are spread evenly over the image.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.token_grouping:TokenGrouping"
    points: ClassVar[tuple[str, ...]] = ("decoder", "projector")
    learns: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = False

    kind: Literal["token_grouping"] = "token_grouping"
    noise: plugin.Flag = True
    """Whether Gumbel noise moves the assignment in training."""

    @model_validator(mode="after")
    def _has_groups(self) -> TokenGroupingSpec:
        if self.stride or self.keep_ratio:
            raise PydanticCustomError("amount", "the number of groups is a shape of the module: give keep_tokens")
        return self

    def module_operations(self, grid: plugin.Grid, width: int) -> int:
        """Count the maps of groups (q, o) and tokens (k, v), the scores and the sums over the groups."""
        tokens, groups = grid.tokens, self.kept_tokens(grid)
        return 4 * width**2 * (groups + tokens) + 4 * groups * tokens * width

    def module_shape(self) -> dict[str, Any]:
        """Return the number of groups."""
        return {"groups": self.keep_tokens}


class TokenGrouping:
    """Draws the noise and gives it to the module, which does the work."""

    def __init__(self, spec: TokenGroupingSpec) -> None:
        self.spec = spec

    def create_module(self, width: int) -> nn.Module:
        """Return groups and maps, for tokens of `width`."""
        return build_grouping(self.spec.keep_tokens or 0, width)  # never 0: the spec has no other amount

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`.

        Raises:
            ValueError: there are more groups than tokens.
        """
        import torch

        assert context.module is not None
        images, tokens = visual_BND.shape[:2]
        kept = self.spec.kept_tokens(grid)
        noise_BMN = None
        if self.spec.noise and context.module.training:
            # -log of an exponential variable is a Gumbel one.
            drawn = [
                torch.empty(kept, tokens).exponential_(generator=one).log_().neg_()
                for one in image_generators("token_grouping", context)
            ]
            noise_BMN = torch.stack(drawn).to(visual_BND.device)
        first_M = plugin.evenly_spaced(tokens, kept, visual_BND.device)
        window_N = torch.zeros(tokens, dtype=torch.long, device=visual_BND.device)
        window_N = window_N.index_fill(0, first_M[1:], 1).cumsum(0)
        return plugin.Kept(
            context.module(visual_BND, noise_BMN),
            context.positions_ABN[:, :, first_M],
            context.sizes_BN.new_zeros(images, kept).index_add(1, window_N, context.sizes_BN),
            sources_BM=first_M.expand(images, -1),
        )


def build_grouping(groups: int, width: int) -> nn.Module:
    """Return a module that maps (visual_BND, noise_BMN or None) to B x M x width.

    It starts near the means of its groups: values and outputs pass unchanged, and group tokens are small.
    """
    import torch
    from torch import nn

    class Grouping(nn.Module):
        """Group tokens and the four maps of the assignment."""

        def __init__(self) -> None:
            super().__init__()
            self.groups = nn.Parameter(0.02 * torch.randn(groups, width))
            self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
            self.value, self.leave = nn.Linear(width, width), nn.Linear(width, width)
            for unchanged in (self.value, self.leave):
                nn.init.eye_(unchanged.weight)
                nn.init.zeros_(unchanged.bias)

        def forward(self, visual_BND: Tensor, noise_BMN: Tensor | None) -> Tensor:
            scores_BMN = plugin.at_least_float32(self.query(self.groups) @ self.key(visual_BND).mT) * width**-0.5
            if noise_BMN is not None:
                scores_BMN = scores_BMN + noise_BMN.to(scores_BMN)
            soft_BMN = scores_BMN.softmax(1)
            joined_BN = plugin.argmax(scores_BMN.mT)
            hard_BMN = torch.zeros_like(soft_BMN).scatter_(1, joined_BN.unsqueeze(1), 1.0)
            joins_BMN = hard_BMN - soft_BMN.detach() + soft_BMN  # straight through
            shares_BMN = joins_BMN / (joins_BMN.sum(2, keepdim=True) + 1)
            result: Tensor = self.groups + self.leave(shares_BMN.to(visual_BND.dtype) @ self.value(visual_BND))
            return result

    return Grouping()

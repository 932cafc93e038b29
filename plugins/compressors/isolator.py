"""`isolator`: learned tokens before each image tell a compressed pass from a full one (DualSpeed, arXiv:2602.03815)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor, nn


class IsolatorSpec(plugin.CompressorSpec):
    """`tokens` learned tokens of the decoder's width stand before each image's visual tokens and stay to the end.

    DualSpeed's mode isolator: as the last point of a pruned variant it is seen in that mode alone, so what the model
    learns for pruned images stays apart from what it does with full ones. The release has 4 of them before DivPrune's
    tokens (`llava_llama.py`). `shift`: they take the image's first position ids, and those of the image and of what
    follows it move up by their number; `renumber`: the row's ids are numbered without gaps, as in the release.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.isolator:Isolator"
    learns: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = False
    takes_amount: ClassVar[bool] = False

    kind: Literal["isolator"] = "isolator"
    layer: Literal[0] = 0
    """The decoder's input, where the tokens enter."""
    tokens: plugin.Count = 4
    """Learned tokens before each image, frame or tile."""
    positions: Literal["shift", "renumber"] = "shift"
    """Position ids: `shift` moves those behind up, `renumber` numbers the whole row without gaps."""

    def kept_tokens(self, grid: plugin.Grid) -> int:
        """Return the image's tokens and the isolator's."""
        return grid.tokens + self.tokens

    def tokens_before(self, grid: plugin.Grid) -> int:
        """Return the same: they enter at layer 0."""
        return self.kept_tokens(grid)

    def module_shape(self) -> dict[str, Any]:
        """Return the number of tokens."""
        return {"tokens": self.tokens}


class Isolator:
    """Puts the tokens in front at the decoder's input, and nothing else."""

    def __init__(self, spec: IsolatorSpec) -> None:
        self.spec = spec

    def create_module(self, width: int) -> nn.Module:
        """Return the tokens."""
        return build_table("tokens", self.spec.tokens, width)

    def enter(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """Return the learned tokens, then the visual tokens; see `plugin.Enters`."""
        import torch

        assert context.module is not None
        images, tokens = visual_BND.shape[:2]
        count = self.spec.tokens
        first_AB1 = context.positions_ABN.amin(2, keepdim=True)
        new_M, token_N = (torch.arange(number, device=visual_BND.device) for number in (count, tokens))
        # Ids of images with tokens before them move up by their number, these ones too.
        return plugin.Kept(
            torch.cat([context.module(images).to(visual_BND.dtype), visual_BND], dim=1),
            torch.cat([first_AB1 - count + new_M, context.positions_ABN], dim=2),
            torch.cat([context.sizes_BN.new_ones(images, count), context.sizes_BN], dim=1),
            sources_BM=torch.cat([torch.full_like(new_M, -1), token_N]).expand(images, -1),
            before=count,
            renumber=self.spec.positions == "renumber",
        )


def build_table(name: str, count: int, width: int) -> nn.Module:
    """Return a module that maps a number of images to B x `count` x `width`: learned tokens, for each image the same.

    They are drawn like token embeddings (deviation 0.02).

    Args:
        name: Name of the parameter, by which it is saved.
        count: Tokens of an image.
        width: Their width.
    """
    import torch
    from torch import nn

    class Table(nn.Module):
        """Learned tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.register_parameter(name, nn.Parameter(0.02 * torch.randn(count, width)))

        def forward(self, images: int) -> Tensor:
            return self.get_parameter(name).expand(images, -1, -1)

    return Table()

"""`evs`: of a video, the tokens that changed since the frame before (Efficient Video Sampling, arXiv:2510.14624)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor


class EvsSpec(plugin.CompressorSpec):
    """A token's score is 1 - cosine to the same place of the frame before; those of the first frame all stay.

    Of T frames of N tokens the `max(N, floor(T N (1 - pruning_rate)))` with the highest scores are kept, of equal ones
    the first, with their places and position ids: transformers' own in its Nemotron Omni, which does it to what enters
    the decoder (`layer: 0`). An image is a video of one frame, and stays whole.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.evs:Evs"
    across_frames: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = False
    takes_amount: ClassVar[bool] = False

    kind: Literal["evs"] = "evs"
    pruning_rate: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.25
    """Share of a video's tokens that go, as `video_pruning_rate` in transformers."""

    def kept_tokens(self, grid: plugin.Grid) -> int:
        """Return the tokens left of a video; all of an image."""
        # The float product is transformers' own; 1 - 0.9 is less than 0.1 in it.
        return max(grid.tokens // grid.frames, int(grid.tokens * (1 - self.pruning_rate)))


class Evs:
    """Chooses for all videos at once; the choice takes no gradient."""

    def __init__(self, spec: EvsSpec) -> None:
        self.spec = spec

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`; a video's frames follow one another in its tokens."""
        from dataclasses import replace

        import torch
        from torch.nn.functional import normalize

        frames_BTnD = normalize(visual_BND.detach().double(), dim=-1).unflatten(1, (grid.frames, -1))
        changed_BTn = 1 - (frames_BTnD[:, 1:] * frames_BTnD[:, :-1]).sum(-1)
        scores_BN = torch.cat([torch.full_like(frames_BTnD[:, :1, :, 0], 255), changed_BTn], dim=1).flatten(1)
        index_BM = plugin.top_tokens(scores_BN, self.spec.kept_tokens(grid), scale=1)
        return replace(plugin.take(visual_BND, index_BM, context), in_place=True)

"""VideoLLaMA3: images and videos of any size; how many patches make a token comes with each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from orchestrator.compression.families.images import ImagesFamily, Units
from orchestrator.errors import UsageError
from orchestrator.spec.components import Grid


class VideoLlama3Family(ImagesFamily):
    """A frame is a grid of merged patches, or one row of those that `video_compression_mask` leaves of it."""

    one_size = False
    encodes_in_forward = True

    def _frames(self, inputs: Mapping[str, Any], kind: str) -> list[Units]:
        grids, merges = inputs.get(f"{kind}_grid_thw"), inputs.get(f"{kind}_merge_sizes")
        if grids is None:
            return []
        if merges is None:
            raise UsageError(
                f"compression: {kind}_grid_thw does not say how many patches make a token; pass {kind}_merge_sizes"
            )
        sizes = zip(torch.as_tensor(grids).tolist(), torch.as_tensor(merges).tolist(), strict=True)
        return [(Grid(height // side, width // side),) * frames for (frames, height, width), side in sizes]

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the units by `image_grid_thw` and `image_merge_sizes`."""
        return self._frames(inputs, "image")

    def video_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the units by `video_grid_thw` and `video_merge_sizes`, without what `video_compression_mask` drops."""
        videos, mask = self._frames(inputs, "video"), inputs.get("video_compression_mask")
        if mask is None:
            return videos
        left = iter(torch.as_tensor(mask).flatten().split([grid.tokens for units in videos for grid in units]))
        return [tuple(grid for one in units if (grid := _left(one, int(next(left).sum()))).tokens) for units in videos]

    def empty_image(self) -> dict[str, Any]:
        """Return a blank image of one patch, which is one token."""
        vision = self.model.config.vision_config
        pixels = self.blank(1, vision.num_channels * vision.patch_size**2)
        one = torch.ones(1, dtype=torch.long, device=pixels.device)
        return {"pixel_values": pixels, "image_grid_thw": one.repeat(1, 3), "image_merge_sizes": one}


def _left(grid: Grid, tokens: int) -> Grid:
    return grid if tokens == grid.tokens else Grid(1, tokens)

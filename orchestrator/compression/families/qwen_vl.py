"""Qwen-VL from 2 to 3.5, GLM-4V, ERNIE 4.5 VL: images and videos of any size, position ids of three axes (M-RoPE).

The towers of the first two and the spacing of their temporal position ids differ, what the mechanism sees does not. In
the third (with experts too) visual features also enter the first layers, DeepStack (Meng et al., 2024, section 3):
features of intermediate layers of the tower are added to the visual tokens after the first decoder layers; as many as
there are such features, all visual tokens must be there.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from orchestrator.compression.families.images import ImagesFamily, Units, pair, ready_features
from orchestrator.errors import UsageError
from orchestrator.spec.components import Grid


class Qwen2VLFamily(ImagesFamily):
    """An image is a grid of merged patches, a video one such grid for each temporal patch (two frames)."""

    one_size = False

    @property
    def patches_per_side(self) -> int:
        """The tower's `spatial_merge_size`."""
        return int(self.model.config.vision_config.spatial_merge_size)

    def _frames(self, grid_thw: Any) -> list[Units]:
        """Return the grids of the temporal patches of each image or video."""
        sizes = [] if grid_thw is None else torch.as_tensor(grid_thw).tolist()
        side = self.patches_per_side
        return [(Grid(height // side, width // side),) * frames for frames, height, width in sizes]

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the units by `image_grid_thw`."""
        return self._frames(inputs.get("image_grid_thw"))

    def video_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the units by `video_grid_thw`."""
        return self._frames(inputs.get("video_grid_thw"))

    def grids(self, inputs: Mapping[str, Any], num_placeholders: int) -> list[Grid]:
        """Return the grids by `image_grid_thw` and `video_grid_thw`, in the order of their placeholders in the rows.

        `generate` encodes images beforehand and keeps these for itself; then position ids determine the grids.

        Raises:
            UsageError: neither is there, or placeholders do not fit.
        """
        for kind in ("image", "video"):
            if ready_features(inputs, kind) is not None and inputs.get(f"{kind}_grid_thw") is None:
                return self._grids_of_positions(torch.as_tensor(inputs["input_ids"]), inputs.get("position_ids"))
        return super().grids(inputs, num_placeholders)

    def _grids_of_positions(self, ids_BN: Tensor, positions: Tensor | None) -> list[Grid]:
        if positions is None or positions.ndim != 3:
            raise UsageError(
                "compression: images come encoded and their grids are not known; pass image_grid_thw (video_grid_thw) "
                "or position_ids of three axes"
            )
        visual_BN = self.visual_BN(ids_BN)
        row_V, column_V = visual_BN.nonzero().unbind(1)
        height_V, width_V = positions[-2:].cpu().long()[:, row_V, column_V]
        return _raster_grids(row_V.tolist(), height_V.tolist(), width_V.tolist())

    def num_visual_tokens(self, inputs: Mapping[str, Any]) -> int:
        """Return the patches over those merged into a token: from shapes, without reading what is on the device."""
        pixels = [inputs.get(name) for name in ("pixel_values", "pixel_values_videos")]
        ready = [ready_features(inputs, kind) for kind in ("image", "video")]
        patches = sum(len(one) for one in pixels if one is not None)
        features = sum(len(one) for several in ready if several is not None for one in several)
        return patches // self.patches_per_side**2 + features

    def empty_image(self) -> dict[str, Any]:
        """Return a blank image of one token."""
        vision = self.model.config.vision_config
        frames, _ = pair(vision.temporal_patch_size)
        height, width = pair(vision.patch_size)
        pixels = self.blank(self.patches_per_side**2, vision.in_channels * frames * height * width)
        return {
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, self.patches_per_side, self.patches_per_side]], device=pixels.device),
        }


def _raster_grids(rows: Sequence[int], heights: Sequence[int], widths: Sequence[int]) -> list[Grid]:
    """Return the grids of consecutive frames, each in raster order; a frame ends where its raster does not continue."""
    starts: list[int] = []
    for place, (row, height, width) in enumerate(zip(rows, heights, widths, strict=True)):
        goes_on = bool(starts) and row == rows[place - 1]
        if goes_on:
            next_in_line = height == heights[place - 1] and width == widths[place - 1] + 1
            next_line = height == heights[place - 1] + 1 and width == widths[starts[-1]]
            goes_on = next_in_line or next_line
        if not goes_on:
            starts.append(place)
    grids = []
    for start, end in itertools.pairwise([*starts, len(rows)]):
        columns = max(widths[start:end]) - widths[start] + 1
        grids.append(Grid((end - start) // columns, columns))
    return grids


class Qwen3VLFamily(Qwen2VLFamily):
    """Frames of a video are runs of their own, with a time stamp in text before each."""

    deep_options = ("visual_pos_masks", "deepstack_visual_embeds")

    @property
    def first_layer(self) -> int:
        """The layer after the last one that DeepStack adds to."""
        return len(self.model.config.vision_config.deepstack_visual_indexes)

    def idle_features(self) -> Tensor:
        """Return the features with those for DeepStack, whose mergers every rank must run too."""
        output = self.model.model.get_image_features(**self.empty_image(), return_dict=True)
        deep = [feature for level in output.deepstack_features for feature in level]
        return torch.cat([*output.pooler_output, *deep])


class Glm4vFamily(Qwen2VLFamily):
    """Frames of a video have the placeholder of images, so a batch holds images or videos, not both; no DeepStack.

    `generate` of transformers repeats ready features of the images of a row in another order than their placeholders
    (beams), so forward encodes them.
    """

    encodes_in_forward = True

    @property
    def token_ids(self) -> tuple[int | None, int | None]:
        """The placeholder of images alone."""
        return super().token_ids[0], None


class Ernie45VLFamily(Qwen2VLFamily):
    """As Qwen2-VL; two frames of a video become one grid, and visual tokens go to experts of their own."""

    token_options = ("moe_mm_token_type_ids",)

    def enter(self) -> None:
        """Let ZeRO-3 gather all experts of a layer at once: those of visual tokens are not called without an image."""
        super().enter()
        for block in self._expert_blocks():
            block._z3_leaf = True

    def leave(self) -> None:
        """Take that out again."""
        super().leave()
        for block in self._expert_blocks():
            block.__dict__.pop("_z3_leaf", None)

    def _expert_blocks(self) -> list[Any]:
        return [layer.mlp for layer in self.language_model.layers if hasattr(layer.mlp, "vision_moe")]

    def video_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the units by `video_grid_thw` and the config's `temporal_merge_size`."""
        merged = int(self.model.config.vision_config.temporal_merge_size)
        return [units[: len(units) // merged] for units in super().video_units(inputs)]

    def num_visual_tokens(self, inputs: Mapping[str, Any]) -> int:
        """Return the tokens of all units; of ready features as many as there are."""
        merged, pixels = int(self.model.config.vision_config.temporal_merge_size), inputs.get("pixel_values_videos")
        more = 0 if pixels is None else len(pixels) // self.patches_per_side**2
        return super().num_visual_tokens(inputs) - more + more // merged

    def empty_image(self) -> dict[str, Any]:
        """Return a blank image of one token; a patch is of one frame."""
        vision, side = self.model.config.vision_config, self.patches_per_side
        pixels = self.blank(side * side, vision.in_channels * pair(vision.patch_size)[0] ** 2)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]], device=pixels.device)}

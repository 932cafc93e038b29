"""Qwen2-VL (`Qwen2VLForConditionalGeneration`): images and videos of any size, position ids of three axes (M-RoPE)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.compression.families.base import Family
from orchestrator.errors import UsageError
from orchestrator.spec.components import Grid


class Qwen2VLFamily(Family):
    """An image is a grid of merged patches, a video one such grid for each temporal patch (two frames)."""

    def find_language_model(self) -> nn.Module:
        """`model.language_model`."""
        language_model = getattr(getattr(self.model, "model", None), "language_model", None)
        if not isinstance(language_model, nn.Module):
            raise self.cannot_serve("it has no model.language_model")
        return language_model

    def visual_BN(self, input_ids_BN: Tensor) -> Tensor:
        """True at `image_token_id` and `video_token_id`."""
        config = self.model.config
        mask_BN: Tensor = (input_ids_BN == config.image_token_id) | (input_ids_BN == config.video_token_id)
        return mask_BN

    @property
    def _merge(self) -> int:
        return int(self.model.config.vision_config.spatial_merge_size)

    def _frames(self, grid_thw: Any) -> list[Grid]:
        """Grids of all temporal patches of images or videos."""
        if grid_thw is None:
            return []
        return [
            Grid(height // self._merge, width // self._merge)
            for frames, height, width in torch.as_tensor(grid_thw).tolist()
            for _ in range(frames)
        ]

    def grids(self, inputs: Mapping[str, Any], num_placeholders: int) -> list[Grid]:
        """From `image_grid_thw` and `video_grid_thw`, in the order in which placeholders appear in the rows.

        `generate` encodes images beforehand and keeps these for itself; then position ids say what the grids are.

        Raises:
            UsageError: neither is there, or placeholders do not fit.
        """
        if not num_placeholders:
            return []
        ids_BN = torch.as_tensor(inputs["input_ids"])
        ready = inputs.get("mm_encoder_outputs") or {}
        known = {"image": inputs.get("image_grid_thw"), "video": inputs.get("video_grid_thw")}
        if any(ready.get(kind) is not None and thw is None for kind, thw in known.items()):
            return self._grids_of_positions(ids_BN, inputs.get("position_ids"))
        images, videos = self._frames(known["image"]), self._frames(known["video"])
        if not images or not videos:
            return images or videos
        ids = ids_BN.flatten()
        is_video = (ids[self.visual_BN(ids)] == self.model.config.video_token_id).tolist()
        return _interleaved(is_video, images, videos)

    def _grids_of_positions(self, ids_BN: Tensor, positions: Tensor | None) -> list[Grid]:
        if positions is None or positions.ndim != 3:
            raise UsageError(
                "compression: images come encoded and their grids are not known; pass image_grid_thw (video_grid_thw) "
                "or position_ids of three axes"
            )
        visual_BN = self.visual_BN(ids_BN)
        row_V, column_V = visual_BN.nonzero().unbind(1)
        height_V, width_V = positions[-2:].cpu()[:, row_V, column_V]
        return _raster_grids(row_V.tolist(), height_V.tolist(), width_V.tolist())

    def num_visual_tokens(self, inputs: Mapping[str, Any]) -> int:
        """Patches over patches merged into a token."""
        patches = sum(
            len(inputs[name]) for name in ("pixel_values", "pixel_values_videos") if inputs.get(name) is not None
        )
        ready = inputs.get("mm_encoder_outputs") or {}
        features = sum(len(one) for output in ready.values() if output is not None for one in output.pooler_output)
        return patches // self._merge**2 + features

    def idle_features(self) -> Tensor:
        """Features of one black image of one token."""
        return torch.cat(list(self._idle_output().pooler_output))

    def _idle_output(self) -> Any:
        vision: Any = self.model.config.vision_config
        parameter = next(self.model.parameters())
        frames, size = vision.temporal_patch_size, vision.patch_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        values = vision.in_channels * (frames[0] if isinstance(frames, (list, tuple)) else frames) * height * width
        pixels = torch.zeros(self._merge**2, values, device=parameter.device, dtype=parameter.dtype)
        grid_thw = torch.tensor([[1, self._merge, self._merge]], device=parameter.device)
        return self.model.model.get_image_features(pixels, grid_thw, return_dict=True)


def _interleaved(is_video: list[bool], images: list[Grid], videos: list[Grid]) -> list[Grid]:
    """Grids in the order of the placeholders, given which of these are a video's."""
    left: dict[bool, Iterator[Grid]] = {False: iter(images), True: iter(videos)}
    ordered, place = [], 0
    while place < len(is_video):
        grid = next(left[is_video[place]], None)
        if grid is None:
            kind = "video" if is_video[place] else "image"
            raise UsageError(f"compression: input_ids hold more {kind} placeholders than {kind}_grid_thw announces")
        ordered.append(grid)
        place += grid.tokens
    return ordered + list(left[False]) + list(left[True])


def _raster_grids(rows: Sequence[int], heights: Sequence[int], widths: Sequence[int]) -> list[Grid]:
    """Grids of frames that follow one another, each in raster order; a frame ends where its raster does not go on."""
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

"""PaliGemma (1 and 2), Gemma 3 and 4: images that see themselves both ways; sliding and full layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from orchestrator.compression.families.base import Tower
from orchestrator.compression.families.images import ImagesFamily, Units, ready_features
from orchestrator.errors import UsageError
from orchestrator.spec.components import Grid


class PaliGemmaFamily(ImagesFamily):
    """Every image is the tower's complete grid; `token_type_ids` 0 marks the prefix (images and prompt)."""

    projector_name: ClassVar[str | None] = "multi_modal_projector"
    remakes_masks = True
    window_cuts_blocks = False  # PaliGemma 2 opens the prefix in sliding layers too

    @property
    def tower(self) -> Tower:
        """The SigLIP, whose last layer's patches are the visual tokens.

        Raises:
            UsageError: it is another tower.
        """
        if self.tower_refusal or self.model.config.vision_config.model_type != "siglip_vision_model":
            raise self.no_tower_points()
        tower = self.model.model.vision_tower
        encoder = getattr(tower, "vision_model", tower).encoder
        return Tower(encoder, 0, len(encoder.layers))

    def block_ids_BN(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return one block, the prefix; only where the model itself makes one (given `token_type_ids`, in the first
        pass).
        """
        types_BN, cache = inputs.get("token_type_ids"), inputs.get("past_key_values")
        is_later = cache is not None and cache.is_initialized and inputs.get("pixel_values") is None
        if types_BN is None or is_later:
            return None
        return torch.where(types_BN == 0, 0, -1)


class Gemma3Family(PaliGemmaFamily):
    """Every image (or crop of pan and scan) is a square of `mm_tokens_per_image` tokens, all of which see one another.

    The top model makes masks of the full length; those of a segment are made anew from `token_type_ids`, which travel
    with the tokens as numbers of blocks.
    """

    projector_name: ClassVar[str | None] = None  # it pools the grid, so not token by token
    window_cuts_blocks = True

    def find_language_model(self) -> nn.Module:
        """Return `model.language_model`."""
        if getattr(self.model.config.get_text_config(), "use_bidirectional_attention", False):
            raise self.cannot_serve("its text sees itself both ways (use_bidirectional_attention)")
        return super().find_language_model()

    def grid_of(self, height_pixels: int, width_pixels: int) -> Grid:
        """Return the square of `mm_tokens_per_image`, whatever the pixels."""
        side = math.isqrt(self.model.config.mm_tokens_per_image)
        return Grid(side, side)

    def block_ids_BN(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the runs of `token_type_ids` 1, numbered from 0 in each row; without these the model is causal."""
        types_BN = inputs.get("token_type_ids")
        return None if types_BN is None else _runs(types_BN == 1)


class Gemma4Family(ImagesFamily):
    """Images and frames of any size, the patches of each with their places; a square of patches is one token.

    In sliding layers alone the tokens of an image see one another, and there only in models that say so
    (`use_bidirectional_attention: vision`).
    """

    one_size = False
    encodes_in_forward = True
    remakes_masks = True
    blocks_in_full = False
    sizes_name = "image_position_ids"

    def find_language_model(self) -> nn.Module:
        """Return `model.language_model`."""
        if self.model.config.get_text_config().use_bidirectional_attention == "all":
            raise self.cannot_serve("its text sees itself both ways (use_bidirectional_attention)")
        return super().find_language_model()

    def block_ids_BN(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the runs of `mm_token_type_ids` 1 (images) and 2 (frames), numbered from 0 in each row."""
        types_BN = inputs.get("mm_token_type_ids")
        if types_BN is None or self.model.config.get_text_config().use_bidirectional_attention is None:
            return None
        return _runs((types_BN == 1) | (types_BN == 2))

    @property
    def patches_per_side(self) -> int:
        """The tower's `pooling_kernel_size`."""
        return int(self.model.config.vision_config.pooling_kernel_size)

    def _grids_of_places(self, places: Any) -> list[Grid]:
        """Return the grid of each image or frame from the places (x, y) of its patches; padding stands at -1."""
        if places is None:
            return []
        side = self.patches_per_side
        return [Grid((y + 1) // side, (x + 1) // side) for x, y in torch.as_tensor(places).amax(1).tolist()]

    def image_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the units by `image_position_ids`.

        Raises:
            UsageError: images come encoded, without these.
        """
        places = inputs.get("image_position_ids")
        if places is None and (inputs.get("pixel_values") is not None or ready_features(inputs, "image") is not None):
            raise UsageError("compression: the sizes of the images are not known; pass image_position_ids")
        return [(grid,) for grid in self._grids_of_places(places)]

    def video_units(self, inputs: Mapping[str, Any]) -> list[Units]:
        """Return the frames of each video by `video_position_ids` and `num_frames_per_video`."""
        frames = iter(self._grids_of_places(inputs.get("video_position_ids")))
        counts = inputs.get("num_frames_per_video")
        return [] if counts is None else [tuple(islice(frames, n)) for n in torch.as_tensor(counts).tolist()]

    def empty_image(self) -> dict[str, Any]:
        """Return a blank image of one token."""
        side, patch = self.patches_per_side, self.model.config.vision_config.patch_size
        pixels = self.blank(1, side * side, 3 * patch**2)
        places = torch.cartesian_prod(*[torch.arange(side, device=pixels.device)] * 2).reshape(1, -1, 2)
        return {"pixel_values": pixels, "image_position_ids": places}


def _runs(image_BN: Tensor) -> Tensor:
    """Return the numbers of runs of visual tokens in each row, -1 elsewhere."""
    starts_BN = image_BN & ~nn.functional.pad(image_BN, (1, 0), value=False)[:, :-1]
    return torch.where(image_BN, starts_BN.long().cumsum(1) - 1, -1)

"""Any other image-text-to-text model whose decoder is a list of layers: what follows from config and token ids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.compression.families.base import Family
from orchestrator.compression.families.images import Units, flat_features, interleaved, pair
from orchestrator.errors import UsageError
from orchestrator.spec.components import Grid
from orchestrator.spec.model_facts import UNCHECKED_CALLS

_DECODERS = ("language_model", "text_model")
_IMAGE_NAMES = ("image_token_id", "image_token_index")
_MERGES = ("spatial_merge_size", "merge_size", "merge_kernel_size")
_VIDEO_NAMES = ("video_token_id", "video_token_index")


class GenericFamily(Family):
    """Units follow from `image_grid_thw` (`video_grid_thw`), or are the images, tiles and frames that pixels count.

    Without a grid a square number of tokens is taken for a square grid where the vision tower's usual image is square,
    any other for one row: methods of two dimensions need an adapter where that is wrong. What is not clear is refused,
    and `attach` serves such a model only after its self-check (`compression/testing/self_check.py`).

    Attributes:
        video_refused: Why videos are refused; empty where the self-check proved them.
    """

    proven = False
    encodes_in_forward = True
    video_refused = ""
    zero3_refusal = UNCHECKED_CALLS

    def find_language_model(self) -> nn.Module:
        """Return the result of `get_decoder`, or an attribute of the usual names."""
        config: Any = self.model.config
        if getattr(config, "is_encoder_decoder", False):
            raise self.cannot_serve("it is an encoder-decoder model; visual tokens do not run through its decoder")
        text = getattr(config, "text_config", None)
        if getattr(text, "cross_attention_layers", None) or getattr(config, "cross_layer_interval", None):
            raise self.cannot_serve("its decoder sees images by cross-attention; it has no visual tokens to compress")
        if self.token_ids[0] is None:
            raise self.cannot_serve(f"its config has no {' or '.join(_IMAGE_NAMES)}")
        for candidate in self._candidates():
            if isinstance(candidate, nn.Module) and candidate is not self.model and hasattr(candidate, "layers"):
                return candidate
        raise self.cannot_serve(
            f"it has no decoder with a list of layers (asked were get_decoder(), {', '.join(_DECODERS)})"
        )

    def _candidates(self) -> list[Any]:
        get_decoder = getattr(self.model, "get_decoder", None)
        inner = getattr(self.model, "model", None)
        found = [get_decoder()] if get_decoder is not None else []
        found += [getattr(owner, name, None) for owner in (inner, self.model) for name in _DECODERS]
        return found + [getattr(one, "model", None) for one in found]  # some hold a causal LM, whose decoder is inside

    @property
    def token_ids(self) -> tuple[int | None, int | None]:
        """Token ids of image and video placeholders; None where the config names none."""
        config = self.model.config
        image, video = ([getattr(config, name, None) for name in names] for names in (_IMAGE_NAMES, _VIDEO_NAMES))
        return next((i for i in image if i is not None), None), next((i for i in video if i is not None), None)

    def grids(self, inputs: Mapping[str, Any], num_placeholders: int) -> list[Grid]:
        """Return the units of images and videos as they stand in the rows.

        Raises:
            UsageError: what the batch holds does not say where one unit ends and the next begins.
        """
        ids_BN = torch.as_tensor(inputs["input_ids"])
        image, video = self.token_ids
        is_video_BN = torch.zeros_like(ids_BN, dtype=torch.bool) if video is None else ids_BN == video
        if video == image:
            is_video_BN = is_video_BN & (inputs.get("pixel_values") is None)
        if self.video_refused and (bool(is_video_BN.any()) or inputs.get("pixel_values_videos") is not None):
            raise self._unclear(f"the batch holds videos, and {self.video_refused}")
        is_image_BN = self.visual_BN(ids_BN) & ~is_video_BN
        images = self._units(inputs, "image", ids_BN, is_image_BN)
        videos = self._units(inputs, "video", ids_BN, is_video_BN)
        return list(interleaved(images, videos, is_video_BN[self.visual_BN(ids_BN)]))

    def _units(self, inputs: Mapping[str, Any], kind: str, ids_BN: Tensor, places_BN: Tensor) -> list[Units]:
        if not bool(places_BN.any()):
            return []
        pixels = inputs.get("pixel_values" if kind == "image" else "pixel_values_videos")
        grid_thw = inputs.get(f"{kind}_grid_thw")
        if grid_thw is not None:
            side = self.patches_per_side
            return [(Grid(h // side, w // side),) * t for t, h, w in torch.as_tensor(grid_thw).tolist()]
        if pixels is None or pixels.ndim < 3:
            raise self._unclear(
                f"where its {kind}s end cannot be told from the batch: it has neither {kind}_grid_thw nor pixels of "
                f"one {kind} each"
            )
        runs, count = _runs(ids_BN, places_BN), _entries(pixels)
        if count != len(runs):
            tokens = int(places_BN.sum())
            share, sizes = tokens // count, inputs.get(f"{kind}_sizes")
            unequal = sizes is not None and len(set(map(tuple, torch.as_tensor(sizes).tolist()))) > 1
            if unequal or count < len(runs) or tokens % count or any(run % share for run in runs):
                raise self._unclear(
                    f"the batch's {count} {kind}s (tiles, frames) stand in {len(runs)} runs of {tokens} placeholders, "
                    "which do not say where one ends"
                )
            runs = [share] * count
        return [(self._grid(run),) for run in runs]

    def _unclear(self, reason: str) -> UsageError:
        return UsageError(
            f"compression: {type(self.model).__name__} has no adapter of its own: {reason}; it needs an adapter in "
            "orchestrator/compression/families"
        )

    @property
    def patches_per_side(self) -> int:
        """Patches along a side of the image that the model merges into one token, as the config says."""
        vision: Any = getattr(self.model.config, "vision_config", None)
        found = (getattr(owner, name, None) for name in _MERGES for owner in (vision, self.model.config))
        return pair(next((value for value in found if value is not None), 1))[0]

    def _grid(self, tokens: int) -> Grid:
        side = math.isqrt(tokens)
        size = getattr(getattr(self.model.config, "vision_config", None), "image_size", None)
        square = size is not None and len(set(pair(size))) == 1
        return Grid(side, side) if square and side * side == tokens else Grid(1, tokens)

    def num_visual_tokens(self, inputs: Mapping[str, Any]) -> int:
        """Return the placeholders, counted: nothing else holds for every model."""
        images = any(name.startswith("pixel_values") and value is not None for name, value in inputs.items())
        if inputs.get("input_ids") is None or not (images or any((inputs.get("mm_encoder_outputs") or {}).values())):
            return 0
        return int(self.visual_BN(inputs["input_ids"]).sum())

    def segment_options(self, options: dict[str, Any], first: int) -> dict[str, Any]:
        """Return the options; refuse one that belongs to single tokens, which cannot be shortened."""
        for name, value in options.items():
            if isinstance(value, Tensor | list | tuple | dict) and len(value):
                raise self.cannot_serve(f"its decoder takes {name}, which compression does not know how to shorten")
        return options

    def idle_features(self) -> Tensor:
        """Return the features of a blank image of the size in the config.

        Raises:
            UsageError: the model takes images in another form.
        """
        vision, parameter = self.model.config.vision_config, next(self.model.parameters())
        try:
            shape = 1, getattr(vision, "num_channels", 3), *pair(vision.image_size)
            pixels = torch.ones(shape, device=parameter.device, dtype=parameter.dtype)
            return flat_features(self.model.get_image_features(pixel_values=pixels))
        except Exception as error:
            raise UsageError(
                f"compression: a batch without images on one of several training ranks needs an adapter for "
                f"{type(self.model).__name__} (its get_image_features does not take pixel_values alone: {error}); "
                "give every batch an image"
            ) from error


def _entries(pixels: Tensor) -> int:
    """Return how many images, tiles or frames pixels hold, padding (entries of zeros) not counted."""
    if pixels.ndim < 5:
        return len(pixels)
    return int(pixels.flatten(0, -4).flatten(1).any(1).sum())


def _runs(ids_BN: Tensor, visual_BN: Tensor) -> list[int]:
    """Return the lengths of runs of one placeholder in the rows, in order."""
    lengths = []
    for ids, visual in zip(ids_BN, visual_BN, strict=True):
        values, counts = torch.unique_consecutive(torch.where(visual, ids, -1), return_counts=True)
        lengths += [count for value, count in zip(values.tolist(), counts.tolist(), strict=True) if value != -1]
    return lengths

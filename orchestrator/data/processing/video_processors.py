"""transformers' own video processors without torchvision, which has no build for every torch.

What they do of torchvision's is to resize, crop and normalise tensors. That is repeated here with the torch functions
that torchvision calls for uint8 on a CPU, so that frames come out as with it, bit for bit; everything else (sizes,
settings, patches) is the model's own class. Where torchvision is installed, none of this is used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch.nn import functional as F

_MODES = {2: "bilinear", 3: "bicubic"}
"""torch's names of Pillow's filters (`PILImageResampling`)."""


def without_torchvision(model_type: str) -> Any:
    """Return the class of a model type's video processor, which needs no torchvision; None where none is known."""
    make = _MADE_BY.get(model_type)
    return None if make is None else make()


@cache
def _own(module: str, name: str) -> Any:
    """Return a class of transformers' with the parts of torchvision's that it uses."""
    processor: Any = getattr(import_module(f"transformers.models.{module}.video_processing_{module}"), name)
    # Behind the class in the order in which methods are looked up, before what it takes them from.
    made: Any = type(name, (processor, _plain_tensors()), {"convert_to_rgb": _as_it_is})
    return made


def _as_it_is(self: Any, video: torch.Tensor) -> torch.Tensor:
    """Return the frames: they are RGB."""
    return video


@cache
def _plain_tensors() -> Any:
    # Late: image processors load what most commands do not need.
    from transformers.image_processing_backends import TorchvisionBackend
    from transformers.image_transforms import get_resize_output_image_size

    class PlainTensors(TorchvisionBackend):
        def resize(
            self, image: torch.Tensor, size: Any, resample: Any = None, antialias: bool = True, **_: Any
        ) -> torch.Tensor:
            """Resize frames (..., C, H, W): torchvision.transforms.v2.functional, `resize_image`."""
            if size.height and size.width:
                wanted = (size.height, size.width)
            elif size.shortest_edge and not size.longest_edge:
                wanted = get_resize_output_image_size(
                    image, size=size.shortest_edge, default_to_square=False, input_data_format="channels_first"
                )
            else:
                raise ValueError(f"size {size}: height and width, or shortest_edge, without torchvision")
            if tuple(wanted) == tuple(image.shape[-2:]):
                return image
            mode = _MODES.get(int(resample) if resample is not None else 2)
            if mode is None:
                raise ValueError(f"resample {resample}: bilinear (2) or bicubic (3), without torchvision")
            frames_BCHW = image.reshape(-1, *image.shape[-3:])
            resized = F.interpolate(frames_BCHW, size=list(wanted), mode=mode, align_corners=False, antialias=antialias)
            return resized.reshape(*image.shape[:-2], *wanted)

        def normalize(self, image: torch.Tensor, mean: Any, std: Any, inplace: bool = False, **_: Any) -> torch.Tensor:
            """Normalise frames (..., C, H, W): torchvision.transforms.v2.functional, `normalize_image`."""
            mean_C11, std_C11 = (torch.as_tensor(value, dtype=image.dtype).view(-1, 1, 1) for value in (mean, std))
            return image.sub(mean_C11).div_(std_C11)

        def center_crop(self, image: torch.Tensor, size: Any, **_: Any) -> torch.Tensor:
            """Cut out the middle of frames (..., C, H, W), with zeros around where they are smaller."""
            height, width = image.shape[-2:]
            pad = [max(size.width - width, 0), max(size.height - height, 0)]
            if any(pad):
                image = F.pad(image, (pad[0] // 2, (pad[0] + 1) // 2, pad[1] // 2, (pad[1] + 1) // 2))
                height, width = image.shape[-2:]
            top, left = int((height - size.height) / 2.0), int((width - size.width) / 2.0)
            return image[..., top : top + size.height, left : left + size.width]

    return PlainTensors


@cache
def _qwen2_vl() -> Any:
    """Return Qwen2-VL's: transformers' own module imports torchvision itself.

    It is Qwen3-VL's but for its settings, and for the size, which does not depend on the number of frames
    (transformers 5.23, `video_processing_qwen2_vl.py`).
    """
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, SizeDict
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    base = _own("qwen3_vl", "Qwen3VLVideoProcessor")
    standard = {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}

    def start(self: Any, **kwargs: Any) -> None:
        size = dict(kwargs.pop("size", None) or standard)
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if (pixels := kwargs.pop(name, None)) is not None:
                size[edge] = pixels
        base.__init__(self, size=size, **kwargs)

    def resize(
        self: Any,
        videos: torch.Tensor,
        size: Any,
        resample: Any,
        factor: int,
        temporal_factor: int = 2,
        cap_pixels_per_frame: bool | None = None,
        **_: Any,
    ) -> torch.Tensor:
        most = size.longest_edge
        if cap_pixels_per_frame:
            total = int(self.max_video_tokens * factor * factor * 0.9)
            most = max(min(most, total * temporal_factor // videos.shape[1]), int(size.shortest_edge * 1.05))
        height, width = smart_resize(*videos.shape[-2:], factor, size.shortest_edge, most)
        resized: torch.Tensor = _plain_tensors().resize(
            self, videos, SizeDict(height=height, width=width), resample=resample
        )
        return resized

    settings = {
        "size": standard,
        "image_mean": OPENAI_CLIP_MEAN,
        "image_std": OPENAI_CLIP_STD,
        "patch_size": 14,
        "do_sample_frames": False,
        "max_video_tokens": 128000,
        "fps": None,
    }
    return type("Qwen2VLVideoProcessor", (base,), {**settings, "__init__": start, "resize": resize})


_MADE_BY: dict[str, Callable[[], Any]] = {
    "video_llava": lambda: _own("video_llava", "VideoLlavaVideoProcessor"),
    "llava_next_video": lambda: _own("llava_next_video", "LlavaNextVideoVideoProcessor"),
    "llava_onevision": lambda: _own("llava_onevision", "LlavaOnevisionVideoProcessor"),
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_vl,
    "qwen3_vl": lambda: _own("qwen3_vl", "Qwen3VLVideoProcessor"),
    "qwen3_vl_moe": lambda: _own("qwen3_vl", "Qwen3VLVideoProcessor"),
}

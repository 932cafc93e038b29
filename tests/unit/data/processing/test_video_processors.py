"""The video processors that run without torchvision, beside transformers' own where it is installed."""

from importlib import import_module

import pytest
import torch

from orchestrator.data.processing.video_processors import without_torchvision

OWN = {
    "video_llava": ("video_llava", "VideoLlavaVideoProcessor"),
    "llava_next_video": ("llava_next_video", "LlavaNextVideoVideoProcessor"),
    "llava_onevision": ("llava_onevision", "LlavaOnevisionVideoProcessor"),
    "qwen2_vl": ("qwen2_vl", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": ("qwen2_vl", "Qwen2VLVideoProcessor"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VLVideoProcessor"),
    "qwen3_vl_moe": ("qwen3_vl", "Qwen3VLVideoProcessor"),
}
SIZES = [(64, 64, 8), (120, 200, 4), (500, 300, 8), (1080, 1920, 2)]


def test_all_of_them_equal_transformers_own_bit_for_bit():
    """Seen equal with torch 2.14.1 and torchvision 0.29.1: noise, where a filter's every tap tells."""
    pytest.importorskip("torchvision", reason="torchvision has no CPU build for this torch; without it ours are used")
    drawn = torch.Generator().manual_seed(0)
    for model_type, (module, name) in OWN.items():
        own = getattr(import_module(f"transformers.models.{module}.video_processing_{module}"), name)()
        ours = without_torchvision(model_type)()
        for height, width, frames in SIZES:
            video = torch.randint(0, 256, (frames, 3, height, width), generator=drawn, dtype=torch.uint8)
            expected, found = (one([video], return_tensors="pt", do_sample_frames=False) for one in (own, ours))
            tensors = {key: value for key, value in expected.items() if torch.is_tensor(value)}
            assert tensors and tensors.keys() <= found.keys()
            assert all(torch.equal(value, found[key]) for key, value in tensors.items()), (model_type, height, width)

"""What an image becomes, by arithmetic alone, is what transformers' image processors and the family's adapter make of
it, on many sizes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_folders import FOLDERS, PINPOINTS, SQUARE, write_folder
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from orchestrator.compression.families import family_of
from orchestrator.compression.testing.families import LLAVA_PIXTRAL, TINY
from orchestrator.data.processing.processor import load_processor
from orchestrator.spec.components import Grid
from orchestrator.spec.image_units import ImageUnits, image_rule, processor_settings
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.model_facts import FAMILIES

_QWEN = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
_GLM = {**_QWEN, "size": {"shortest_edge": 256, "longest_edge": 4096}}
_CROPS = {"size": SQUARE, "min_patches": 1, "max_patches": 6}
# Image processors of the families that have no folder of their own in the tests: module, class, settings.
PROCESSORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_moe", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
        ("qwen2_vl", "Qwen2VLImageProcessorPil", {**_QWEN, "min_pixels": 200, "max_pixels": 2000}),
    ),
    **dict.fromkeys(("glm4v", "glm4v_moe"), ("glm4v", "Glm4vImageProcessorPil", _GLM)),
    **dict.fromkeys(("glm46v", "glm_ocr"), ("glm46v", "Glm46VImageProcessorPil", _GLM)),
    "video_llama_3": (
        "video_llama_3",
        "VideoLlama3ImageProcessorPil",
        {"patch_size": 4, "merge_size": 1, "size": {"shortest_edge": 64, "longest_edge": 1024}},
    ),
    "aya_vision": ("got_ocr2", "GotOcr2ImageProcessorPil", {**_CROPS, "crop_to_patches": True}),
    "ovis2": ("ovis2", "Ovis2ImageProcessorPil", {**_CROPS, "crop_to_patches": True}),
    "cohere2_vision": ("cohere2_vision", "Cohere2VisionImageProcessor", _CROPS),
    **dict.fromkeys(
        ("llava_next_video", "granite4_vision"),
        (
            "llava_next",
            "LlavaNextImageProcessorPil",
            {"size": {"shortest_edge": 24}, "crop_size": SQUARE, "image_grid_pinpoints": PINPOINTS},
        ),
    ),
    "gemma4": ("gemma4", "Gemma4ImageProcessorPil", {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}),
    "got_ocr2": (
        "got_ocr2",
        "GotOcr2ImageProcessorPil",
        {"size": {"height": 36, "width": 36}, "crop_to_patches": True, "max_patches": 4},
    ),
    "lighton_ocr": ("pixtral", "PixtralImageProcessorPil", {"size": {"longest_edge": 64}, "patch_size": 8}),
    "llama4": ("llama4", "Llama4ImageProcessor", {"size": SQUARE, "max_patches": 6}),
    "molmo2": (
        "molmo2",
        "Molmo2ImageProcessor",
        {"size": SQUARE, "patch_size": 4, "overlap_margins": [1, 1], "max_crops": 6},
    ),
    "step3p7": ("step3p7", "Step3p7ImageProcessor", {"size": {"height": 48, "width": 48}, "patch_size": 32}),
    "lfm2_vl": (
        "lfm2_vl",
        "Lfm2VlImageProcessor",
        {"encoder_patch_size": 4, "tile_size": 24, "min_image_tokens": 2, "max_image_tokens": 9, "max_tiles": 6},
    ),
}
NEEDS_TORCHVISION = ("cohere2_vision", "lfm2_vl", "llama4", "molmo2", "step3p7")
# Every image the same number of tokens.
FIXED = ("llava", "vipllava", "video_llava", "paligemma", "gemma3", "pp_chart2table")
VARYING = [name for name in TINY if name in FAMILIES and name not in FIXED]


def sizes(count: int, most: int = 90) -> list[tuple[int, int]]:
    """Heights and widths, small and large, wide and tall."""
    draw = random.Random(count)
    edges = [(1, 1), (most, 3), (3, most), (24, 24), (48, 24), (24, 48), (16, 48)]
    return edges + [tuple(round(draw.uniform(2, most**0.5) ** 2) for _ in "hw") for _ in range(count)]


def processor_of(family: str, folder: Path) -> Any:
    """The family's image processor, its settings written to the folder."""
    if family in FOLDERS:
        holds = FOLDERS[family]()
        (folder / "processor_config.json").write_text(json.dumps(holds.settings))
        processor = holds.image_processor
    else:
        if family in NEEDS_TORCHVISION and find_spec("torchvision") is None:
            pytest.skip(f"the image processor of {family} needs torchvision")
        module, name, settings = PROCESSORS[family]
        module = f"transformers.models.{module}.image_processing_{'pil_' if name.endswith('Pil') else ''}{module}"
        processor = getattr(__import__(module, fromlist=[name]), name)(**settings)
    processor.save_pretrained(folder)
    if family == "lighton_ocr":
        (folder / "processor_config.json").write_text(json.dumps({"patch_size": 4, "spatial_merge_size": 2}))
    return processor


def rule_of(model: Any, folder: Path) -> Callable[[int, int, bool], ImageUnits]:
    config = model.config.to_dict()
    return image_rule(config, model.config.vision_config.to_dict(), processor_settings(folder))


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8))


# What their processors add.
FORCED = {
    "internvl": {"crop_to_patches": True},
    **{name: {"patch_size": 8} for name in ("mistral3", "lighton_ocr")},
}


def adapters_grids(family: str, model: Any, given: dict[str, Any]) -> list[Any]:
    """The units that the family's adapter finds in what the processor gives."""
    adapter = family_of(model)
    if family in ("idefics3", "smolvlm"):  # placeholders count its tiles, and there are none without a text
        pixels = given["pixel_values"]
        return [adapter.grid_of(*pixels.shape[-2:])] * pixels.shape[1]
    return [grid for units in adapter.image_units(given) for grid in units]


def tokens_in_tower(family: str, model: Any, given: dict[str, Any]) -> int:
    """The tokens the vision tower runs, from the pixels that the processor gives."""
    pixels, vision = given["pixel_values"], model.config.vision_config
    if "image_grid_thw" in given:
        return len(pixels)
    if family in ("gemma4", "lfm2_vl", "molmo2"):  # patches
        return pixels.shape[0] * pixels.shape[1]
    if "pixel_values_local" in given:
        return (
            sum(each.shape[0] * each.shape[2] * each.shape[3] for each in (pixels, given["pixel_values_local"])) // 16
        )
    *images, _, height, width = pixels.shape
    patches = (
        (height // vision.patch_size) * (width // vision.patch_size)
        if isinstance(vision.patch_size, int)
        else ((height // vision.patch_size[0]) * (width // vision.patch_size[1]))
    )
    cls = vision.model_type in ("clip_vision_model", "internvl_vision", "llama4_vision_model")
    return int(np.prod(images)) * (patches + cls)


@pytest.mark.parametrize("family", VARYING)
def test_units_are_those_of_the_processor_and_the_adapter(family: str, tmp_path: Path) -> None:
    processor, model = processor_of(family, tmp_path), TINY[family].build("eager", 0)
    rule, seen = rule_of(model, tmp_path), set()
    for height, width in sizes(40):
        try:
            given = dict(processor([picture(height, width)], return_tensors="pt", **FORCED.get(family, {})))
        except (ValueError, ZeroDivisionError):
            continue  # a shape that the processor refuses
        units = rule(height, width, True)
        assert list(units.grids) == adapters_grids(family, model, given), (height, width)
        assert sum(units.tower) == tokens_in_tower(family, model, given), (height, width)
        seen.add(units)
    assert len(seen) > 2


def test_one_of_several_images_is_a_single_tile(tmp_path: Path) -> None:
    processor, model = processor_of("llava_onevision", tmp_path), TINY["llava_onevision"].build("eager", 0)
    rule = rule_of(model, tmp_path)
    pair = [picture(30, 44), picture(50, 20)]
    given = dict(processor([pair], return_tensors="pt"))
    expected = [*rule(30, 44, False).grids, *rule(50, 20, False).grids]
    assert adapters_grids("llava_onevision", model, given) == expected
    assert sum(rule(30, 44, False).tower) * 2 == tokens_in_tower("llava_onevision", model, given)


def test_a_pixtral_tower_under_llava(tmp_path: Path) -> None:
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    processor = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"patch_size": 8}))
    model = LLAVA_PIXTRAL.build("eager", 0)
    rule = rule_of(model, tmp_path)
    for height, width in sizes(30):
        given = dict(processor([picture(height, width)], return_tensors="pt"))
        assert list(rule(height, width, True).grids) == adapters_grids("llava", model, given), (height, width)


def test_views_that_patches_do_not_divide_are_refused(tmp_path: Path) -> None:
    vision = {"model_type": "step3p5_vision", "patch_size": 14}
    for size, known in ((504, True), (490, False)):
        settings = {"image_processor": {"patch_size": size}}
        try:
            units = image_rule({"model_type": "step3p7"}, vision, settings)(2000, 1000, True)
        except ValueError as error:
            assert not known and "no multiples of four patches" in str(error)
        else:
            assert known and units.grids == (Grid(9, 9),) * 8 + (Grid(13, 13),)


@pytest.mark.parametrize("family", [name for name in FOLDERS if name in VARYING])
def test_placeholders_and_markers_are_those_of_the_whole_processor(family: str, tmp_path: Path) -> None:
    package = {"smolvlm": "num2words", "mistral3": "torchvision"}.get(family)
    if package is not None and find_spec(package) is None:
        pytest.skip(f"its processor needs {package}")
    write_folder(family, tmp_path)
    loaded = load_processor(ModelSpec(model_name_or_path=str(tmp_path)))
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    rule, mark = rule_of(model, tmp_path), loaded.image_token
    for height, width in sizes(12):
        if max(height, width) / min(height, width) > 20:
            continue
        ids = loaded.processor(text=[mark], images=[picture(height, width)], add_special_tokens=False)["input_ids"][0]
        units = rule(height, width, True)
        assert list(ids).count(loaded.image_token_id) == units.tokens, (height, width)
        # An empty line after Idefics3's tiles is two tokens of this tokenizer, one of its own.
        assert len(ids) - units.tokens - units.markers in ((0, 1) if family in ("idefics3", "smolvlm") else (0,))


@pytest.mark.parametrize(
    ("module", "name", "count"),
    [
        ("qwen2_vl", "Qwen2VLImageProcessorPil", lambda units: sum(units.tower)),
        ("glm46v", "Glm46VImageProcessorPil", lambda units: sum(units.tower)),
        ("got_ocr2", "GotOcr2ImageProcessorPil", lambda units: len(units.grids)),
        ("idefics3", "Idefics3ImageProcessorPil", lambda units: len(units.grids)),
    ],
)
def test_photographs_at_the_processors_own_settings(module: str, name: str, count: Any, tmp_path: Path) -> None:
    path = f"transformers.models.{module}.image_processing_pil_{module}"
    processor = getattr(__import__(path, fromlist=[name]), name)(**({"crop_to_patches": True} if "Got" in name else {}))
    processor.save_pretrained(tmp_path)
    family = {"got_ocr2": "internvl", "glm46v": "glm4v"}.get(module, module)
    rule = rule_of(TINY[family].build("eager", 0), tmp_path)
    for height, width in sizes(400, 4500):
        try:
            wanted = processor.get_number_of_image_patches(height, width, {})
        except ValueError:
            with pytest.raises(ValueError, match="over 200 times"):
                rule(height, width, True)
            continue
        assert count(rule(height, width, True)) == (wanted[0] if isinstance(wanted, tuple) else wanted)


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    model = TINY["qwen2_vl"].build("eager", 0)
    with pytest.raises(ValueError, match="whose settings are not here"):
        rule_of(model, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "OwnProcessor"}))
    with pytest.raises(ValueError, match="OwnProcessor"):
        rule_of(model, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_resize": False}))
    with pytest.raises(ValueError, match="do_resize"):
        rule_of(model, tmp_path)
    with pytest.raises(ValueError, match="not known here"):
        image_rule({"model_type": "novel"}, {}, {"image_processor": {}})

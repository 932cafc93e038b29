"""Every family on what its real image processor makes of two pictures of different size: units, and pooling exact."""

from __future__ import annotations

import inspect
import runpy
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from family_folders import FOLDERS
from PIL import Image
from repository import ROOT

from orchestrator.compression.attach import attach_family
from orchestrator.compression.families import family_of
from orchestrator.compression.testing.families import PERCEPTION_LM, TINY
from orchestrator.compression.testing.reference import Reference, decoder_inputs
from orchestrator.compression.testing.tiny import IMAGE, PAD, SEPARATOR, enlarge, pad_rows

_UNITS = runpy.run_path(str(ROOT / "tests" / "unit" / "spec" / "test_image_units.py"))
_QWEN = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 1024}}
_TILES = {"size": {"height": 24, "width": 24}}
# Image processors of the families that have none in the tests of sizes: module, class, settings.
PROCESSORS = _UNITS["PROCESSORS"] | {
    "gemma4": ("gemma4", "Gemma4ImageProcessorPil", {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}),
    "got_ocr2": (
        "got_ocr2",
        "GotOcr2ImageProcessorPil",
        {"size": {"height": 36, "width": 36}, "crop_to_patches": True, "max_patches": 4},
    ),
    "pp_chart2table": ("pp_chart2table", "PPChart2TableImageProcessorPil", {"size": {"height": 36, "width": 36}}),
    "aria": ("aria", "AriaImageProcessorPil", {"max_image_size": 490}),
    "lighton_ocr": ("pixtral", "PixtralImageProcessorPil", {"size": {"longest_edge": 32}, "patch_size": 8}),
    "ernie4_5_vl_moe": ("ernie4_5_vl_moe", "Ernie4_5_VLMoeImageProcessorPil", _QWEN),
    "llama4": ("llama4", "Llama4ImageProcessor", {**_TILES, "max_patches": 4}),
    "molmo2": (
        "molmo2",
        "Molmo2ImageProcessor",
        {**_TILES, "patch_size": 4, "overlap_margins": [1, 1], "max_crops": 4},
    ),
    "step3p7": ("step3p7", "Step3p7ImageProcessor", {"size": {"height": 48, "width": 48}, "patch_size": 24}),
    "perception_lm": ("perception_lm", "PerceptionLMImageProcessor", {"tile_size": 24, "vision_input_type": "vanilla"}),
}
NEEDS_TORCHVISION = {
    name for name, (_, cls, _) in PROCESSORS.items() if not cls.endswith("Pil") and name not in FOLDERS
}
BY_ROWS = ("idefics3", "smolvlm", "llava_onevision")  # their processors see which pictures are of one row
ROWS = ((0,), (1, 0))


def processor_of(name):
    if name in FOLDERS:
        return FOLDERS[name]().image_processor
    module, cls, settings = PROCESSORS[name]
    path = f"transformers.models.{module}.image_processing_{'pil_' if cls.endswith('Pil') else ''}{module}"
    return getattr(__import__(path, fromlist=[cls]), cls)(**settings)


def built(name):
    tiny = PERCEPTION_LM if name == "perception_lm" else TINY[name]
    model = tiny.build("eager", 0).eval()
    if name == "aria":  # its processor knows two sizes, the smaller of 490 pixels
        config = model.config
        config.vision_config.image_size, config.vision_config.patch_size = 490, 35
        config.projector_patch_to_query_dict = {196: 6}
        torch.manual_seed(0)
        model = enlarge(type(model)(config)).eval()
        with torch.no_grad():
            model.model.multi_modal_projector.query.normal_(std=0.1)
    return tiny, model


def pictures(seed):
    draw = np.random.default_rng(seed)
    return [Image.fromarray(draw.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in ((30, 44), (50, 21))]


class Seen:
    """Rows of pictures as a family's model gets them."""

    def __init__(self, name, model, several):
        self.name, self.family, self.processor = name, family_of(model), processor_of(name)
        self.taken = inspect.signature(type(model).forward).parameters
        rows = [[several[row][number] for number in numbers] for row, numbers in enumerate(ROWS)]
        flat = [picture for row in rows for picture in row]
        given = self._given(rows if name in BY_ROWS else flat)
        self.units = self._units(flat, given)
        self.batch = self._batch(given)

    def _given(self, images):
        forced = _UNITS["FORCED"].get("mistral3" if self.name == "lighton_ocr" else self.name, {})
        found = dict(self.processor(images, return_tensors="pt", **forced))
        if "pixel_values_images" in found:
            found["pixel_values"] = found.pop("pixel_values_images")
        found = {key: value for key, value in found.items() if key in self.taken}
        # Llama 4's gives bfloat16.
        return found | {key: value.float() for key, value in found.items() if key.startswith("pixel_values")}

    def _units(self, flat, given):
        """The units of each picture; where a processor's output has one entry for each tile, of the picture alone."""
        if self.name == "llava_onevision":
            return self.family.image_units(given)
        if self.name in BY_ROWS:
            alone = [self._given([[picture]])["pixel_values"] for picture in flat]
            return [(self.family.grid_of(*pixels.shape[-2:]),) * pixels.shape[1] for pixels in alone]
        return [tuple(g for units in self.family.image_units(self._given([one])) for g in units) for one in flat]

    def _batch(self, given):
        left, ids = iter(self.units), []
        for numbers in ROWS:
            row = [3, 4, 5]
            for _ in numbers:
                row += [SEPARATOR, *[IMAGE] * sum(grid.tokens for grid in next(left)), SEPARATOR, 7]
            ids.append([*row, 8, 9, 10])
        batch = pad_rows(ids, [[token == IMAGE for token in row] for row in ids], "right", PAD, 3) | given
        visual = batch["input_ids"] == IMAGE
        for key in ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"):
            if key in self.taken:
                batch[key] = visual.long()
        if self.name == "paligemma":  # the answer is the suffix
            batch["token_type_ids"] = (batch["labels"] >= 0).long()
        return batch

    @property
    def rows(self):
        left = iter(self.units)
        return [[grid for _ in numbers for grid in next(left)] for numbers in ROWS]


@pytest.mark.parametrize("name", [*TINY, "perception_lm"])
def test_what_the_processor_makes_is_what_the_adapter_sees(name):
    if name in NEEDS_TORCHVISION and find_spec("torchvision") is None:
        pytest.skip(f"the image processor of {name} needs torchvision, which is not installed")
    if name == "perception_lm" and find_spec("timm") is None:
        pytest.skip("its tower needs timm, which is not installed")
    tiny, model = built(name)
    one, other = pictures(1), pictures(2)
    seen = Seen(name, model, [one, one])
    batch, family = seen.batch, seen.family
    visual = family.visual_BN(batch["input_ids"])
    assert family.grids(batch, int(visual.sum())) == [grid for row in seen.rows for grid in row]

    # Another second picture moves the tokens of its units, and no others.
    moved = Seen(name, model, [one, [one[0], other[1]]]).batch
    with torch.no_grad():
        before, after = (
            decoder_inputs(model, family.language_model, inputs)["inputs_embeds"] for inputs in (batch, moved)
        )
    changed = ((after - before).abs().amax(2) > 1e-6 * before.abs().amax()) & visual
    first, second = (sum(grid.tokens for grid in units) for units in seen.units[:2])
    places = visual[1].nonzero().squeeze(1)[:second]
    assert not bool(changed[0].any()) and int(visual[0].sum()) == first
    assert set(changed[1].nonzero().squeeze(1).tolist()) <= set(places.tolist())
    # In Granite 4 Vision features enter later, before some of the layers.
    assert int(changed[1].sum()) > second // 2 or name == "granite4_vision"

    plain = built(name)[1]
    point = {"kind": "average_pool", "layer": max(1, tiny.first_layer), "stride": 2}
    attachment = attach_family(family, [point])
    with torch.no_grad():
        loss = model(**batch).loss
        expected = Reference(family_of(plain)).loss(batch, seen.rows, attachment.points)
    assert float(loss) == pytest.approx(float(expected), abs=2e-5)
    assert attachment.last_visual_layer_tokens < int(visual.sum()) * tiny.layers

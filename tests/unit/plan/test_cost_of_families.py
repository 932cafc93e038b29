"""The formula is what torch counts in a forward pass of each family's tiny model, on images of several sizes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.compression.families import FAMILIES as ADAPTERS
from orchestrator.compression.families import family_of
from orchestrator.compression.testing.families import GEMMA_4_CAUSAL, LLAVA_PIXTRAL, TINY, _gemma_4
from orchestrator.compression.testing.tiny import TinyFamily
from orchestrator.plan import cost
from orchestrator.plan.cost import MeasuredRow, MeasuredRows, Sample
from orchestrator.spec.components import Grid
from orchestrator.spec.image_units import ImageUnits
from orchestrator.spec.model_facts import FAMILIES, WITHOUT_FACTS, model_facts

_QWEN = {
    "image": ImageUnits((Grid(3, 4),), (48,), 12, windows=(16, 16, 8, 8)),
    "small": ImageUnits((Grid(2, 2),), (16,), 4, windows=(16,)),
}
_ROWS_OF_PATCHES = {"image": ImageUnits((Grid(3, 4),), (48,), 12), "small": ImageUnits((Grid(2, 2),), (16,), 4)}


def _tiles(inside: int) -> dict[str, ImageUnits]:
    return {
        "image": ImageUnits((Grid(3, 3),) * 3, (inside,) * 3, 27),
        "small": ImageUnits((Grid(3, 3),), (inside,), 9),
    }


# What the kit's images of each family are, by hand.
IMAGES: dict[str, dict[str, ImageUnits]] = {
    **{name: {"image": ImageUnits((Grid(3, 3),), (10,), 9)} for name in ("llava", "vipllava", "video_llava")},
    "paligemma": {"image": ImageUnits((Grid(3, 3),), (9,), 9)},
    "gemma3": {"image": ImageUnits((Grid(3, 3),), (36,), 9)},
    "llava_next": {
        "image": ImageUnits((Grid(3, 3), Grid(4, 7)), (10,) * 5, 45),
        "small": ImageUnits((Grid(3, 3), Grid(6, 2)), (10,) * 3, 27),
    },
    "llava_onevision": {
        "image": ImageUnits((Grid(3, 3), Grid(3, 6)), (9,) * 5, 45),
        "small": ImageUnits((Grid(3, 3), Grid(6, 2)), (9,) * 3, 27),
    },
    "internvl": _tiles(37),
    "idefics3": _tiles(36),
    "smolvlm": _tiles(36),
    "mistral3": _ROWS_OF_PATCHES,
    **{name: _QWEN for name in TINY if name.startswith(("qwen", "glm"))},
    "video_llama_3": {
        "image": ImageUnits((Grid(3, 4),), (12,), 12),
        "small": ImageUnits((Grid(2, 2),), (4,), 4),
    },
    **{name: _tiles(36) for name in ("aya_vision", "cohere2_vision", "ovis2")},
    # Patches of the small one are padded to those of the other.
    "lfm2_vl": {"image": ImageUnits((Grid(3, 4),), (48,), 12), "small": ImageUnits((Grid(2, 2),), (48,), 4)},
}
IMAGES |= {
    "lighton_ocr": _ROWS_OF_PATCHES,
    # Patches are padded to those of the largest image there may be.
    "gemma4": {"image": ImageUnits((Grid(3, 4),), (48,), 12), "small": ImageUnits((Grid(2, 2),), (48,), 4)},
    "llama4": _tiles(37),
    # An image and two crops of it, or one.
    "molmo2": {
        "image": ImageUnits((Grid(3, 3), Grid(3, 4)), (36,) * 3, 21),
        "small": ImageUnits((Grid(3, 3), Grid(2, 2)), (36,) * 2, 13),
    },
    # Views whose patches four by four do not divide are not counted.
    "step3p7": {"small": ImageUnits((Grid(3, 3),), (144,), 9)},
    # 9 x 9 patches in windows of 5 x 5, padded.
    **{
        name: {kind: replace(image, windows=(25,) * (4 * len(image.tower))) for kind, image in _tiles(81).items()}
        for name in ("got_ocr2", "pp_chart2table")
    },
}
IMAGES["llava_next_video"] = IMAGES["llava_next"]
IMAGES["granite4_vision"] = {
    kind: replace(image, tower=(37,) * len(image.tower)) for kind, image in IMAGES["llava_next"].items()
}


def facts_of(model: Any, folder: Path) -> Any:
    config = model.config.to_dict()
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return model_facts(str(folder))


_PART = r"\.(?:language_model|text_model|(?:vision|image|video)_tower|vision_model|vision_encoder|visual)"
_LAYER = re.compile(_PART + r"\.(?:[a-z_]+\.)*(?:layers?|blocks)\.(\d+)$")
_INSIDE = re.compile(r"^(?!.*qformer).*\.(?:layers?|blocks)\.\d+(?=\.)")
_OTHER = re.compile(
    r"lm_head|\.embeddings\.|embed_tokens|vision_tower\.head\.|_position|positional|pos_embed|audio_tower|\.query$"
)
_LEFT_OUT = re.compile(r"patch_embed|patch_conv|rotary|pos_emb|vision_tower\.(?:head|pooler)$")


def counted_flops(model: Any, batch: dict[str, Any], vision_layers: int) -> dict[str, float]:
    """What torch counts by part: layers of the tower whose output is used, those behind them, of the decoder, the LM
    head, and the rest, which is the projector. Of a decoder's attention half, which is what a causal mask needs.
    """
    with FlopCounterMode(display=False, depth=None) as counter, torch.no_grad():
        model(**batch)
    counted = counter.get_flop_counts()
    parts = dict.fromkeys(("vision_tower", "unused", "decoder", "lm_head", "projector"), 0.0)
    outermost = ""
    for name, by_op in sorted(counted.items()):
        if name == "Global":
            parts["projector"] += sum(by_op.values())
        if outermost and name.startswith(f"{outermost}."):
            continue
        layer = _LAYER.search(name)
        if name.endswith(".vision_adapter"):  # the tower's
            outermost = name
            parts["projector"] -= sum(by_op.values())
            parts["vision_tower"] += sum(by_op.values())
        elif name.endswith(".per_layer_model_projection"):  # makes what each layer adds
            parts["projector"] -= sum(by_op.values())
            parts["decoder"] += sum(by_op.values())
        elif layer or _LEFT_OUT.search(name) or name.endswith(".lm_head"):
            outermost, flops = name, sum(by_op.values())
            parts["projector"] -= flops
            attending = counted.get(f"{name}.self_attn", by_op)
            attention = sum(flops for op, flops in attending.items() if "bmm" in str(op))
            mixing = sum(counted.get(f"{name}.linear_attn", {}).values())
            if mixing:  # of linear attention the maps: how much its recurrence takes depends on the kernel
                maps = [n for n in counted if n.startswith(f"{name}.linear_attn.") and "proj" in n]
                flops, attention = flops - mixing + sum(sum(counted[n].values()) for n in maps), 0
            elif layer:
                flops -= sum(n for op, n in by_op.items() if "convolution" in str(op))
            text = "language_model" in name or "text_model" in name
            if layer:
                part = "decoder" if text else "vision_tower" if int(layer[1]) < vision_layers else "unused"
                parts[part] += flops - (attention / 2 if text else 0)
            elif name.endswith(".lm_head"):
                parts["lm_head"] += flops
    return parts


@pytest.mark.parametrize("family", list(IMAGES))
@pytest.mark.parametrize("row", [["image", 5], [3, "image", "small", 7]], ids=["one image", "two images"])
def test_operations_are_those_torch_counts(family: str, row: list[Any], tmp_path: Path) -> None:
    row = [part if part in (*IMAGES[family], *range(9)) else next(iter(IMAGES[family])) for part in row]
    if family in ("mistral3", "lighton_ocr") and "small" in row:
        return  # eager attention runs over all images of a batch at once, and masks what is between them
    check(TINY[family], IMAGES[family], row, tmp_path)


def test_operations_of_a_pixtral_tower_under_llava(tmp_path: Path) -> None:
    images = {"image": ImageUnits((Grid(3, 4),), (12,), 12)}
    check(LLAVA_PIXTRAL, images, ["image", 5], tmp_path)
    facts = model_facts(str(tmp_path))
    assert facts is not None and not facts.priced and not facts.offers


@pytest.mark.parametrize(
    "tiny",
    [GEMMA_4_CAUSAL, _gemma_4(hidden_size_per_layer_input=8, num_kv_shared_layers=2, use_double_wide_mlp=True)],
    ids=["experts", "shared keys"],
)
def test_operations_of_further_layers_of_gemma_4(tiny: TinyFamily, tmp_path: Path) -> None:
    """Experts beside the MLP, keys for values; an embedding of the token in each layer, keys of an earlier layer."""
    check(tiny, IMAGES["gemma4"], ["image", 5], tmp_path)


def check(tiny: TinyFamily, images: dict[str, ImageUnits], row: list[Any], folder: Path) -> None:
    model = tiny.build("eager", 0).eval()
    model.set_experts_implementation("eager")  # torch does not count grouped products
    facts = facts_of(model, folder)
    layers = tuple(replace(layer, recurrent=0) for layer in facts.decoder_layers)
    facts = replace(facts, decoder_layers=layers)
    batch = dict(tiny.batch([row], "right", 0, 0))
    batch.pop("labels")
    shown = tuple(images[part] for part in row if isinstance(part, str))
    length = batch["input_ids"].shape[1]
    text = length - sum(image.tokens for image in shown)
    rows = MeasuredRows((MeasuredRow(1.0, text, length, shown),))
    formula = cost.forward_tflops(facts, [], Sample(text, length, len(shown), rows))
    if facts.priced:
        plain, apart = Sample(text, 3, len(shown)), Sample(text, 3, len(shown), _labelled(rows, 3))
        assert cost.forward_tflops(facts, [], plain) == pytest.approx(cost.forward_tflops(facts, [], apart))
        unread = (
            cost.unread_tflops_per_sample(facts, [], one, {"train": ["language_model"]}) for one in (plain, apart)
        )
        assert next(unread) == pytest.approx(next(unread))
    assert formula.pop("compressor") == 0
    formula["unused"] = cost.unused_tower_tflops_per_sample(facts, [], Sample(text, length, len(shown), rows))
    if facts.priced:
        assert formula["unused"] == pytest.approx(cost.unused_tower_tflops_per_sample(facts, [], plain))
    counted = counted_flops(model, batch, facts.vision_layers)
    assert {part: value * 1e12 for part, value in formula.items()} == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize("layer", [-1, -2, 1, [-2, -3], [2, -2]])
@pytest.mark.parametrize("family", ["llava", "vipllava", "video_llava", "llava_next"])
def test_all_layers_of_a_tower_run_whichever_is_used(family: str, layer: Any, tmp_path: Path) -> None:
    tiny = TINY[family].build("eager", 0)
    tiny.config.vision_feature_layer = layer
    model = type(tiny)(tiny.config).eval()
    ran: list[str] = []
    for name, module in model.named_modules():
        if _LAYER.search(name) and "language_model" not in name and "video_tower" not in name:
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    batch = dict(TINY[family].batch([["image", 5]], "right", 0, 0))
    batch.pop("labels")
    with torch.no_grad():
        model(**batch)
    facts = facts_of(model, tmp_path)
    last = max(index if index >= 0 else 4 + index for index in (layer if isinstance(layer, list) else [layer]))
    assert (facts.vision_layers, facts.vision_depth, len(ran)) == (last, 3, 3)


def _labelled(rows: MeasuredRows, labels: int) -> MeasuredRows:
    return MeasuredRows(tuple(replace(row, label_tokens=labels) for row in rows.rows))


@pytest.mark.parametrize("family", sorted(set(TINY) & set(FAMILIES)))
def test_weights_by_part_are_the_models(family: str, tmp_path: Path) -> None:
    check_weights(TINY[family].build("eager", 0), tmp_path)


@pytest.mark.parametrize("family", ["gemma4", "got_ocr2", "lighton_ocr", "llava", "llava_onevision"])
def test_weights_of_the_default_sizes(family: str, tmp_path: Path) -> None:
    tiny = TINY[family].build("eager", 0)
    with torch.device("meta"):
        check_weights(type(tiny)(type(tiny.config)(text_config={}, vision_config={})), tmp_path)


def check_weights(model: Any, folder: Path) -> None:
    facts = facts_of(model, folder)
    counts = cost.parameter_count(facts)
    weights = {f".{name}": parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim > 1}
    of_layers = re.compile(r"\.layers\.|per_layer")
    by_channel = re.compile(r"conv\.conv|conv1d|rel_pos_")
    own = {name: n for name, n in weights.items() if not by_channel.search(name)}
    text = {name: n for name, n in own.items() if "language_model" in name or "text_model" in name}
    embeddings = 2 * model.get_output_embeddings().weight.numel()
    assert counts["language_model"] == sum(n for name, n in text.items() if of_layers.search(name)) + embeddings
    inside = {
        name: _LAYER.search(name[: found.end()])
        for name in own
        if name not in text and (found := _INSIDE.search(name)) is not None
    }
    used = [name for name, layer in inside.items() if layer and int(layer[1]) < facts.vision_layers]
    adapter = [name for name in own if ".vision_adapter." in name]
    assert counts["vision_tower"] == sum(own[name] for name in (*used, *adapter))
    others = {*text, *inside, *adapter}
    rest = [name for name in own if name not in others and not _LEFT_OUT.search(name)]
    assert counts["projector"] == sum(own[name] for name in rest if not _OTHER.search(name)), rest


@pytest.mark.parametrize("family", sorted(set(TINY) & set(FAMILIES)))
def test_facts_are_those_of_the_adapter(family: str, tmp_path: Path) -> None:
    model = TINY[family].build("eager", 0)
    facts, adapter = facts_of(model, tmp_path), family_of(model)
    assert (facts.num_layers, facts.hidden_size) == (adapter.num_layers, adapter.width)
    assert facts.first_layer == adapter.first_layer == TINY[family].first_layer
    assert facts.tokenwise_projector == (adapter.projector is not None)
    if facts.tokenwise_projector:
        assert facts.projector_in == adapter.vision_width
    assert facts.has_cls == (adapter.cls_attention() is not None)
    assert ("pixels" in facts.offers) <= (adapter.resizable_tower is not None)


def test_every_adapter_has_facts_or_is_known_to_have_none() -> None:
    assert set(ADAPTERS) - set(WITHOUT_FACTS) == set(FAMILIES)
    assert set(ADAPTERS) - {"perception_lm"} == set(TINY)

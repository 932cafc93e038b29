"""Model facts equal what transformers' own config classes say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec.components import Grid
from orchestrator.spec.model_facts import FAMILIES, model_facts

CONFIGS: list[dict[str, Any]] = [
    {},
    {"vision_config": {}, "text_config": {}},
    {"text_config": {"model_type": "mistral"}},
    {"text_config": {"model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}},
    {"text_config": {"model_type": "gemma"}},
    {"text_config": {"model_type": "llama", "num_key_value_heads": 8, "head_dim": 64}},
    {"text_config": {"num_attention_heads": 16}},
    {"vision_config": {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}},
    {"vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 6}, "vision_feature_layer": -1},
    {"vision_feature_layer": [-2, -5], "vision_feature_select_strategy": "full"},
    {"vision_feature_layer": 4},
]


def write_config(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", **config}))
    return str(folder)


@pytest.mark.parametrize("config", CONFIGS, ids=[json.dumps(config)[:60] for config in CONFIGS])
def test_facts_equal_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = write_config(tmp_path, config)
    facts, known = model_facts(folder), AutoConfig.from_pretrained(folder)
    text, vision = known.text_config, known.vision_config
    assert facts is not None
    assert facts.num_layers == text.num_hidden_layers
    assert facts.hidden_size == facts.projector_hidden == text.hidden_size
    assert facts.intermediate_size == text.intermediate_size
    assert facts.num_attention_heads == text.num_attention_heads
    assert facts.num_key_value_heads == text.num_key_value_heads
    assert facts.head_dim == (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    assert facts.vocab_size == text.vocab_size
    assert facts.vision_hidden_size == vision.hidden_size
    assert facts.vision_intermediate_size == vision.intermediate_size
    assert facts.has_cls == (vision.model_type == "clip_vision_model")
    assert facts.vision_tokens == (vision.image_size // vision.patch_size) ** 2 + facts.has_cls
    layers = known.vision_feature_layer
    several = len(layers) if isinstance(layers, list) else 1
    assert facts.projector_in == several * vision.hidden_size
    last = max(layers) if isinstance(layers, list) else layers
    assert facts.vision_layers == (last if last >= 0 else vision.num_hidden_layers + 1 + last)


EMPTY: dict[str, Any] = {}
FAMILY_CONFIGS: list[tuple[str, dict[str, Any]]] = [
    *((model_type, EMPTY) for model_type in sorted(FAMILIES) if model_type != "gemma4"),
    *((model_type, {"text_config": {}, "vision_config": {}}) for model_type in sorted(FAMILIES)),
    ("qwen3_vl", {"vision_config": {"deepstack_visual_indexes": [2, 3]}}),
    ("internvl", {"text_config": {"model_type": "llama", "num_hidden_layers": 5}, "downsample_ratio": 1.0}),
    ("idefics3", {"scale_factor": 4, "vision_config": {"image_size": 384, "patch_size": 16}}),
    ("gemma3", {"mm_tokens_per_image": 64}),
    ("mistral3", {"text_config": {"model_type": "ministral3"}}),
    ("llava_next", {"text_config": {"model_type": "qwen3"}}),
    ("paligemma", {"text_config": {"model_type": "gemma2"}}),
]


@pytest.mark.parametrize(("model_type", "config"), FAMILY_CONFIGS)
def test_facts_of_every_family_equal_transformers(model_type: str, config: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = write_config(tmp_path, {"model_type": model_type, **config})
    facts, known = model_facts(folder), AutoConfig.from_pretrained(folder)
    text, vision = known.get_text_config(), known.vision_config
    text.allow_global_per_layer_attribute_access = True  # of layers that differ the ones of most
    assert facts is not None
    assert facts.num_layers == text.num_hidden_layers
    assert facts.hidden_size == text.hidden_size
    if not facts.decoder_layers and model_type != "lfm2_vl":  # these have another width, below
        assert facts.intermediate_size == text.intermediate_size
    heads = (text.num_attention_heads, text.num_key_value_heads)
    assert (facts.num_attention_heads, facts.num_key_value_heads) == heads
    assert facts.head_dim == (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    assert facts.vocab_size == text.vocab_size
    assert facts.vision_hidden_size == (getattr(vision, "embed_dim", None) or vision.hidden_size)
    if model_type in ("qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe_thinker"):
        assert facts.first_layer == len(vision.deepstack_visual_indexes)
    if config is EMPTY and facts.visual_grid is not None and hasattr(known, "image_seq_length"):
        assert facts.visual_grid.tokens == known.image_seq_length


@pytest.mark.parametrize(
    ("model_type", "config", "grid"),
    [
        ("internvl", {}, (16, 16)),
        ("idefics3", {"scale_factor": 2, "vision_config": {"image_size": 364, "patch_size": 14}}, (13, 13)),
        ("gemma3", {}, (16, 16)),
        ("paligemma", {}, (16, 16)),
        ("video_llava", {}, (16, 16)),
        ("vipllava", {}, (24, 24)),
        ("qwen2_5_vl", {}, None),
        ("llava_next", {}, None),
    ],
)
def test_tokens_of_one_unit(model_type: str, config: dict[str, Any], grid: Any, tmp_path: Path) -> None:
    facts = model_facts(write_config(tmp_path, {"model_type": model_type, **config}))
    assert facts is not None
    assert facts.visual_grid == (None if grid is None else Grid(*grid))


def test_flat_qwen_files_of_older_releases_are_read(tmp_path: Path) -> None:
    flat = {"model_type": "qwen2_vl", "num_hidden_layers": 28, "hidden_size": 1536, "num_attention_heads": 12}
    facts = model_facts(write_config(tmp_path, {**flat, "vision_config": {"model_type": "qwen2_vl", "depth": 30}}))
    assert facts is not None
    assert (facts.num_layers, facts.hidden_size, facts.vision_layers) == (28, 1536, 30)


def test_llava_15_has_576_tokens_of_23_layers(tmp_path: Path) -> None:
    facts = model_facts(write_config(tmp_path, {}))
    assert facts is not None
    assert (facts.visual_grid.height, facts.visual_grid.width) == (24, 24)
    assert (facts.vision_tokens, facts.vision_layers, facts.num_layers) == (577, 23, 32)


def test_the_hub_cache_is_read_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    write_config(repository / "snapshots" / commit, {})
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert model_facts("org/name") is not None
    assert model_facts("org/name") == model_facts("org/name", commit)
    assert model_facts("org/name", "other") is None
    assert model_facts("org/unknown") is None


def test_unknown_types_give_none_and_broken_files_are_reported(tmp_path: Path) -> None:
    assert model_facts(write_config(tmp_path, {"model_type": "novel"})) is None
    assert model_facts(write_config(tmp_path, {"text_config": {"model_type": "novel"}})) is None
    assert model_facts(write_config(tmp_path, {"model_type": "gemma4"})) is None  # it has no tower then
    assert model_facts(write_config(tmp_path, {"model_type": "molmo2", "vit_config": {}})) is None
    assert model_facts(str(tmp_path / "nothing")) is None
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="not a model's config"):
        model_facts(str(tmp_path))
    write_config(tmp_path, {"text_config": {"hidden_size": "wide"}})
    with pytest.raises(ValueError, match="not a llava config"):
        model_facts(str(tmp_path))

"""What a model is, read from its `config.json` without transformers; unknown models give None and are checked later."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from orchestrator.spec.components import Grid

# Defaults of transformers' config classes, which `config.json` may leave out (tested against transformers).
_LLAMA = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "vocab_size": 32000,
}
_TEXT: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8},
    "qwen2": {**_LLAMA, "intermediate_size": 22016, "num_key_value_heads": 32, "vocab_size": 151936},
    "gemma": {
        "num_hidden_layers": 28,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "vocab_size": 256000,
    },
}
_VISION: dict[str, dict[str, Any]] = {
    "clip_vision_model": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "image_size": 224,
        "patch_size": 32,
    },
    "siglip_vision_model": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "image_size": 224,
        "patch_size": 16,
    },
}
# What LlavaConfig takes where the part is left out altogether: CLIP ViT-L/14 at 336 pixels.
_LLAVA_VISION = {
    "model_type": "clip_vision_model",
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a vision-language model.

    Attributes:
        model_type: `model_type` of the config.
        num_layers: Decoder layers of the language model.
        hidden_size: Width of the language model.
        intermediate_size: Width of its MLP.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads.
        head_dim: Width of one head.
        vocab_size: Size of the vocabulary.
        vision_layers: Layers of the vision tower that are used: `vision_feature_layer: -2` uses all but the last.
        vision_hidden_size: Width of the vision tower.
        vision_intermediate_size: Width of its MLP.
        vision_tokens: Tokens inside the vision tower for one image, CLS included.
        projector_in: Width of the features the projector takes.
        projector_hidden: Width of the projector.
        visual_grid: Visual tokens of one image as the language model sees them, before compression.
        has_cls: True where the vision tower has a CLS token.
        gated_mlp: True where the MLP has three matrices (SwiGLU, GeGLU), False for two.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    vision_layers: int
    vision_hidden_size: int
    vision_intermediate_size: int
    vision_tokens: int
    projector_in: int
    projector_hidden: int
    visual_grid: Grid
    has_cls: bool
    gated_mlp: bool


def model_facts(model_name_or_path: str, revision: str | None = None) -> ModelFacts | None:
    """Facts of a model; None where its type is not in the table or its config is not at hand.

    Args:
        model_name_or_path: A folder, or a hub id, which is looked up in the hub's cache without network.
        revision: Branch, tag or commit of a hub id.

    Raises:
        ValueError: the folder's `config.json` cannot be read, or is not a model's.
    """
    path = find_config(model_name_or_path, revision)
    if path is None:
        return None
    stat = path.stat()
    return _facts_of(str(path), stat.st_mtime_ns, stat.st_size)


def find_config(model_name_or_path: str, revision: str | None = None) -> Path | None:
    """The model's `config.json`: in its folder, or in the hub's cache; None where there is none."""
    folder = Path(model_name_or_path)
    if folder.is_dir():
        path = folder / "config.json"
        return path if path.is_file() else None
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    repository = cache / ("models--" + model_name_or_path.replace("/", "--"))
    reference = repository / "refs" / (revision or "main")
    try:
        commit = reference.read_text().strip() if reference.is_file() else revision
        path = repository / "snapshots" / (commit or "-") / "config.json"
        return path if path.is_file() else None
    except OSError:
        return None


@lru_cache(maxsize=64)
def _facts_of(path: str, mtime_ns: int, size: int) -> ModelFacts | None:
    try:
        config = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a model's config: a mapping belongs there")
    if config.get("model_type") != "llava":
        return None
    try:
        return _llava(config)
    except (TypeError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(f"{path} is not a LLaVA config: {error}") from None


def _part(config: Any, known: dict[str, dict[str, Any]], default_type: str) -> tuple[str, dict[str, Any]] | None:
    name = config.get("model_type", default_type)
    return (name, {**known[name], **config}) if name in known else None


def _llava(config: dict[str, Any]) -> ModelFacts | None:
    vision_config = config.get("vision_config")
    vision_part = _part(_LLAVA_VISION if vision_config is None else vision_config, _VISION, "clip_vision_model")
    text_part = _part(config.get("text_config") or {}, _TEXT, "llama")
    if vision_part is None or text_part is None:
        return None
    (vision_type, vision), (_, text) = vision_part, text_part
    has_cls = vision_type == "clip_vision_model"
    side = vision["image_size"] // vision["patch_size"]
    layers = config.get("vision_feature_layer", -2)
    layers = layers if isinstance(layers, list) else [layers]
    # hidden_states holds the embeddings and then each layer's output, so -2 is what all but the last layer give.
    used = max(layer if layer >= 0 else vision["num_hidden_layers"] + 1 + layer for layer in layers)
    # `default` drops the first token, a CLS or not; `full` keeps all.
    keeps_all = config.get("vision_feature_select_strategy", "default") == "full"
    tokens = side * side + has_cls
    seen = tokens if keeps_all else tokens - 1
    heads = text["num_attention_heads"]
    return ModelFacts(
        model_type="llava",
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=text["num_key_value_heads"] or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        vocab_size=text["vocab_size"],
        vision_layers=used,
        vision_hidden_size=vision["hidden_size"],
        vision_intermediate_size=vision["intermediate_size"],
        vision_tokens=tokens,
        projector_in=vision["hidden_size"] * len(layers),
        projector_hidden=text["hidden_size"],
        visual_grid=Grid(side, side) if seen == side * side else Grid(1, seen),
        has_cls=has_cls,
        gated_mlp=True,
    )

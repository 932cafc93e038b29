"""Shrink a transformers config: few narrow layers, the same number of visual tokens, the same vocabulary."""

from __future__ import annotations

from typing import Any

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 32, 48, 4, 2
HEAD_DIM = HIDDEN // HEADS
_AT_MOST = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "intermediate_size_mlp": INTERMEDIATE,
    "share_expert_dim": INTERMEDIATE,
    "hidden_size_per_layer_input": HEAD_DIM,
    "vocab_size_per_layer_input": 1024,
    "moe_intermediate_size": INTERMEDIATE,
    "shared_expert_intermediate_size": INTERMEDIATE,
    "linear_key_head_dim": HEAD_DIM,
    "linear_value_head_dim": HEAD_DIM,
    "linear_num_key_heads": KV_HEADS,
    "linear_num_value_heads": HEADS,
}
# Where a config may leave out how the axes of position ids share a head, what the model then takes.
_SECTIONS: dict[str, dict[str, Any]] = {"ernie4_5_vl_moe_text": {"mrope_section": [22, 22, 20]}}
_AUDIO = {
    "encoder_layers": 1,
    "encoder_attention_heads": HEADS,
    "encoder_ffn_dim": INTERMEDIATE,
    "d_model": HIDDEN,
    "output_dim": HIDDEN,
    "downsample_hidden_size": HIDDEN,
}


def shrunk_config(config: Any, layers: int, tower_layers: int = 0) -> Any:
    """Return a config of the same type with `layers` narrow decoder layers and a small vision tower, of which the model
    uses more than its first `tower_layers`.
    """
    values = config.to_dict()
    values.pop("quantization_config", None)
    parts = {name: values[name] for name in ("text_config", "vision_config") if isinstance(values.get(name), dict)}
    if "text_config" in parts:
        values["text_config"] = _small_text(parts["text_config"], layers)
    if "vision_config" in parts:
        adapter = values.get("adapter_config") or {}  # of Molmo 2
        feature_layers = values.get("vision_feature_layer", adapter.get("vision_feature_layer"))
        values["vision_config"] = _small_tower(parts["vision_config"], feature_layers, tower_layers)
        if adapter:
            small = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "text_hidden_size": HIDDEN}
            heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM}
            values["adapter_config"] = adapter | small | heads
    for name in ("hidden_size", "projection_dim"):  # PaliGemma repeats the widths of its parts
        if name in values:
            values[name] = HIDDEN
    for name in ("alignment_intermediate_size", "projector_hidden_size"):
        if name in values:
            values[name] = INTERMEDIATE
    if isinstance(values.get("audio_config"), dict):
        audio = values["audio_config"]
        values["audio_config"] = audio | {name: size for name, size in _AUDIO.items() if name in audio}
    if isinstance(values.get("qformer_config"), dict):
        _small_q_former(values, layers)
    return type(config).from_dict(values)


def _small_q_former(values: dict[str, Any], layers: int) -> None:
    """Shrink what is between the tower and the decoder of Granite 4 Vision, whose Q-Former has heads of 64."""
    vision = values["vision_config"]
    vision["hidden_size"] = 64
    values["qformer_config"] = values["qformer_config"] | {"intermediate_size": INTERMEDIATE}
    pairs, targets = values.get("deepstack_layer_map") or [], values.get("spatial_target_layers") or []
    entered = sorted({*targets, *(layer for _, layer in pairs)})
    place = {layer: min(number, max(0, layers - 2)) for number, layer in enumerate(entered)}
    values["spatial_target_layers"] = [place[layer] for layer in targets]
    depth = vision["num_hidden_layers"]
    values["deepstack_layer_map"] = [
        [state if -depth <= state < depth else -1, place[layer]] for state, layer in pairs
    ] or None


def _small_text(text: dict[str, Any], layers: int) -> dict[str, Any]:
    small = {**text, "num_hidden_layers": layers, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    small |= {"num_attention_heads": HEADS, "head_dim": HEAD_DIM}
    if "num_key_value_heads" in text:
        grouped = text["num_key_value_heads"] not in (None, text["num_attention_heads"])
        small["num_key_value_heads"] = KV_HEADS if grouped else HEADS
    if "query_pre_attn_scalar" in text:
        small["query_pre_attn_scalar"] = HEAD_DIM
    small |= {name: min(text[name], size) for name, size in _AT_MOST.items() if isinstance(text.get(name), int)}
    small |= _per_layer(text, text.get("num_hidden_layers"), layers)
    if isinstance(text.get("moe_intermediate_size"), list):  # of text and of what is seen (ERNIE)
        small["moe_intermediate_size"] = [min(size, INTERMEDIATE) for size in text["moe_intermediate_size"]]
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(text.get(name), dict):
            small[name] = _small_rope(_SECTIONS.get(str(text.get("model_type")), {}) | text[name])
    if isinstance(text.get("max_window_layers"), int):
        small["max_window_layers"] = min(text["max_window_layers"], layers)
    return small


def _per_layer(values: dict[str, Any], before: Any, layers: int) -> dict[str, Any]:
    """Return what a config says of each of `before` layers, by a list or by numbers of layers, for fewer layers."""
    small: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list) and len(value) == before:
            kinds = all(isinstance(one, str) for one in value)
            small[name] = _pattern(value, layers) if kinds else value[:layers]
    if isinstance(values.get("per_layer_config"), dict):
        own = {int(number): one for number, one in values["per_layer_config"].items()}
        small["per_layer_config"] = {number: one for number, one in own.items() if number < layers}
        if "layer_types" not in small:
            return small
        small["layer_types"][-1] = values["layer_types"][-1]  # Gemma 4 wants it so
        first = [values["layer_types"].index(kind) for kind in small["layer_types"]]
        small["per_layer_config"] = {number: own[like] for number, like in enumerate(first) if like in own}
    return small


def _pattern(kinds: list[str], layers: int) -> list[str]:
    """Return the kinds of the first layers, the last ones replaced so that each kind occurs."""
    found = (kinds * layers)[:layers]
    missing = [kind for kind in dict.fromkeys(kinds) if kind not in found]
    return [*found[: layers - len(missing)], *missing]


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Scale the sections of Qwen-VL's three axes, which share half a head's width, to the small heads."""
    sections = rope.get("mrope_section")
    if not sections:
        return rope
    half = int(HEAD_DIM * (rope.get("partial_rotary_factor") or 1)) // 2
    small = [max(1, half * part // sum(sections)) for part in sections]
    apart = next(
        (place for place, part in enumerate(sections) if sections.count(part) == 1), 0
    )  # heights are as widths
    small[apart] += half - sum(small)
    return {**rope, "mrope_section": small}


def _small_tower(vision: dict[str, Any], feature_layers: Any, used: int) -> dict[str, Any]:
    wanted = feature_layers if isinstance(feature_layers, list) else [feature_layers or -1]
    depth = max(2, *(used - layer if layer < 0 else layer + 1 for layer in wanted))
    before = vision.get("num_hidden_layers") or 0
    small = vision | _per_layer(vision, before, min(before, depth))
    for name in ("num_hidden_layers", "depth"):
        if name in vision:
            small[name] = min(vision[name], depth)
    for name in ("num_attention_heads", "num_heads"):
        if name in vision:
            small[name] = HEADS
    for name in ("hidden_size", "embed_dim", "out_hidden_size", "projection_dim", "text_hidden_size"):
        if name in vision:
            small[name] = HIDDEN
    if "intermediate_size" in vision:
        small["intermediate_size"] = INTERMEDIATE
    if "pixel_shuffle_ratio" in vision:  # Llama 4's own adapter takes patches side by side
        small["intermediate_size"] = HIDDEN * round(1 / vision["pixel_shuffle_ratio"]) ** 2
        small |= dict.fromkeys(("projector_input_dim", "projector_output_dim", "vision_output_dim"), INTERMEDIATE)
    if "num_key_value_heads" in vision:
        small["num_key_value_heads"] = HEADS
    if "head_dim" in vision:
        small["head_dim"] = HEAD_DIM
    if "fullatt_block_indexes" in vision:
        small["fullatt_block_indexes"] = [small["depth"] - 1]
    if "deepstack_visual_indexes" in vision:
        small["deepstack_visual_indexes"] = [0]
    return small

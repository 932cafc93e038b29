"""Decoder layers that are not all alike: experts, linear attention, convolutions, heads, from a model's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class DecoderLayer:
    """A decoder layer of its own kind.

    Attributes:
        weights: Weights of the linear maps that a token passes; of experts, those that compute on it.
        stored: Weights of all linear maps, and of a table of embeddings where the layer has its own.
        attends: It attends to all tokens before (softmax); False: its work grows with the tokens alone.
        recurrent: Operations a token beside the linear maps, where it does not attend.
        heads: Width of all its query heads together; 0 for the model's.
        keys: Weights of the maps to keys and values; 0 for those of the model's sizes.
    """

    weights: int
    stored: int
    attends: bool = True
    recurrent: int = 0
    heads: int = 0
    keys: int = 0


_OF_OTHER_SIZES = ("global_head_dim", "share_expert_dim", "intermediate_size_mlp")
"""Keys of Gemma 4, Step 3.7 and Llama 4, whose layers differ in their heads or MLPs."""


def decoder_layers(text: Config, head_dim: int) -> tuple[DecoderLayer, ...]:
    """Return the layers; empty where all are dense, attend, and are of the config's sizes.

    Args:
        text: The language model's config, with the defaults of its class.
        head_dim: Width of one head.
    """
    number = range(text["num_hidden_layers"])
    kinds = _kinds(text)
    for key, layer_of in zip(_OF_OTHER_SIZES, (_gemma4, _step, _llama4), strict=True):
        if key in text:
            return tuple(layer_of(text, layer, kinds[layer]) for layer in number)
    if not _experts(text) and all(kind in ("full_attention", "sliding_attention") for kind in kinds):
        return ()
    return tuple(_layer(text, head_dim, layer, kinds[layer]) for layer in number)


def inner_size(text: Config) -> int:
    """Return the width of the MLP a token passes: its own, or that of its experts together."""
    if any(key in text for key in _OF_OTHER_SIZES):
        return _dense(text)
    if _experts(text):
        routed = text["num_experts_per_tok"] * text["moe_intermediate_size"]
        return int(routed + _shared(text))
    if text.get("block_auto_adjust_ff_dim"):  # LFM2
        inner = int(text["block_ffn_dim_multiplier"] * int(2 * _dense(text) / 3))
        return -(-inner // text["block_multiple_of"]) * int(text["block_multiple_of"])
    return _dense(text)


def _dense(text: Config) -> int:
    return int(text.get("block_ff_dim") or text["intermediate_size"])


def _experts(text: Config) -> int:
    """Return the experts of a layer; `num_experts` comes last, since the defaults of all types are under it."""
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    return int(next((text[name] for name in names if text.get(name)), 0))


def _shared(text: Config) -> int:
    """Return the width of the experts that every token passes."""
    return int(
        text.get("shared_expert_intermediate_size") or text.get("n_shared_experts", 0) * text["moe_intermediate_size"]
    )


def _kinds(text: Config) -> list[str]:
    """Return each layer's way to mix tokens."""
    if text.get("layer_types"):
        return list(text["layer_types"])
    number = range(text["num_hidden_layers"])
    if "global_head_dim" in text:  # Gemma 4
        return ["sliding_attention" if (layer + 1) % 6 else "full_attention" for layer in number]
    if "linear_num_value_heads" in text:  # Qwen3.5
        every = text.get("full_attention_interval", 4)
        return ["linear_attention" if (layer + 1) % every else "full_attention" for layer in number]
    if text.get("full_attn_idxs") is not None:  # LFM2
        return ["full_attention" if layer in text["full_attn_idxs"] else "conv" for layer in number]
    return ["full_attention"] * len(number)


def _layer(text: Config, head_dim: int, layer: int, kind: str) -> DecoderLayer:
    size, experts = text["hidden_size"], _experts(text)
    mixing, recurrent = _mixing(text, head_dim, kind)
    dense = layer < text.get("first_k_dense_replace", 0) or layer in text.get("mlp_only_layers", ())
    if not experts or dense or (layer + 1) % text.get("decoder_sparse_step", 1):
        inner = 3 * size * (_dense(text) if experts else inner_size(text))
        return DecoderLayer(mixing + inner, mixing + inner, not recurrent, recurrent)
    # The router; and where a shared expert has a gate of its own, its single row.
    router = size * (experts + ("shared_expert_intermediate_size" in text))
    stored = 3 * size * (experts * text["moe_intermediate_size"] + _shared(text))
    return DecoderLayer(
        mixing + router + 3 * size * inner_size(text), mixing + router + stored, not recurrent, recurrent
    )


def _mixing(text: Config, head_dim: int, kind: str) -> tuple[int, int]:
    """Return the weights of a layer's maps before and after tokens are mixed, and its other operations a token."""
    size = text["hidden_size"]
    if kind == "conv":  # two gates and a short convolution over time, channel by channel (LFM2, arXiv 2511.23404)
        return 4 * size * size, 2 * size * text["conv_L_cache"]
    if kind == "linear_attention":
        # Gated delta rule (Yang et al. 2024, arXiv 2412.06464, equation 10): each value head's state of d_k x d_v is
        # read for the key, corrected by an outer product, and read for the query: 2 d_k d_v each. Kernels that work
        # in chunks do more.
        heads, values = text["linear_num_value_heads"], text["linear_value_head_dim"]
        key_size, value_size = text["linear_num_key_heads"] * text["linear_key_head_dim"], heads * values
        convolution = 2 * (2 * key_size + value_size) * text["linear_conv_kernel_dim"]
        recurrence = 6 * heads * text["linear_key_head_dim"] * values
        return size * (2 * key_size + 3 * value_size + 2 * heads), recurrence + convolution
    heads, keys = text["num_attention_heads"] * head_dim, text["num_key_value_heads"] * head_dim
    gates = 1 if "linear_num_value_heads" in text else 0  # Qwen3.5 gates what each head gives
    return size * (2 + gates) * heads + 2 * size * keys, 0


def _attention(size: int, heads: int, keys: int, key_maps: int = 2) -> DecoderLayer:
    """Return the attention of a layer whose query heads are `heads` wide together, its keys `keys`."""
    held = key_maps * size * keys
    return DecoderLayer(2 * size * heads + held, 2 * size * heads + held, heads=heads, keys=held)


def _with(layer: DecoderLayer, passed: int, stored: int | None = None) -> DecoderLayer:
    return replace(layer, weights=layer.weights + passed, stored=layer.stored + (passed if stored is None else stored))


def _own(text: Config, layer: int, name: str) -> int | None:
    """Return a layer's own value, where its config is written by transformers."""
    return (text.get("per_layer_config") or {}).get(str(layer), {}).get(name)


def _gemma4(text: Config, layer: int, kind: str) -> DecoderLayer:
    """Gemma 4: full layers have wider heads, and may take their keys for values; experts stand beside the MLP."""
    size, full = text["hidden_size"], kind == "full_attention"
    as_values = bool(text["attention_k_eq_v"] and full)
    head = _own(text, layer, "head_dim") or (text["global_head_dim"] if full else text["head_dim"])
    others = text.get("num_global_key_value_heads") if as_values else None
    keys = _own(text, layer, "num_key_value_heads") or others or text["num_key_value_heads"]
    shares = layer >= text["num_hidden_layers"] - text["num_kv_shared_layers"]  # reads those of an earlier layer
    found = _attention(size, text["num_attention_heads"] * head, keys * head, 0 if shares else 1 if as_values else 2)
    wide = 2 if shares and text.get("use_double_wide_mlp") else 1
    found = _with(found, 3 * size * text["intermediate_size"] * wide)
    # The gate and the map of each layer's own embedding of a token, its share of the map that makes these, its table.
    own = text["hidden_size_per_layer_input"]
    found = _with(found, 3 * size * own, (3 * size + text["vocab_size_per_layer_input"]) * own)
    if not text["enable_moe_block"]:
        return found
    router, expert = size * text["num_experts"], 3 * size * text["moe_intermediate_size"]
    return _with(found, router + text["top_k_experts"] * expert, router + text["num_experts"] * expert)


def _step(text: Config, layer: int, kind: str) -> DecoderLayer:
    """Step 3.7: sliding layers have more heads, each head a gate; a shared expert beside those a token is sent to."""
    size, heads = text["hidden_size"], text["num_attention_heads"]
    if kind == "sliding_attention":
        other = (text.get("attention_other_setting") or {}).get("num_attention_heads")
        heads = text.get("num_sliding_attention_heads") or other or heads
    found = _attention(size, heads * text["head_dim"], text["num_key_value_heads"] * text["head_dim"])
    found = _with(found, size * heads)
    if not _is_sparse(text, layer):
        return _with(found, 3 * size * text["intermediate_size"])
    experts, expert = text["n_routed_experts"], 3 * size * text["moe_intermediate_size"]
    always = size * experts + 3 * size * text["share_expert_dim"]
    return _with(found, always + text["num_experts_per_tok"] * expert, always + experts * expert)


def _is_sparse(text: Config, layer: int) -> bool:
    if text.get("mlp_layer_types"):
        return bool(text["mlp_layer_types"][layer] == "sparse")
    named = text.get("moe_layers_enum")
    if named is None:
        return layer >= 3
    return layer in {int(each) for each in (named.split(",") if isinstance(named, str) else named) if str(each).strip()}


def _llama4(text: Config, layer: int, kind: str) -> DecoderLayer:
    """Llama 4: some layers have experts and a shared one; transformers sends every token through all of them."""
    size, head = text["hidden_size"], text["head_dim"]
    found = _attention(size, text["num_attention_heads"] * head, text["num_key_value_heads"] * head)
    sparse = text.get("moe_layers")
    every = text["interleave_moe_layer_step"]
    if layer not in sparse if sparse is not None else (layer + 1) % every:
        return _with(found, 3 * size * text["intermediate_size_mlp"])
    return _with(found, size * _experts(text) + (_experts(text) + 1) * 3 * size * text["intermediate_size"])

"""Decoder layers that are not all alike: experts, linear attention, convolutions, from a language model's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class DecoderLayer:
    """A decoder layer of its own kind.

    Attributes:
        weights: Weights of the linear maps that a token passes; of experts, those it is sent to.
        stored: Weights of all linear maps.
        attends: It attends to all tokens before (softmax); False: its work grows with the tokens alone.
        recurrent: Operations a token beside the linear maps, where it does not attend.
    """

    weights: int
    stored: int
    attends: bool = True
    recurrent: int = 0


def decoder_layers(text: Config, head_dim: int) -> tuple[DecoderLayer, ...]:
    """Return the layers; empty where all are dense, attend, and are of the config's sizes.

    Args:
        text: The language model's config, with the defaults of its class.
        head_dim: Width of one head.
    """
    number = range(text["num_hidden_layers"])
    kinds = _kinds(text)
    if not _experts(text) and all(kind in ("full_attention", "sliding_attention") for kind in kinds):
        return ()
    return tuple(_layer(text, head_dim, layer, kinds[layer]) for layer in number)


def inner_size(text: Config) -> int:
    """Return the width of the MLP a token passes: its own, or that of its experts together."""
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

"""Ready-made attention masks of a segment, where the model's own causal one is not enough: blocks that see themselves
both ways, and keys weighed by how many tokens they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import UsageError

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Keys:
    """The keys of one segment; K counts cached tokens, then the N new ones, which are also the queries.

    Attributes:
        hidden_BND: Input of the segment's first layer.
        mask_BK: True where a token is, False at padding.
        config: The language model's config.
        layer_types: Kinds of the segment's layers; empty where the model has one kind only.
        cache: The segment's view of the KV cache, or None.
        first: The segment's first layer.
        blocks_BK: Tokens of one non-negative id see one another both ways; None where the model is causal.
        sizes_BK: How many first tokens each key stands for, where attention logits are biased by it, else None.
    """

    hidden_BND: Tensor
    mask_BK: Tensor
    config: Any
    layer_types: tuple[str, ...] = ()
    cache: Any = None
    first: int = 0
    blocks_BK: Tensor | None = None
    sizes_BK: Tensor | None = None


def ready_masks(keys: Keys, window_cuts_blocks: bool, blocks_in_full: bool = True) -> Any:
    """Return the `attention_mask` of a segment's forward: 4-D masks, by kind of layer where there are several.

    A sliding window counts the tokens that are left (their index in the shortened row), as transformers would on a row
    of just these tokens; position ids do not matter for it.

    Args:
        keys: The segment's keys.
        window_cuts_blocks: A token does not see a token of its block that is farther back than the window.
        blocks_in_full: Blocks hold in layers of full attention too; else these are causal.

    Raises:
        UsageError: the attention implementation takes no such mask, or a kind of layer is not known.
    """
    attention = keys.config._attn_implementation
    if keys.sizes_BK is not None and attention not in ("eager", "sdpa"):
        raise UsageError(
            f"compression: size_bias adds to attention logits, which attn_implementation {attention!r} does not allow; "
            "use eager or sdpa"
        )
    if "flash" in attention:  # knows causal attention only, in the plain model too
        return keys.mask_BK
    if attention not in ("eager", "sdpa", "flex_attention"):
        raise UsageError(f"compression: attn_implementation {attention!r} takes no mask of blocks; use eager or sdpa")
    window = getattr(keys.config, "sliding_window", None)
    kinds = keys.layer_types or ((SLIDING if window else FULL),)
    check_layer_kinds(keys.config, "compression")
    causal = keys if blocks_in_full else replace(keys, blocks_BK=None)
    of_kind = {FULL: (causal, None), SLIDING: (keys, window)}
    masks = {
        kind: _mask(of_kind[kind][0], kinds.index(kind), of_kind[kind][1], window_cuts_blocks, attention)
        for kind in dict.fromkeys(kinds)
    }
    return _ByKind(masks) if keys.layer_types else masks[kinds[0]]


def check_layer_kinds(config: Any, what: str) -> None:
    """Refuse a decoder that has layers of a kind whose masks cannot be made here (linear attention, convolutions).

    Raises:
        UsageError: it has one; the message names it.
    """
    if unknown := sorted(set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}):
        raise UsageError(f"{what}: masks of {', '.join(unknown)} layers cannot be made; known: {FULL}, {SLIDING}")


class _ByKind(dict[str, Any]):
    """Masks by kind of layer; the forward asks for those of layers that do not run in the segment too."""

    def __missing__(self, kind: str) -> None:
        return None


def _mask(keys: Keys, layer: int, window: int | None, window_cuts_blocks: bool, attention: str) -> Any:
    """Return the mask of layers like the segment's layer number `layer`, as the attention implementation wants it."""
    hidden_BND, total = keys.hidden_BND, keys.mask_BK.shape[1]
    (rows, queries), device = hidden_BND.shape[:2], hidden_BND.device
    # A sliding layer's cache keeps the last tokens only.
    count, offset = (total, 0) if keys.cache is None else keys.cache.get_mask_sizes(queries, keys.first + layer)
    sees = _rule(keys, window, window_cuts_blocks)
    if attention == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def shifted(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees(row, query + (total - queries), key + offset)

        return create_block_mask(shifted, rows, None, queries, count, device=str(device))
    row_B = torch.arange(rows, device=device)[:, None, None, None]
    query_N = torch.arange(total - queries, total, device=device)[None, None, :, None]
    key_K = torch.arange(offset, offset + count, device=device)[None, None, None, :]
    sees_B1NK = sees(row_B, query_N, key_K)
    if keys.sizes_BK is None and attention == "sdpa":
        return sees_B1NK
    bias: Tensor = hidden_BND.new_zeros(())
    if keys.sizes_BK is not None:
        bias = keys.sizes_BK[:, None, None, offset : offset + count].clamp(min=1).float().log().to(hidden_BND.dtype)
    return torch.where(sees_B1NK, bias, torch.finfo(hidden_BND.dtype).min)


def _rule(keys: Keys, window: int | None, window_cuts_blocks: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return whether a row's query sees a key, from their indices."""

    def sees(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = key <= query
        inside = key > query - window if window else None
        if inside is not None and not window_cuts_blocks:
            allowed = allowed & inside
        if keys.blocks_BK is not None:
            block = keys.blocks_BK[row, query]
            allowed = allowed | ((block == keys.blocks_BK[row, key]) & (block >= 0))
        if inside is not None and window_cuts_blocks:
            allowed = allowed & inside
        return allowed & keys.mask_BK[row, key]

    return sees

"""The KV cache of a compressed model: layers above a point hold fewer tokens than the layers below it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from orchestrator.compression.protocol import Point
from orchestrator.errors import UsageError

_RECORD = "llavolta_record"
_KINDS: dict[Any, Any] = {}


class SegmentCache(Cache):
    """A view on a cache for the layers of one segment.

    Layers have their absolute numbers. The model sizes its masks by the first layer of each kind, wherever that is; so
    in this view a layer outside the segment is the segment's first of the same kind. A segment without an attention
    layer (linear attention, convolutions) holds no keys; of its tokens only the number recorded of it is known.
    """

    def __init__(self, cache: Cache, first: int, last: int, recorded: int = 0) -> None:
        self._cache, self._first, self._last, self._recorded = cache, first, last, recorded
        self._view: list[Any] = []

    @property
    def layers(self) -> list[Any]:
        """The layers, as far as they exist yet."""
        if len(self._view) == self._last:
            return self._view
        layers = self._cache.layers[: self._last]
        own = layers[self._first :]
        if not own:
            return own
        stand_in = {_kind(layer): layer for layer in reversed(own)}
        self._view = [stand_in.get(_kind(layer), own[0]) for layer in layers[: self._first]] + own
        return self._view

    @property
    def attention_layer(self) -> Any:
        """The segment's first layer that holds keys and values, or None."""
        own = self._cache.layers[self._first : self._last]
        return next((layer for layer in own if isinstance(layer, CacheLayerMixin)), None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the segment's cached tokens."""
        attention = self.attention_layer
        return self._recorded if attention is None else int(attention.get_seq_length())

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the keys of a layer with these queries, and the index of the first."""
        layers = self.layers
        if layer_idx < len(layers) and isinstance(layers[layer_idx], CacheLayerMixin):
            sizes: tuple[int, int] = layers[layer_idx].get_mask_sizes(query_length)
            return sizes
        return self.get_seq_length() + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Write into the complete cache, which may make the layer first."""
        return self._cache.update(key_states, value_states, layer_idx, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_cache"], name)


def _kind(layer: Any) -> Any:
    return type(layer), getattr(layer, "is_sliding", False)


@dataclass
class CacheRecord:
    """What a cache that was filled through compressed layers must remember.

    Attributes:
        points: The points it was filled under; later steps keep to them even after a switch.
        seen_tokens: Original tokens so far.
        masks: Per segment, True where a cached token is real (B x cached tokens).
        shifts: Per segment, how much position ids moved up by renumbering (A x B), or None.
        sizes: Per segment, how many first tokens each cached one stands for (B x cached tokens) where attention is
            biased by it, else None.
        tail: Tokens after the last image; only these can be cropped, since they are the same in every layer.
    """

    points: tuple[Point, ...]
    seen_tokens: int
    masks: list[Tensor]
    shifts: list[Tensor | None]
    sizes: list[Tensor | None]
    tail: int = 0

    def select(self, index_B: Tensor) -> None:
        """Rows follow the cache's rows (beams, repeated prompts)."""
        self.masks = [mask_BK[index_B.to(mask_BK.device)] for mask_BK in self.masks]
        self.sizes = [size if size is None else size[index_B.to(size.device)] for size in self.sizes]
        self.shifts = [shift if shift is None else shift[:, index_B.to(shift.device)] for shift in self.shifts]

    def crop(self, tokens: int) -> None:
        """Forget the last tokens.

        Raises:
            UsageError: they are not all after the last image.
        """
        if tokens > self.tail:
            raise UsageError(
                f"compression: the last {tokens} tokens of a KV cache cannot be taken off, only {self.tail} stand "
                "after the last image; layers hold different numbers of visual tokens"
            )
        self.masks = [mask_BK[:, : mask_BK.shape[1] - tokens] for mask_BK in self.masks]
        self.sizes = [size if size is None else size[:, : size.shape[1] - tokens] for size in self.sizes]
        self.seen_tokens -= tokens
        self.tail -= tokens


def record_of(cache: Any) -> CacheRecord | None:
    """Return the record of a cache; None where it was not filled through compressed layers."""
    return getattr(cache, "__dict__", {}).get(_RECORD) if isinstance(cache, Cache) else None


def remember(cache: Cache, record: CacheRecord) -> None:
    """Give a cache its record; from then on the record follows whatever happens to the cache's rows.

    It is kept on the cache itself, so that a deep copy (a prompt cached once, used often) takes it along. What follows
    are methods of the cache's class: methods bound to the cache and kept on it would hold each batch's keys and values
    until Python looks for circles, which is seldom.
    """
    if _RECORD not in cache.__dict__:
        cache.__class__ = _following(type(cache))
    cache.__dict__[_RECORD] = record


def _following(kind: Any) -> Any:
    """Return the class of a kind of cache that a record follows."""
    if kind not in _KINDS:
        ways = {name: way for name, way in _FOLLOW.items() if hasattr(kind, name)}
        _KINDS[kind] = type(kind.__name__, (kind,), ways)
    return _KINDS[kind]


def _plain(cache: Any) -> Any:
    """Return a cache as its own class acts on it."""
    return super(type(cache), cache)


def _reorder(cache: Any, beam_idx: Tensor) -> None:
    _plain(cache).reorder_cache(beam_idx)
    cache.__dict__[_RECORD].select(beam_idx)


def _select(cache: Any, indices: Tensor) -> None:
    _plain(cache).batch_select_indices(indices)
    cache.__dict__[_RECORD].select(indices)


def _repeat(cache: Any, repeats: int) -> None:
    _plain(cache).batch_repeat_interleave(repeats)
    record = cache.__dict__[_RECORD]
    record.select(torch.arange(len(record.masks[0])).repeat_interleave(repeats))


def _crop(cache: Any, tokens_to_remove: int) -> None:
    if tokens_to_remove > 0:
        raise UsageError(
            "compression: a KV cache is cropped by a negative number of tokens; its layers differ in length"
        )
    cache.__dict__[_RECORD].crop(-tokens_to_remove)
    _plain(cache).crop(tokens_to_remove)


def _length(cache: Any, layer_idx: int | None = None) -> int:
    """Without a layer, what callers outside mean: original tokens so far, by which they slice and number new ones."""
    if layer_idx is None:
        seen: int = cache.__dict__[_RECORD].seen_tokens
        return seen
    return int(_plain(cache).get_seq_length(layer_idx))


def _reset(cache: Any) -> None:
    _plain(cache).reset()
    cache.__dict__.pop(_RECORD, None)
    cache.__class__ = type(cache).__base__


_FOLLOW: dict[str, Callable[..., Any]] = {
    "reorder_cache": _reorder,
    "batch_select_indices": _select,
    "batch_repeat_interleave": _repeat,
    "crop": _crop,
    "reset": _reset,
    "get_seq_length": _length,
}

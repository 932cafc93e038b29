"""The KV cache of a compressed model: layers above a point hold fewer tokens than the layers below it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from orchestrator.compression.protocol import Point


class SegmentCache(Cache):
    """A view on a cache for the layers of one segment.

    The model sizes its mask by the first layers of the cache it is given; here these are the segment's own. Layers
    write with their absolute index, into the whole cache.
    """

    def __init__(self, cache: Cache, first: int, last: int) -> None:
        self._cache, self._first, self._last = cache, first, last

    @property
    def layers(self) -> list[Any]:
        """The segment's layers, as far as they exist yet."""
        return self._cache.layers[self._first : self._last]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Writes into the whole cache; `layer_idx` is absolute."""
        return self._cache.update(key_states, value_states, layer_idx, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_cache"], name)


@dataclass
class CacheRecord:
    """What a cache that was filled through compressed layers must remember.

    Attributes:
        points: The points it was filled under; later steps keep to them even after a switch.
        seen_tokens: Original tokens so far.
        masks: Per segment, True where a cached token is real (B x cached tokens).
        shifts: Per segment, how much position ids moved up by renumbering (A x B), or None.
    """

    points: tuple[Point, ...]
    seen_tokens: int
    masks: list[Tensor]
    shifts: list[Tensor | None]

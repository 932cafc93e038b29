"""A least-recently-used cache bounded by bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Generic, TypeVar

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """A least-recently-used cache; threads may share it.

    Args:
        max_bytes: Maximum size of all values; a larger value is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable) -> Value | None:
        """Return the value, or None."""
        with self._lock:
            entry = self._values.get(key)
            if entry is None:
                return None
            self._values.move_to_end(key)
            return entry[0]

    def put(self, key: Hashable, value: Value, num_bytes: int) -> None:
        """Keep a value of `num_bytes`."""
        if num_bytes > self._max_bytes:
            return
        with self._lock:
            if key in self._values:
                self._bytes -= self._values.pop(key)[1]
            self._values[key] = (value, num_bytes)
            self._bytes += num_bytes
            while self._bytes > self._max_bytes:
                self._bytes -= self._values.popitem(last=False)[1][1]

    def __len__(self) -> int:
        return len(self._values)

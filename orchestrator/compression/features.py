"""Features of images that a model computed before, found again by the content of what it was given."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

_METHODS = ("get_image_features", "get_video_features")
# The tower's own states, layer by layer: many times the features, and read by none but a method that watches the tower.
_STATES = ("last_hidden_state", "hidden_states", "attentions")
_MOST_BYTES = 4 * 2**30
_FREE_SHARE = 1 / 4


class SharedFeatures:
    """What vision tower and projector of a model in evaluation mode gave for the batches they have seen.

    A batch is known by all that the model's own method is given, bit for bit, so what is found is what would be
    computed. The first batches are kept, up to 4 GiB and as long as a quarter of the device's memory is free; of later
    ones nothing is, since evaluations go through the rows in one order.

    Attributes:
        found: Batches that were not computed again.
        made: Batches that were computed.
    """

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self.found = self.made = 0
        self._left = most_bytes
        self._kept: dict[bytes, tuple[Any, tuple[int, ...]]] = {}

    @contextmanager
    def of(self, inner: Any) -> Iterator[None]:
        """Let a model's own code find features here while the block runs.

        Args:
            inner: What holds tower and projector; its methods are hidden by others on the instance, and shown again.
        """
        before = {name: inner.__dict__.get(name) for name in _METHODS}
        for name in _METHODS:
            if hasattr(inner, name):
                inner.__dict__[name] = MethodType(self._finding(name, getattr(inner, name)), inner)
        try:
            yield
        finally:
            for name, method in before.items():
                inner.__dict__.pop(name, None)
                if method is not None:
                    inner.__dict__[name] = method

    def _finding(self, name: str, compute: Any) -> Any:
        @functools.wraps(compute.__func__)  # generate() reads the signature
        def finding(_: Any, *args: Any, **kwargs: Any) -> Any:
            key = _digest(name, args, kwargs)
            known = None if key is None else self._kept.get(key)
            # Whoever changed features in place would have changed them for all.
            if known is not None and known[1] == _versions(known[0]):
                self.found += 1
                return known[0]
            output = compute(*args, **kwargs)
            self.made += 1
            kept = _without_states(output)
            size = sum(tensor.nbytes for tensor in _tensors(kept))
            if key is not None and size and size <= self._left and _has_room(_tensors(kept)[0].device):
                self._left -= size
                self._kept[key] = kept, _versions(kept)
            return output

        return finding


def _digest(name: str, args: Any, kwargs: Mapping[str, Any]) -> bytes | None:
    """Return what tells the arguments of one call from those of another, by content; None where an argument's text may
    leave a part of it out.
    """
    found, whole = blake2b(name.encode(), digest_size=32), True

    def add(value: Any) -> None:
        nonlocal whole
        if isinstance(value, Tensor):
            found.update(f"{tuple(value.shape)} {value.dtype} {value.device}".encode())
            found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
        elif isinstance(value, list | tuple):
            found.update(f"[{len(value)}]".encode())
            for one in value:
                add(one)
        elif isinstance(value, Mapping):
            for key in sorted(value):
                found.update(f"{key}=".encode())
                add(value[key])
        else:
            whole &= value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device)
            found.update(repr(value).encode())

    add(args)
    add(kwargs)
    return found.digest() if whole else None


def _without_states(output: Any) -> Any:
    if not isinstance(output, ModelOutput):
        return output
    states = _STATES if output.get("pooler_output") is not None else _STATES[1:]
    return type(output)(**{name: value for name, value in output.items() if name not in states})


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping | list | tuple):
        each = value.values() if isinstance(value, Mapping) else value
        return [tensor for one in each for tensor in _tensors(one)]
    return []


def _versions(value: Any) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in _tensors(value))


def _has_room(device: torch.device) -> bool:
    """Return whether a quarter of the device's memory is free; on a system that does not say, yes."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free > _FREE_SHARE * total
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = {line.split(":")[0]: int(line.split()[1]) for line in file if line.startswith("Mem")}
    except OSError:
        return True
    return sizes.get("MemAvailable", 1) > _FREE_SHARE * sizes.get("MemTotal", 1)

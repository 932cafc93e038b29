"""Numbers that must be equal, told in words where they are not; and what runs around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def differs(what: str, got: Tensor, expected: Tensor, tolerance: float) -> Iterator[str]:
    """Return the message of a difference beyond `tolerance`, relative where values are larger than 1."""
    one, other = got.detach().float(), expected.detach().float()
    if one.shape != other.shape:
        yield f"{what}: the shape {tuple(one.shape)} instead of {tuple(other.shape)}"
        return
    if not one.numel():
        return
    allowed = tolerance * max(1.0, float(other.abs().max()))
    gap = float((one - other).abs().max())
    if not gap <= allowed:
        values = f": {float(one):.7g} instead of {float(other):.7g}" if one.numel() == 1 else ""
        yield f"{what}{values}: differs by {gap:.1e}, allowed {allowed:.1e}"


def gradient_faults(how: str, got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> Iterator[str]:
    """Return the gradient that differs most, where it differs by more than `tolerance` of the largest one."""
    scale = max((float(one.abs().max()) for one in wanted.values()), default=0.0)
    gaps = {}
    for name in {*got, *wanted}:
        one, other = got.get(name), wanted.get(name)
        if one is None or other is None:
            gaps[name] = max(float(each.abs().max()) for each in (one, other) if each is not None)
        else:
            gaps[name] = float((one - other).abs().max())
    allowed = tolerance * max(1.0, scale)
    worst = max(gaps, key=lambda name: gaps[name], default=None)
    if worst is None or scale < 1e-4:
        yield f"{how}: the gradients are all below {scale:.1e}; the comparison proves nothing"
    elif not gaps[worst] <= allowed:
        count = sum(gap > allowed for gap in gaps.values())
        yield f"{how}: {count} gradients differ, most {worst}, by {gaps[worst]:.1e}, allowed {allowed:.1e}"


@contextmanager
def checkpointed(model: Any, on: bool) -> Iterator[None]:
    """Activation checkpointing of a model within a block."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # transformers < 5.23
    if on:
        getattr(model, f"{name}_checkpointing_enable")()
    try:
        yield
    finally:
        if on:
            getattr(model, f"{name}_checkpointing_disable")()

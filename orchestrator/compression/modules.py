"""The learned modules of a model: their names, their birth from a seed, and which of them points use."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

from orchestrator.compression.families import Family
from orchestrator.compression.protocol import Learns, Point
from orchestrator.errors import UsageError

MODULES_NAME: Final = "llavolta_compressors"


def names_of(points: Sequence[Point]) -> tuple[str, ...]:
    """Names of the learned modules that points use, in the order of their first use."""
    return tuple(dict.fromkeys(point.module_name for point in points if point.module_name is not None))


def create_modules(points: Sequence[Point], family: Family, seed: int) -> nn.ModuleDict:
    """The learned modules of points, with parameters that depend on (seed, name) alone.

    They have the dtype of the decoder and stand on the device of what they act beside. No global random state is
    used or changed.

    Args:
        points: Points of which some learn.
        family: The model's adapter.
        seed: Seed of all modules.
    """
    created = nn.ModuleDict()
    for point in points:
        if point.module_name is None or point.module_name in created:
            continue
        beside: Any = family.projector if point.at_projector else family.language_model
        width = family.vision_width if point.at_projector else family.width
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(_number(seed, point.module_name))
            assert isinstance(point.compressor, Learns) and width is not None
            module: Any = point.compressor.create_module(width)
        module.to(next(beside.parameters()).device, family.language_model.dtype).train(family.model.training)
        # ZeRO-3 gathers it as a whole, in the one call that `acting.call_once` makes of it.
        module._z3_leaf = True
        created[point.module_name] = module
    return created


def check_modules(points: Sequence[Point], modules: nn.ModuleDict | None) -> None:
    """Refuses points whose learned module was not created.

    Raises:
        UsageError: one is missing; `switch` cannot add parameters.
    """
    known = set(modules) if modules is not None else set()
    for point in points:
        if point.module_name is not None and point.module_name not in known:
            raise UsageError(
                f"{point.spec.kind} at {point.place} learns, and its module {point.module_name} does not exist; name "
                "the point in attach(..., modules=[...])"
            )


def _number(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{MODULES_NAME}:{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1

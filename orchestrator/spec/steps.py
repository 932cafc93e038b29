"""How many optimizer steps a phase has, where that is known without reading files."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil
from typing import Any

from orchestrator.errors import LlavoltaError
from orchestrator.spec.base import parse_share
from orchestrator.spec.components import DataSpec
from orchestrator.spec.phase import PhaseSpec


def rows_per_epoch(sets: Sequence[tuple[int, float]]) -> int:
    """Return rows of one epoch of a mixture of (rows, share): whole rows of each share, at least one of each set."""
    return sum(max(1, int(rows * parse_share(share))) for rows, share in sets)


def epoch_steps(rows: int, epochs: float, global_batch_size: int) -> int:
    """Return the optimizer steps of `epochs` passes, rounded up as Hugging Face's Trainer does, so that every row is
    seen.

    Epochs follow each other without a gap; the last batch is filled from the next pass: 665,298 rows in batches of
    128 give 5,198 steps, the number LLaVolta's authors ran.
    """
    return max(1, ceil(rows * Fraction(repr(epochs)) / global_batch_size))


def known_steps(phase: PhaseSpec, data: dict[str, Any] | None) -> int | None:
    """Return the steps of a phase; None where they depend on a file that would have to be read, or on a cost."""
    if phase.match_train_tflops is not None:
        return None
    if phase.max_steps is not None:
        return phase.max_steps
    if phase.num_train_epochs is None or not data:
        return None
    shares = {phase.data: 1.0} if isinstance(phase.data, str) else phase.data
    sets = []
    for name, share in shares.items():
        rows = _free_rows(data.get(name))
        if rows is None:
            return None
        sets.append((rows, share))
    return epoch_steps(rows_per_epoch(sets), phase.num_train_epochs, phase.global_batch_size)


def _free_rows(entry: Any) -> int | None:
    if not isinstance(entry, DataSpec) or (entry.path_fields and getattr(entry, "num_samples", None) is None):
        return None
    try:
        return entry.num_rows()
    except (LlavoltaError, OSError, ValueError):
        return None  # told by the data's own check, which names rows and files

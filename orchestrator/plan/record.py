"""CellRecord: all that is shown and tracked of one cell, rebuilt from the ledger at any time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class CellRecord:
    """One cell as the table and MLflow show it.

    Attributes:
        params: The axes and the headline recipe.
        tags: `cell_id`, `experiment_spec_sha`, hardware, versions, attention.
        history: `(key, value, step, timestamp in ms)`; steps are cumulative over phases.
        summary: Metrics written once at the end (DESIGN section 7).
        artifacts: File name to text, bytes or a file to copy.
    """

    cell_id: str
    cell_name: str
    status: Literal["new", "running", "finished", "failed"]
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    history: tuple[tuple[str, float, int, int], ...] = ()
    summary: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, str | bytes | Path] = field(default_factory=dict)

"""metrics.jsonl: one line per optimizer step, cut back on resume so that no step is told twice."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from orchestrator.plan.io_retry import ABSENT, retry_io
from orchestrator.plan.ledger.files import storage_errors


class MetricsSpool:
    """Appends lines to a file; each is in the file when `append` returns.

    Args:
        path: The file; made where it is not there.
        resume_step: Lines of this step and later ones are cut, and with them a line torn by a crash.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        with storage_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_metrics(path) if line["step"] < resume_step]
            # Aside, then renamed: a writer that lost its lease goes on in a file nobody sees.
            part = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
            self._file = part.open("a", buffering=1, encoding="utf-8")
            self._file.writelines(json.dumps(line) + "\n" for line in kept)
            self._file.flush()
            os.replace(part, path)

    def append(self, line: dict[str, Any]) -> None:
        """Write one step.

        Raises:
            StorageError: the disk is full.
        """
        with storage_errors(self._path.parent):
            self._file.write(json.dumps(line) + "\n")

    def sync(self) -> None:
        """Make the lines outlive a power cut; called before a checkpoint counts on them.

        Raises:
            StorageError: the disk is full.
        """
        with storage_errors(self._path.parent):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file up to the first torn one; empty where there is no file."""
    try:
        found = retry_io(path.read_bytes)
    except ABSENT:
        return []
    lines = []
    for text in found.decode("utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines

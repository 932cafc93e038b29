"""What an MLflow run lacks of a cell's record, or has otherwise; told from what was seen there."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from orchestrator.plan.cell_record import CellRecord
from orchestrator.plan.io_retry import retry_io
from orchestrator.plan.ledger.heartbeat import Process, this_process
from orchestrator.plan.step_history import Point, points_since
from orchestrator.tracking.limits import PARAM_CHARACTERS, TAG_CHARACTERS, accepted_name, accepted_value, shortened
from orchestrator.tracking.seen import CELL_ID, SeenExperiment, SeenRun

ARTIFACTS_DIGEST = "artifacts_sha256"
CHANGED_PARAM = "changed_param."
DRIVER = "storage_driver"
POINTS = "storage_points"
STATUS = {
    "new": "SCHEDULED",
    "running": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "trained": "FINISHED",
}
OPEN = ("RUNNING", "SCHEDULED")
Lives = Callable[[Process, str], bool]  # a driver and the storage it works on
SentPoint = tuple[str, float, int, int]


def has_record(run: SeenRun | None, record: CellRecord) -> bool:
    """Return whether MLflow has a cell's record as it stands: everything but the history's middle is compared."""
    return (
        run is not None
        and run.name == record.cell_name
        and run.status == STATUS[record.status]
        and sent_params(record).keys() <= run.params.keys()
        and all(run.tags.get(key) == text for key, text in sent_tags(run, record).items())
        and not changed_summary(run, record)
        and not was_cut(run)
        and has_artifacts(run, record)
        and next(fresh_points(run, record), None) is None
    )


def has_artifacts(run: SeenRun, record: CellRecord) -> bool:
    """Return whether MLflow has a record's files."""
    contents = file_contents(record.artifacts)
    return not contents or (
        run.tags.get(ARTIFACTS_DIGEST) == files_digest(contents) and not run.lacks_artifacts(contents)
    )


def was_cut(run: SeenRun) -> bool:
    """Return whether a run has fewer points than when its record was whole."""
    noted = run.tags.get(POINTS, "")
    return run.points is not None and noted.isdecimal() and run.points < int(noted)


def abandoned(seen: SeenExperiment, lives: Lives) -> list[SeenRun]:
    """Return the runs that say they are being worked on while their driver is dead."""
    found = []
    for run in seen.runs.values():
        if run.status not in OPEN:
            continue
        try:
            told = json.loads(run.tags.get(DRIVER, ""))
            storage = told.pop("storage")
            driver = Process(**told)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # no driver of ours began it
        if not lives(driver, storage):
            found.append(run)
    return found


def mark(storage: str) -> str:
    """Return this process and the storage it works on, as a tag of the cells it works on."""
    return _mark_of(os.getpid(), storage)


@functools.cache
def _mark_of(_pid: int, storage: str) -> str:
    return json.dumps({**asdict(this_process()), "storage": storage})


def sent_params(record: CellRecord) -> dict[str, str]:
    """Return a record's params as MLflow takes them."""
    return {accepted_name(key): shortened(str(text), PARAM_CHARACTERS) for key, text in record.params.items()}


def sent_tags(run: SeenRun, record: CellRecord) -> dict[str, str]:
    """Return a record's tags as MLflow takes them."""
    tags = {**record.tags, CELL_ID: record.cell_id}
    # A param can be written once; a value that changed since (a default, a label) is noted beside it.
    changed = {key: text for key, text in sent_params(record).items() if run.params.get(key, text) != text}
    tags |= {CHANGED_PARAM + key: text for key, text in changed.items()}
    return {accepted_name(key): shortened(str(text), TAG_CHARACTERS) for key, text in tags.items()}


def changed_summary(run: SeenRun, record: CellRecord) -> dict[str, float]:
    """Return the figures of a record's end that a run has otherwise or not at all."""
    numbers = {accepted_name(key): accepted_value(value) for key, value in record.summary.items()}
    return {n: v for n, v in numbers.items() if v is not None and (n not in run.metrics or run.metrics[n][0] != v)}


def sent_points(points: Iterable[Point]) -> Iterator[SentPoint]:
    """Return the points as MLflow's `Metric` takes them: name, value, timestamp, step."""
    names: dict[str, str] = {}
    for key, value, step, timestamp_ms in points:
        name = names.get(key) or names.setdefault(key, accepted_name(key))
        number = accepted_value(value)
        if number is not None:
            yield name, number, int(timestamp_ms), int(step)


def fresh_points(run: SeenRun, record: CellRecord) -> Iterator[SentPoint]:
    """Point beyond what a run has, in the order of their steps.

    They are looked for from the highest step that it has of any metric of the history. Where a metric falls behind
    there, it begins where that one ends: a batch may have ended within a step.
    """
    known = {name: step for name, (_, step, _) in run.metrics.items()}

    def beyond(first: int) -> Iterator[SentPoint]:
        points = sent_points(points_since(record.history, first))
        return (point for point in points if point[3] > known.get(point[0], -1))

    last = max((step for name, step in known.items() if name.startswith("train/")), default=-1)
    behind = {point[0] for point in islice(beyond(last), 64)}
    return beyond(min((known.get(name, -1) for name in behind), default=last) + 1) if behind else iter(())


def file_contents(artifacts: Mapping[str, str | bytes | Path]) -> dict[str, bytes]:
    """Return the artifacts as bytes, by the names that MLflow takes."""
    return {
        accepted_name(name): content.encode()
        if isinstance(content, str)
        else content
        if isinstance(content, bytes)
        else retry_io(content.read_bytes)
        for name, content in artifacts.items()
    }


def files_digest(contents: Mapping[str, bytes]) -> str:
    """Return the digest of artifacts, names and contents."""
    digest = hashlib.sha256()
    for name in sorted(contents):
        digest.update(f"{name}\0{len(contents[name])}\0".encode() + contents[name])
    return digest.hexdigest()

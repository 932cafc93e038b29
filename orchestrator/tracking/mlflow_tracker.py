"""`CellTracker`: one MLflow run per cell, found by its tag; logging a record again changes nothing."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import TrackingError
from orchestrator.plan.cell_record import CellRecord
from orchestrator.plan.io_retry import retry_io
from orchestrator.plan.ledger.process import Process, this_process
from orchestrator.plan.step_history import Point, points_since
from orchestrator.redaction import redacted
from orchestrator.tracking.mlflow_state import (
    CELL_ID,
    ExperimentState,
    TrackedRun,
    make_database,
    read_state,
    read_state_with_client,
    sqlite_file,
)

T = TypeVar("T")

METRICS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100
TAGS_PER_REQUEST = 100
NAME_CHARACTERS = 250
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000


def accepted_name(name: str) -> str:
    """Return a name with every character that MLflow refuses replaced by `_`, and no part that is a parent folder."""
    clean = re.sub(r"[^A-Za-z0-9_.:/ -]", "_", name)[:NAME_CHARACTERS]
    parts = [part if part.strip(".") else part.replace(".", "_") for part in clean.split("/") if part]
    return "/".join(parts) or "_"


def accepted_value(value: float) -> float | None:
    """Return a finite float, or None: MLflow stores infinity as 1.8e308, and NaN breaks its charts."""
    number = float(value)
    return number if math.isfinite(number) else None


def shortened(text: str, most_characters: int) -> str:
    """Return the text, cut and ended by an ellipsis if it is too long."""
    return text if len(text) <= most_characters else text[: most_characters - 1] + "…"


def chunks(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Return chunks of at most `size` values."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


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
Lives = Callable[[Process, str], bool]
"""Returns whether a driver, which works on a storage, is alive."""
SentPoint = tuple[str, float, int, int]


def has_record(run: TrackedRun | None, record: CellRecord) -> bool:
    """Return whether MLflow has the current record of a cell: all but the middle of its history is compared."""
    return (
        run is not None
        and run.name == record.cell_name
        and run.status == STATUS[record.status]
        and sent_params(record).keys() <= run.params.keys()
        and all(run.tags.get(key) == text for key, text in sent_tags(run, record).items())
        and not changed_summary(run, record)
        and not lost_points(run)
        and has_artifacts(run, record)
        and next(fresh_points(run, record), None) is None
    )


def has_artifacts(run: TrackedRun, record: CellRecord) -> bool:
    """Return whether MLflow has a record's files."""
    contents = file_contents(record.artifacts)
    return not contents or (
        run.tags.get(ARTIFACTS_DIGEST) == files_digest(contents) and not run.lacks_artifacts(contents)
    )


def lost_points(run: TrackedRun) -> bool:
    """Return whether a run has fewer points than when its record was complete."""
    noted = run.tags.get(POINTS, "")
    return run.points is not None and noted.isdecimal() and run.points < int(noted)


def abandoned(seen: ExperimentState, lives: Lives) -> list[TrackedRun]:
    """Return the runs that are marked as running while their driver is dead."""
    found = []
    for run in seen.runs.values():
        if run.status not in OPEN:
            continue
        try:
            fields = json.loads(run.tags.get(DRIVER, ""))
            storage = fields.pop("storage")
            driver = Process(**fields)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # not started by one of our drivers
        if not lives(driver, storage):
            found.append(run)
    return found


def mark(storage: str) -> str:
    """Return this process and its storage, as a tag for the runs of cells it works on."""
    return _mark_of(os.getpid(), storage)


@functools.cache
def _mark_of(_pid: int, storage: str) -> str:
    return json.dumps({**asdict(this_process()), "storage": storage})


def sent_params(record: CellRecord) -> dict[str, str]:
    """Return a record's params in the form that MLflow accepts."""
    return {accepted_name(key): shortened(str(text), PARAM_CHARACTERS) for key, text in record.params.items()}


def sent_tags(run: TrackedRun, record: CellRecord) -> dict[str, str]:
    """Return a record's tags in the form that MLflow accepts."""
    tags = {**record.tags, CELL_ID: record.cell_id}
    # A param can be written once; a value that changed since (a default, a label) becomes a tag.
    changed = {key: text for key, text in sent_params(record).items() if run.params.get(key, text) != text}
    tags |= {CHANGED_PARAM + key: text for key, text in changed.items()}
    return {accepted_name(key): shortened(str(text), TAG_CHARACTERS) for key, text in tags.items()}


def changed_summary(run: TrackedRun, record: CellRecord) -> dict[str, float]:
    """Return the final metrics of a record that a run lacks or has with another value."""
    numbers = {accepted_name(key): accepted_value(value) for key, value in record.summary.items()}
    return {n: v for n, v in numbers.items() if v is not None and (n not in run.metrics or run.metrics[n][0] != v)}


def sent_points(points: Iterable[Point]) -> Iterator[SentPoint]:
    """Return the points in the form of MLflow's `Metric`: name, value, timestamp, step."""
    names: dict[str, str] = {}
    for key, value, step, timestamp_ms in points:
        name = names.get(key) or names.setdefault(key, accepted_name(key))
        number = accepted_value(value)
        if number is not None:
            yield name, number, int(timestamp_ms), int(step)


def fresh_points(run: TrackedRun, record: CellRecord) -> Iterator[SentPoint]:
    """Return the points beyond what a run has, in the order of steps.

    They begin at the highest step that it has of any metric of the history, or where a metric that falls behind there
    ends: a batch may have ended within a step.
    """
    known = {name: step for name, (_, step, _) in run.metrics.items()}

    def beyond(first: int) -> Iterator[SentPoint]:
        points = sent_points(points_since(record.history, first))
        return (point for point in points if point[3] > known.get(point[0], -1))

    last = max((step for name, step in known.items() if name.startswith("train/")), default=-1)
    behind = {point[0] for point in islice(beyond(last), 64)}
    return beyond(min((known.get(name, -1) for name in behind), default=last) + 1) if behind else iter(())


def file_contents(artifacts: Mapping[str, str | bytes | Path]) -> dict[str, bytes]:
    """Return the artifacts as bytes, by the names that MLflow accepts."""
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


SQLITE_LOCK_SECONDS = 10
REFRESH_SECONDS = 30.0

# A server that is down is noticed in seconds instead of four minutes; no telemetry, no printed addresses.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# Opens the experiment in the dashboard's view for model training, not the one for chat applications.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


class CellTracker:
    """Writes cells to one MLflow experiment through a client of its own; MLflow's global state is never touched.

    The state of all runs is read from MLflow at the start and every half minute, so that a run, an experiment or a file
    that was deleted there is written again.

    Args:
        tracking_uri: `sqlite:////absolute/path.db` (artifacts then lie beside it) or a server's address.
        experiment_name: Created if missing, restored if deleted.
        alone: Entered while runs are created; lets one driver in at a time.
        lives: Returns whether another driver, whose mark a run bears, is still alive.
        storage: URL of this driver's storage, part of its mark.

    Attributes:
        notes: Messages for the user about the experiment in MLflow.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment_name: str,
        alone: Callable[[], AbstractContextManager[object]] = nullcontext,
        lives: Lives = lambda process, storage: not process.is_gone(),
        storage: str = "",
    ) -> None:
        self._uri = tracking_uri
        self._experiment_name = experiment_name
        self._alone, self._lives, self._mark = alone, lives, mark(storage)
        self._connection: Any = None
        self._state: ExperimentState | None = None
        self._refreshed = 0.0
        self._running: set[str] = set()
        self.notes: list[str] = []

    def log(self, record: CellRecord) -> str:
        """Update the run of a cell and return its id.

        Points of the history are sent in the order of steps, and only those beyond what the run has: a record may be
        logged again at any time, in parts or completely, by this process or another.

        Raises:
            TrackingError: the server is down, refuses, or its database stays locked; log the record again later.
        """
        with self._as_tracking_error():
            self._refresh(now=True)
        while not self.log_some(record, points=1_000_000):
            pass
        return self._known().runs[record.cell_id].run_id

    def open_runs(self, records: Sequence[CellRecord]) -> None:
        """Create the runs of cells that have none, in one go.

        Raises:
            TrackingError: the server is down, refuses, or its database stays locked.
        """
        with self._as_tracking_error():
            self._refresh()
            self._make_runs(records)

    def log_some(self, record: CellRecord, points: int) -> bool:
        """Update the run of a cell, with at most about `points` points of its history.

        Returns:
            Whether MLflow has the complete record now; otherwise log it again.

        Raises:
            TrackingError: the server is down, refuses, or its database stays locked; log the record again later.
        """
        with self._as_tracking_error():
            self._refresh()
            self._make_runs([record])
            try:
                return self._log_one(self._known().runs[record.cell_id], record, points)
            except Exception:
                self._state = None  # the run may have been deleted: read the state again before the next attempt
                raise

    def close(self) -> None:
        """Mark runs that are still RUNNING as KILLED, since this driver no longer works on them.

        Raises:
            TrackingError: the server is down.
        """
        with self._as_tracking_error():
            if self._running:
                self._refresh(now=True)
                for run in self._known().runs.values():
                    # A run that another driver works on now bears that driver's mark.
                    if run.run_id in self._running and run.status in OPEN and run.tags.get(DRIVER) == self._mark:
                        self._end(run, "KILLED")
            self._running.clear()

    def _client(self) -> Any:
        if self._connection is None:
            for name, value in _ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            from mlflow import MlflowClient

            # The first use of a database migrates it and logs every step; errors are reported by TrackingError.
            logging.getLogger("alembic").setLevel(logging.WARNING)
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
            uri = self._uri
            if (file := sqlite_file(uri)) is not None:
                make_database(file)
                uri += ("&" if "?" in uri else "?") + f"timeout={SQLITE_LOCK_SECONDS}"
            self._connection = MlflowClient(uri)
        return self._connection

    def _refresh(self, *, now: bool = False) -> None:
        """Read the experiment's state from MLflow, if the last reading is old."""
        if self._state is not None and not now and time.monotonic() - self._refreshed < REFRESH_SECONDS:
            return
        before, self._state = self._state, None
        if before is None:
            self._client()  # creates the file's tables, or fails if it cannot be used
        # Points are counted once; from then on what was sent is counted here.
        seen = read_state(self._uri, self._experiment_name, count=before is None)
        if seen is None:
            seen = read_state_with_client(self._client(), self._experiment_name)
        if seen.is_deleted:
            self._client().restore_experiment(seen.experiment_id)
            self.notes.append(
                f"the MLflow experiment {self._experiment_name} had been deleted; it was restored, since this run logs "
                "to it (set tracking.experiment_name to use another one)"
            )
            seen = read_state_with_client(self._client(), self._experiment_name)
        if before is not None:
            for cell, run in seen.runs.items():
                if cell in before.runs and before.runs[cell].run_id == run.run_id:
                    run.points = before.runs[cell].points
        self._state, self._refreshed = seen, time.monotonic()
        self._end_abandoned()

    def _known(self) -> ExperimentState:
        assert self._state is not None
        return self._state

    def _experiment(self) -> str | None:
        self._refresh()
        return self._known().experiment_id

    def _end_abandoned(self) -> None:
        """Mark runs KILLED whose driver is dead; another that works on the cell will set them running again."""
        for run in abandoned(self._known(), self._lives):
            if run.run_id not in self._running:
                self._end(run, "KILLED")

    def _make_runs(self, records: Sequence[CellRecord]) -> None:
        if all(record.cell_id in self._known().runs for record in records):
            return
        with self._alone():
            self._refresh(now=True)  # another driver may have just created them
            seen = self._known()
            if seen.experiment_id is None:
                file = sqlite_file(self._uri)
                # Never ./mlruns in the current folder.
                place = None if file is None else (file.parent / "mlflow_artifacts").absolute().as_uri()
                seen.experiment_id = self._client().create_experiment(
                    self._experiment_name, artifact_location=place, tags=_EXPERIMENT_TAGS
                )
            for record in records:
                if record.cell_id not in seen.runs:
                    seen.add(self._create_run(seen.experiment_id, record))

    def _create_run(self, experiment_id: str | None, record: CellRecord) -> TrackedRun:
        start_ms = next((timestamp_ms for *_, timestamp_ms in record.history), None)
        run = self._client().create_run(
            experiment_id,
            start_time=start_ms,
            tags={CELL_ID: record.cell_id, DRIVER: self._mark},
            run_name=record.cell_name,
        )
        info = run.info
        return TrackedRun(
            info.run_id, info.run_name, info.status, info.start_time, info.artifact_uri,
            tags=dict(run.data.tags), points=0,
        )  # fmt: skip

    def _log_one(self, run: TrackedRun, record: CellRecord, points: int) -> bool:
        self._set_running(run, record)
        self._log_params_and_tags(run, record)
        if not self._log_history(run, record, points):
            return False
        self._log_summary(run, record)
        self._log_artifacts(run, record)
        if STATUS[record.status] not in OPEN and run.points is not None and run.tags.get(POINTS) != str(run.points):
            self._send(run, tags={POINTS: str(run.points)})
        self._set_status(run, record)
        return True

    def _send(
        self, run: TrackedRun, metrics: Any = (), params: Any = (), tags: Mapping[str, str] | None = None
    ) -> None:
        """Send one request, and note its content as part of MLflow's state."""
        from mlflow.entities import Metric, Param, RunTag

        tags = tags or {}
        self._client().log_batch(
            run.run_id,
            metrics=[Metric(*metric) for metric in metrics],
            params=[Param(key, text) for key, text in params],
            tags=[RunTag(key, text) for key, text in tags.items()],
        )
        run.params |= dict(params)
        run.tags |= tags
        for name, value, timestamp_ms, step in metrics:
            if step >= run.metrics.get(name, (0.0, -1, 0))[1]:
                run.metrics[name] = (value, step, timestamp_ms)
        if run.points is not None:
            run.points += len(metrics)

    def _set_running(self, run: TrackedRun, record: CellRecord) -> None:
        if run.name != record.cell_name:
            self._client().update_run(run.run_id, name=record.cell_name)
            run.name = record.cell_name
        if record.status not in ("running", "new"):
            return
        if run.tags.get(DRIVER) != self._mark:
            self._send(run, tags={DRIVER: self._mark})
        if run.status != STATUS[record.status]:
            self._client().update_run(run.run_id, status=STATUS[record.status])
            run.status = STATUS[record.status]
        self._running.add(run.run_id)

    def _log_params_and_tags(self, run: TrackedRun, record: CellRecord) -> None:
        params, tags = sent_params(record), sent_tags(run, record)
        new_params = [(key, text) for key, text in params.items() if key not in run.params]
        new_tags = [(key, text) for key, text in tags.items() if run.tags.get(key) != text]
        for some_params in chunks(new_params, PARAMS_PER_REQUEST):
            self._send(run, params=some_params)
        for some_tags in chunks(new_tags, TAGS_PER_REQUEST):
            self._send(run, tags=dict(some_tags))

    def _log_history(self, run: TrackedRun, record: CellRecord, most: int) -> bool:
        """Send points that the run lacks; return whether it has all of them then."""
        if lost_points(run):
            fresh, most = self._missing_points(run, record), sys.maxsize
        else:
            fresh = fresh_points(run, record)
        # In the order of steps, so that after every batch the run's last step tells what it has.
        sent = 0
        while sent < most and (batch := list(islice(fresh, METRICS_PER_REQUEST))):
            self._send(run, batch)
            sent += len(batch)
        return sent < most or next(fresh, None) is None

    def _missing_points(self, run: TrackedRun, record: CellRecord) -> Iterator[SentPoint]:
        """Return points that were deleted from a run's history; this alone reads complete histories."""
        known: dict[str, set[int]] = {}
        missing = []
        for name, value, timestamp_ms, step in sent_points(record.history):
            if name not in known:
                known[name] = {point.step for point in self._client().get_metric_history(run.run_id, name)}
            if step not in known[name]:
                missing.append((name, value, timestamp_ms, step))
        run.tags.pop(POINTS, None)  # once: if there are still fewer, those were not points of the history
        return iter(missing)

    def _log_summary(self, run: TrackedRun, record: CellRecord) -> None:
        changed = changed_summary(run, record)
        if not changed:
            return
        now_ms = int(time.time() * 1000)
        points = []
        for name, value in changed.items():
            # MLflow shows the value of the highest step: a value that somebody wrote later is overwritten at its step.
            step = max(record.last_step, run.metrics.get(name, (0.0, 0, 0))[1])
            points.append((name, value, now_ms, step))
        for batch in chunks(points, METRICS_PER_REQUEST):
            self._send(run, batch)

    def _log_artifacts(self, run: TrackedRun, record: CellRecord) -> None:
        if not record.artifacts or has_artifacts(run, record):
            return
        contents = file_contents(record.artifacts)
        with tempfile.TemporaryDirectory(prefix="llavolta-artifacts-") as folder:
            for name, content in contents.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self._client().log_artifacts(run.run_id, folder)
        self._send(run, tags={ARTIFACTS_DIGEST: files_digest(contents)})

    def _set_status(self, run: TrackedRun, record: CellRecord) -> None:
        status = STATUS[record.status]
        if status in OPEN:
            return
        self._running.discard(run.run_id)
        if run.status != status:
            self._end(run, status)

    def _end(self, run: TrackedRun, status: str) -> None:
        trained = [timestamp_ms for name, (_, _, timestamp_ms) in run.metrics.items() if name.startswith("train/")]
        self._client().set_terminated(run.run_id, status, end_time=max(trained, default=None))
        run.status = status

    @contextmanager
    def _as_tracking_error(self) -> Iterator[None]:
        """Raise whatever MLflow, its database or the network raise as a one-line TrackingError."""
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:
            reason = next(iter(redacted(str(error)).strip().splitlines()), type(error).__name__)
            raise TrackingError(f"MLflow at {self._uri} did not accept the record: {shortened(reason, 300)}") from error

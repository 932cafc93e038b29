"""CellTracker: cells as MLflow runs, one run a cell, found by its tag; sending a record again changes nothing."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError, TrackingError
from orchestrator.plan.cell_record import CellRecord
from orchestrator.plan.identity import digest
from orchestrator.plan.io_retry import retry_io, stat_or_none
from orchestrator.plan.ledger.leases import Leases
from orchestrator.plan.ledger.store import Store
from orchestrator.redaction import redacted
from orchestrator.tracking.mlflow_state import (
    ARTIFACTS_DIGEST,
    CELL_ID,
    DRIVER,
    METRICS_PER_REQUEST,
    OPEN,
    PARAMS_PER_REQUEST,
    POINTS,
    STATUS,
    TAGS_PER_REQUEST,
    Lives,
    SeenExperiment,
    SeenRun,
    SentPoint,
    abandoned,
    changed_summary,
    chunks,
    client_look,
    file_contents,
    files_digest,
    fresh_points,
    has_artifacts,
    mark,
    quick_look,
    sent_params,
    sent_points,
    sent_tags,
    shortened,
    sqlite_file,
    was_cut,
)  # fmt: skip


def make_database(path: Path) -> None:
    """Make an sqlite file with MLflow's tables where there is none yet.

    MLflow makes its tables one after the other: killed in between, or met by a second process that does the same, it
    leaves a file that neither it nor `mlflow server` opens again. So they are made aside, and linked into place.

    Args:
        path: The file; one that exists is left as it is.

    Raises:
        Exception: of many kinds, MLflow's too: the disk is full, or the folder cannot be written.
    """
    retry_io(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    if stat_or_none(path) is not None:
        return
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=path.parent) as folder:
        made, whole = Path(folder) / "made.db", Path(folder) / "whole.db"
        MlflowClient(f"sqlite:///{made}")
        # A copy: MLflow keeps the first file open, and its locks must not be those of the second.
        shutil.copyfile(made, whole)
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was quicker
            os.link(whole, path)


WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.2


@contextlib.contextmanager
def one_at_a_time(store: Store, experiment_name: str) -> Iterator[None]:
    """Hold a short lease on an experiment: two drivers that find no run of a cell would both make one.

    Args:
        store: Where the lease lies.
        experiment_name: What it is called in MLflow.

    Raises:
        TrackingError: the lease cannot be had, or another driver holds it for too long.
    """
    name = f"track-{digest(experiment_name)}"
    leases = Leases(store, f"tracker-{uuid.uuid4().hex[:12]}")
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while leases.acquire(name) is None:
            if time.monotonic() > deadline:
                raise TrackingError(f"another run is recording {experiment_name}; run again to send what it lacks")
            time.sleep(_POLL_SECONDS)
        try:
            yield
        finally:
            leases.forget(name)
    except StorageError as error:
        raise TrackingError(str(error)) from error
    finally:
        with contextlib.suppress(StorageError):  # it dies with this process
            leases.close()


SQLITE_LOCK_SECONDS = 10
LOOK_SECONDS = 30.0

# A server that is down is noticed in seconds instead of four minutes; nothing is sent home or printed.
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

    MLflow is asked for all cells at once, at the beginning and every half minute, and nothing is taken for sent that
    it does not have: a run, an experiment or a file that was deleted there is filled again.

    Args:
        tracking_uri: `sqlite:////absolute/path.db` (artifacts then lie beside it) or a server's address.
        experiment_name: Made where it is missing, restored where it was deleted.
        alone: Held while runs are made, by one driver at a time: two that find no run of a cell would both make one.
        lives: Whether another driver, which says that it works on a cell, still lives.
        storage: Where this driver works, for others to know.

    Attributes:
        notes: What the user should know of the experiment over there.
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
        self._seen: SeenExperiment | None = None
        self._looked = 0.0
        self._running: set[str] = set()
        self.notes: list[str] = []

    def log(self, record: CellRecord) -> str:
        """Bring the run of a cell up to date and return its id.

        Points of the history are sent in the order of their steps, and only those beyond what the run has: the
        record may be sent again at any time, in parts or whole, by this process or another.

        Raises:
            TrackingError: the server is down, refuses, or its database stays locked; send the record again later.
        """
        with self._told_plainly():
            self._look(now=True)
        while not self.log_some(record, points=1_000_000):
            pass
        return self._known().runs[record.cell_id].run_id

    def open_runs(self, records: Sequence[CellRecord]) -> None:
        """Make the runs of cells that have none, all at once.

        Raises:
            TrackingError: the server is down, refuses, or its database stays locked.
        """
        with self._told_plainly():
            self._look()
            self._make_runs(records)

    def log_some(self, record: CellRecord, points: int) -> bool:
        """Bring the run of a cell up to date, with at most about so many points of its history.

        Returns:
            True where MLflow has the whole record now; else the record is to be sent again.

        Raises:
            TrackingError: the server is down, refuses, or its database stays locked; send the record again later.
        """
        with self._told_plainly():
            self._look()
            self._make_runs([record])
            try:
                return self._log_one(self._known().runs[record.cell_id], record, points)
            except Exception:
                self._seen = None  # the run may have been deleted: look again before the next attempt
                raise

    def close(self) -> None:
        """End the session: a run that still says RUNNING is marked KILLED, since nobody works on it any more.

        Raises:
            TrackingError: the server is down.
        """
        with self._told_plainly():
            if self._running:
                self._look(now=True)
                for run in self._known().runs.values():
                    # Another driver that works on the cell has put its own mark there.
                    if run.run_id in self._running and run.status in OPEN and run.tags.get(DRIVER) == self._mark:
                        self._end(run, "KILLED")
            self._running.clear()

    # Inside ----------------------------------------------------------------------------------------------------

    def _client(self) -> Any:
        if self._connection is None:
            for name, value in _ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            from mlflow import MlflowClient

            # The first use of a database migrates it and says so, line by line; what fails is told by us.
            logging.getLogger("alembic").setLevel(logging.WARNING)
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
            uri = self._uri
            if (file := sqlite_file(uri)) is not None:
                make_database(file)
                uri += ("&" if "?" in uri else "?") + f"timeout={SQLITE_LOCK_SECONDS}"
            self._connection = MlflowClient(uri)
        return self._connection

    def _look(self, *, now: bool = False) -> None:
        """Ask MLflow what it has, if the last answer is old."""
        if self._seen is not None and not now and time.monotonic() - self._looked < LOOK_SECONDS:
            return
        before, self._seen = self._seen, None
        if before is None:
            self._client()  # makes the file's tables, or finds that it cannot be used
        # Points are counted once; from then on it is known what was sent.
        seen = quick_look(self._uri, self._experiment_name, count=before is None)
        if seen is None:
            seen = client_look(self._client(), self._experiment_name)
        if seen.is_deleted:
            self._client().restore_experiment(seen.experiment_id)
            self.notes.append(
                f"MLflow's experiment {self._experiment_name} was deleted there; it is restored, since this run "
                "records into it (tracking.experiment_name names another one)"
            )
            seen = client_look(self._client(), self._experiment_name)
        if before is not None:
            for cell, run in seen.runs.items():
                if cell in before.runs and before.runs[cell].run_id == run.run_id:
                    run.points = before.runs[cell].points
        self._seen, self._looked = seen, time.monotonic()
        self._end_abandoned()

    def _known(self) -> SeenExperiment:
        assert self._seen is not None
        return self._seen

    def _experiment(self) -> str | None:
        self._look()
        return self._known().experiment_id

    def _end_abandoned(self) -> None:
        """Mark runs KILLED whose driver is dead; who works on such a cell now says so with its next record."""
        for run in abandoned(self._known(), self._lives):
            if run.run_id not in self._running:
                self._end(run, "KILLED")

    def _make_runs(self, records: Sequence[CellRecord]) -> None:
        if all(record.cell_id in self._known().runs for record in records):
            return
        with self._alone():
            self._look(now=True)  # another driver may have made them a moment ago
            seen = self._known()
            if seen.experiment_id is None:
                file = sqlite_file(self._uri)
                # Never ./mlruns in whatever folder the command was given in.
                place = None if file is None else (file.parent / "mlflow_artifacts").absolute().as_uri()
                seen.experiment_id = self._client().create_experiment(
                    self._experiment_name, artifact_location=place, tags=_EXPERIMENT_TAGS
                )
            for record in records:
                if record.cell_id not in seen.runs:
                    seen.add(self._create_run(seen.experiment_id, record))

    def _create_run(self, experiment_id: str | None, record: CellRecord) -> SeenRun:
        start_ms = next((timestamp_ms for *_, timestamp_ms in record.history), None)
        run = self._client().create_run(
            experiment_id,
            start_time=start_ms,
            tags={CELL_ID: record.cell_id, DRIVER: self._mark},
            run_name=record.cell_name,
        )
        info = run.info
        return SeenRun(
            info.run_id, info.run_name, info.status, info.start_time, info.artifact_uri,
            tags=dict(run.data.tags), points=0,
        )  # fmt: skip

    def _log_one(self, run: SeenRun, record: CellRecord, points: int) -> bool:
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

    def _send(self, run: SeenRun, metrics: Any = (), params: Any = (), tags: Mapping[str, str] | None = None) -> None:
        """Return one request; what it brought is noted as what MLflow has."""
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

    def _set_running(self, run: SeenRun, record: CellRecord) -> None:
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

    def _log_params_and_tags(self, run: SeenRun, record: CellRecord) -> None:
        params, tags = sent_params(record), sent_tags(run, record)
        new_params = [(key, text) for key, text in params.items() if key not in run.params]
        new_tags = [(key, text) for key, text in tags.items() if run.tags.get(key) != text]
        for some_params in chunks(new_params, PARAMS_PER_REQUEST):
            self._send(run, params=some_params)
        for some_tags in chunks(new_tags, TAGS_PER_REQUEST):
            self._send(run, tags=dict(some_tags))

    def _log_history(self, run: SeenRun, record: CellRecord, most: int) -> bool:
        """Send points of the steps that the run lacks; True where it has all of them then."""
        if was_cut(run):
            fresh, most = self._holes(run, record), sys.maxsize
        else:
            fresh = fresh_points(run, record)
        # In the order of steps, so that "the highest step it has" is true after every batch.
        sent = 0
        while sent < most and (batch := list(islice(fresh, METRICS_PER_REQUEST))):
            self._send(run, batch)
            sent += len(batch)
        return sent < most or next(fresh, None) is None

    def _holes(self, run: SeenRun, record: CellRecord) -> Iterator[SentPoint]:
        """Return points that are gone from a run's history; whole histories are asked for, which only this needs."""
        known: dict[str, set[int]] = {}
        missing = []
        for name, value, timestamp_ms, step in sent_points(record.history):
            if name not in known:
                known[name] = {point.step for point in self._client().get_metric_history(run.run_id, name)}
            if step not in known[name]:
                missing.append((name, value, timestamp_ms, step))
        run.tags.pop(POINTS, None)  # once: what is still fewer then was no point of the history
        return iter(missing)

    def _log_summary(self, run: SeenRun, record: CellRecord) -> None:
        changed = changed_summary(run, record)
        if not changed:
            return
        now_ms = int(time.time() * 1000)
        points = []
        for name, value in changed.items():
            # MLflow shows the value of the highest step: one that somebody wrote later is written over there.
            step = max(record.last_step, run.metrics.get(name, (0.0, 0, 0))[1])
            points.append((name, value, now_ms, step))
        for batch in chunks(points, METRICS_PER_REQUEST):
            self._send(run, batch)

    def _log_artifacts(self, run: SeenRun, record: CellRecord) -> None:
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

    def _set_status(self, run: SeenRun, record: CellRecord) -> None:
        status = STATUS[record.status]
        if status in OPEN:
            return
        self._running.discard(run.run_id)
        if run.status != status:
            self._end(run, status)

    def _end(self, run: SeenRun, status: str) -> None:
        trained = [timestamp_ms for name, (_, _, timestamp_ms) in run.metrics.items() if name.startswith("train/")]
        self._client().set_terminated(run.run_id, status, end_time=max(trained, default=None))
        run.status = status

    @contextmanager
    def _told_plainly(self) -> Iterator[None]:
        """Turn whatever MLflow, its database or the network raise into one sentence."""
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:
            reason = next(iter(redacted(str(error)).strip().splitlines()), type(error).__name__)
            raise TrackingError(f"MLflow at {self._uri} did not take the record: {shortened(reason, 300)}") from error

"""Cells as MLflow runs: `CellTracker` writes records; logging one again changes nothing."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import TrackingError, first_line
from orchestrator.plan.cell_record import CELL_ID, CellRecord, KeptState
from orchestrator.plan.ledger.process import this_process
from orchestrator.redaction import redacted
from orchestrator.tracking.mlflow_state import (
    ALONG_DIGEST,
    ARTIFACTS_DIGEST,
    DATA_DIGEST,
    DRIVER,
    MODEL,
    NAME_CHARACTERS,
    NO_MODELS,
    OPEN,
    POINTS,
    STATUS,
    ExperimentState,
    Lives,
    SentPoint,
    TrackedRun,
    abandoned,
    accepted_name,
    along_digest,
    changed_summary,
    data_digest,
    end_of,
    file_contents,
    files_digest,
    fresh_points,
    has_along,
    has_artifacts,
    has_data,
    has_model,
    lost_points,
    make_database,
    model_of,
    read_state,
    read_state_with_client,
    sent_params,
    sent_points,
    sent_tags,
    shortened,
    sqlite_file,
    with_own_note,
)
from orchestrator.tracking.protocol import Recorder

T = TypeVar("T")

METRICS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100
TAGS_PER_REQUEST = 100
SQLITE_LOCK_SECONDS = 10
SOURCE_CHARACTERS = 65_000
REFRESH_SECONDS = 30.0

# A server that is down is noticed in seconds instead of four minutes; no telemetry, no printed addresses.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# Two drivers that write the same at one moment: MLflow reads what is there, then inserts, and its database refuses the
# second insert. Asked again, MLflow finds it there.
_WRITTEN_TWICE = re.compile("IntegrityError|UniqueViolation|Duplicate entry")
# Opens the experiment in the dashboard's view for model training, not the one for chat applications.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


class CellTracker(Recorder):
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
        self._alone, self._lives = alone, lives
        self._mark = json.dumps({**asdict(this_process()), "storage": storage})
        self._connection: Any = None
        self._state: ExperimentState | None = None
        self._refreshed = 0.0
        self._running: set[str] = set()
        self._created: set[str] = set()
        self.notes: list[str] = []

    def open_runs(self, records: Sequence[CellRecord]) -> None:
        """Create the runs of cells that have none, in one go.

        Raises:
            TrackingError: the server is down, refuses, or its database stays locked.
        """
        with self._as_tracking_error():
            self._refresh()
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

    def log_some(self, record: CellRecord, points: int) -> bool:
        """Update the run of a cell, with at most about `points` points of its history.

        They are sent in the order of steps, and only those beyond what the run has: a record may be logged again at any
        time, in parts or completely, by this process or another.

        Returns:
            Whether MLflow has the complete record now; otherwise log it again.

        Raises:
            TrackingError: the server is down, refuses, or its database stays locked; log the record again later.
        """
        self.open_runs([record])
        with self._as_tracking_error():
            try:
                return self._log_one(self._known().runs[record.cell_id], record, points)
            except Exception:
                self._state = None  # the run may have been deleted: read the state again before the next attempt
                raise

    def describe(self, tags: Mapping[str, str]) -> None:
        """Write what the experiment as a whole has, such as its saved views; tags that it has are left alone.

        Raises:
            TrackingError: the server is down, refuses, or its database stays locked.
        """
        with self._as_tracking_error():
            self._refresh()
            seen = self._known()
            wanted = with_own_note(tags, seen.tags) if seen.experiment_id is not None else {}
            for key, text in wanted.items():
                if seen.tags.get(key) != text:
                    self._client().set_experiment_tag(seen.experiment_id, key, text)
                    seen.tags[key] = text

    @property
    def experiment_id(self) -> str | None:
        """MLflow's number of the experiment; None as long as there is none, or it is not known."""
        return self._state.experiment_id if self._state is not None else None

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
        for run in abandoned(seen, self._lives):  # another driver that works on the cell will set it running again
            if run.run_id not in self._running:
                self._end(run, "KILLED")

    def _known(self) -> ExperimentState:
        assert self._state is not None
        return self._state

    def _create_run(self, experiment_id: str | None, record: CellRecord) -> TrackedRun:
        start_ms = record.start_ms or next((timestamp_ms for *_, timestamp_ms in record.history), None)
        run = self._client().create_run(
            experiment_id,
            start_time=start_ms,
            tags={record.id_tag: record.cell_id, DRIVER: self._mark},
            run_name=record.cell_name,
        )
        info = run.info
        self._created.add(info.run_id)
        return TrackedRun(
            info.run_id, info.run_name, info.status, info.start_time, info.artifact_uri,
            tags=dict(run.data.tags), points=0,
        )  # fmt: skip

    def _log_one(self, run: TrackedRun, record: CellRecord, points: int) -> bool:
        self._set_running(run, record)
        self._log_params_and_tags(run, record)
        if not self._log_history(run, record, points):
            return False
        self._log_along(run, record)
        self._log_model(run, record)
        self._log_summary(run, record)
        self._log_artifacts(run, record)
        self._log_data(run, record)
        if STATUS[record.status] not in OPEN and run.points is not None and run.tags.get(POINTS) != str(run.points):
            self._send(run, tags={POINTS: str(run.points)})
        self._set_status(run, record)
        return True

    def _send(
        self, run: TrackedRun, metrics: Any = (), params: Any = (), tags: Mapping[str, str] | None = None,
        model_id: str | None = None,
    ) -> None:  # fmt: skip
        """Send one request, and note its content as part of MLflow's state; metrics are also that logged model's."""
        from mlflow.entities import Metric, Param, RunTag

        tags = tags or {}
        batch = {
            "metrics": [Metric(*metric, model_id=model_id) for metric in metrics],
            "params": [Param(key, text) for key, text in params],
            "tags": [RunTag(key, text) for key, text in tags.items()],
        }
        try:
            self._client().log_batch(run.run_id, **batch)
        except Exception as error:
            if not _WRITTEN_TWICE.search(str(error)):
                raise
            self._client().log_batch(run.run_id, **batch)
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
        run.tags.pop(ALONG_DIGEST, None)
        for name, value, timestamp_ms, step in sent_points(record.history):
            if name not in known:
                known[name] = {point.step for point in self._client().get_metric_history(run.run_id, name)}
            if step not in known[name]:
                missing.append((name, value, timestamp_ms, step))
        run.tags.pop(POINTS, None)  # once: if there are still fewer, those were not points of the history
        return iter(missing)

    def _log_along(self, run: TrackedRun, record: CellRecord) -> None:
        """Send the points along the way that the run lacks: they may come long after later steps."""
        if has_along(run, record):
            return
        known: dict[str, set[int]] = {}
        missing = []
        for name, value, timestamp_ms, step in sent_points(record.along):
            if name not in known:
                history = self._client().get_metric_history(run.run_id, name) if name in run.metrics else ()
                known[name] = {point.step for point in history}
            if step not in known[name]:
                missing.append((name, value, timestamp_ms, step))
        for batch in chunks(missing, METRICS_PER_REQUEST):
            self._send(run, batch)
        self._send(run, tags={ALONG_DIGEST: along_digest(record)})

    def _log_summary(self, run: TrackedRun, record: CellRecord) -> None:
        changed = changed_summary(run, record)
        if not changed:
            return
        now_ms = int(time.time() * 1000)
        points = []
        for name, value in changed.items():
            # The dashboard draws a metric of step 0 alone as a labelled bar, and another as a curve. A score is the end
            # of one, also if what comes before is evaluated later: MLflow takes no point back.
            step = record.last_step if name.startswith("eval/") else 0
            # MLflow shows the value of the highest step: one that somebody wrote later is overwritten at its step.
            step = max(step, run.metrics.get(name, (0.0, 0, 0))[1])
            points.append((name, value, now_ms, step))
        for batch in chunks(points, METRICS_PER_REQUEST):
            self._send(run, batch, model_id=model_of(run))

    def _log_artifacts(self, run: TrackedRun, record: CellRecord) -> None:
        if not record.artifacts or has_artifacts(run, record):
            return
        contents = file_contents(record.artifacts)
        with tempfile.TemporaryDirectory(prefix="llavolta-artifacts-") as folder:
            for name, content in contents.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                # MLflow sets a file's times, which on another user's is not permitted; replacing it is.
                if run.artifact_folder is not None:
                    (run.artifact_folder / name).unlink(missing_ok=True)
            self._client().log_artifacts(run.run_id, folder)
        self._send(run, tags={ARTIFACTS_DIGEST: record.artifacts_digest or files_digest(contents)})

    def _log_data(self, run: TrackedRun, record: CellRecord) -> None:
        """Log the data sets as inputs of the run; MLflow keeps one that it has."""
        if has_data(run, record):
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(data.name, data.digest, data.kind, shortened(data.source, SOURCE_CHARACTERS)),
                [InputTag("mlflow.data.context", ", ".join(data.uses))],
            )
            for data in record.data
        ]
        self._client().log_inputs(run.run_id, inputs)
        self._send(run, tags={DATA_DIGEST: data_digest(record)})

    def _log_model(self, run: TrackedRun, record: CellRecord) -> None:
        """Keep a logged model of the kept state, with the cell's params and final metrics.

        It has no files: its tags say where the ledger has the weights.
        """
        if record.kept is None or has_model(run, record):
            return
        model_id, known = self._model_of(run, record, record.kept), run.points
        # Equal to the run's own, which therefore stay as they are; those to come are logged of both.
        finals = sorted({accepted_name(name) for name in record.summary} & run.metrics.keys())
        points = [(name, value, time_ms, step) for name in finals for value, step, time_ms in [run.metrics[name]]]
        if model_id == NO_MODELS:
            self._send(run, tags={MODEL: model_id})
        else:
            self._send(run, points, tags={MODEL: model_id}, model_id=model_id)
        run.points = known

    def _model_of(self, run: TrackedRun, record: CellRecord, kept: KeptState) -> str:
        """Return the id of the run's logged model, created if there is none; `NO_MODELS` from a server before 3.0."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        client, experiment_id = self._client(), self.experiment_id
        is_new = run.run_id in self._created
        self._created.discard(run.run_id)  # the next attempt looks for what this one may have left
        try:
            which = f"source_run_id = '{run.run_id}'"
            found = [] if is_new else client.search_logged_models([experiment_id], which)
            # MLflow refuses some characters in names of models.
            name = re.sub(r"[/:.%\"']", "_", record.cell_name)[:NAME_CHARACTERS]
            tags = {"state": kept.state, "weights": kept.weights, CELL_ID: record.cell_id}
            params = sent_params(record)
            model = (
                found[0]
                if found
                else client.create_logged_model(experiment_id, name, run.run_id, tags, params, "llavolta")
            )
        except Exception as error:
            if getattr(error, "error_code", "") != "ENDPOINT_NOT_FOUND":
                raise
            return NO_MODELS
        if model.status != LoggedModelStatus.READY:
            try:
                client.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, record.last_step)])
            except Exception as error:
                if not _WRITTEN_TWICE.search(str(error)):
                    raise
            client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def _set_status(self, run: TrackedRun, record: CellRecord) -> None:
        status = STATUS[record.status]
        if status in OPEN:
            return
        self._running.discard(run.run_id)
        end_ms = end_of(run, record)
        if run.status != status or end_ms not in (None, run.end_ms):
            self._end(run, status, end_ms)

    def _end(self, run: TrackedRun, status: str, end_ms: int | None = None) -> None:
        trained = [timestamp_ms for name, (_, _, timestamp_ms) in run.metrics.items() if name.startswith("train/")]
        end_ms = end_ms if end_ms is not None else max(trained, default=None)
        self._client().set_terminated(run.run_id, status, end_time=end_ms)
        run.status, run.end_ms = status, end_ms

    @contextmanager
    def _as_tracking_error(self) -> Iterator[None]:
        """Raise whatever MLflow, its database or the network raise as a one-line TrackingError."""
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:
            reason = redacted(first_line(error))
            raise TrackingError(f"MLflow at {self._uri} did not accept the record: {shortened(reason, 300)}") from error


def chunks(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Return chunks of at most `size` values."""
    for start in range(0, len(values), size):
        yield values[start : start + size]

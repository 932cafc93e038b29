"""CellTracker: cells as MLflow runs, one run a cell, found by its tag; sending a record again changes nothing."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.errors import TrackingError
from orchestrator.plan.record import CellRecord
from orchestrator.tracking.limits import (
    METRICS_PER_REQUEST,
    PARAM_CHARACTERS,
    PARAMS_PER_REQUEST,
    TAG_CHARACTERS,
    TAGS_PER_REQUEST,
    accepted_name,
    accepted_value,
    chunks,
    shortened,
)
from orchestrator.tracking.new_database import make_database

SQLITE_LOCK_SECONDS = 10
ARTIFACTS_DIGEST = "artifacts_sha256"
CHANGED_PARAM = "changed_param."

# A server that is down is noticed in seconds instead of four minutes; nothing is sent home or printed.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# Opens the experiment in the dashboard's view for model training, not the one for chat applications.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_STATUS = {
    "new": "SCHEDULED",
    "running": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "trained": "FINISHED",
}


class CellTracker:
    """Writes cells to one MLflow experiment through a client of its own; MLflow's global state is never touched.

    Args:
        tracking_uri: `sqlite:////absolute/path.db` (artifacts then lie beside it) or a server's address.
        experiment_name: Made where it is missing, restored where it was deleted.
    """

    def __init__(self, tracking_uri: str, experiment_name: str) -> None:
        self._uri = tracking_uri
        self._experiment_name = experiment_name
        self._connection: Any = None
        self._experiment_id: str | None = None
        self._running: set[str] = set()

    def log(self, record: CellRecord) -> str:
        """Brings the run of a cell up to date and returns its id.

        Points of the history are sent in the order of their steps, and only those beyond what the run has: the
        record may be sent again at any time, in parts or whole, by this process or another.

        Raises:
            TrackingError: the server is down, refuses, or its database stays locked; send the record again later.
        """
        with self._told_plainly():
            run = self._find_run(record) or self._create_run(record)
            run_id: str = run.info.run_id
            self._log_params_and_tags(run, record)
            self._log_history(run, record)
            self._log_summary(run, record)
            self._log_artifacts(run, record)
            self._set_status(run, record)
            return run_id

    def close(self) -> None:
        """Ends the session: a run that still says RUNNING is marked KILLED, since nobody works on it any more.

        Raises:
            TrackingError: the server is down.
        """
        with self._told_plainly():
            for run_id in sorted(self._running):
                self._client().set_terminated(run_id, "KILLED")
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
            if (file := self._sqlite_file()) is not None:
                make_database(file)
                uri += ("&" if "?" in uri else "?") + f"timeout={SQLITE_LOCK_SECONDS}"
            self._connection = MlflowClient(uri)
        return self._connection

    def _sqlite_file(self) -> Path | None:
        if not self._uri.startswith("sqlite:///"):
            return None
        return Path(self._uri.removeprefix("sqlite:///").partition("?")[0])

    def _experiment(self) -> str:
        if self._experiment_id is None:
            client = self._client()
            found = client.get_experiment_by_name(self._experiment_name)
            if found is None:
                file = self._sqlite_file()
                # Never ./mlruns in whatever folder the command was given in.
                place = None if file is None else (file.parent / "mlflow_artifacts").absolute().as_uri()
                self._experiment_id = client.create_experiment(
                    self._experiment_name, artifact_location=place, tags=_EXPERIMENT_TAGS
                )
            else:
                if found.lifecycle_stage == "deleted":
                    client.restore_experiment(found.experiment_id)
                self._experiment_id = found.experiment_id
        assert self._experiment_id is not None
        return self._experiment_id

    def _find_run(self, record: CellRecord) -> Any | None:
        found = self._client().search_runs(
            [self._experiment()],
            filter_string=f"tags.cell_id = '{record.cell_id}'",
            order_by=["attributes.start_time ASC"],
            max_results=1,
        )
        return found[0] if found else None

    def _create_run(self, record: CellRecord) -> Any:
        start_ms = min((timestamp_ms for *_, timestamp_ms in record.history), default=None)
        return self._client().create_run(
            self._experiment(), start_time=start_ms, tags={"cell_id": record.cell_id}, run_name=record.cell_name
        )

    def _log_params_and_tags(self, run: Any, record: CellRecord) -> None:
        from mlflow.entities import Param, RunTag

        params = {accepted_name(key): shortened(str(text), PARAM_CHARACTERS) for key, text in record.params.items()}
        tags = {**record.tags, "cell_id": record.cell_id}
        known = run.data.params
        # A param can be written once; a value that changed since (a default, a label) is noted beside it.
        tags |= {CHANGED_PARAM + key: text for key, text in params.items() if known.get(key, text) != text}
        tags = {accepted_name(key): shortened(str(text), TAG_CHARACTERS) for key, text in tags.items()}
        new_params = [Param(key, text) for key, text in params.items() if key not in known]
        new_tags = [RunTag(key, text) for key, text in tags.items() if run.data.tags.get(key) != text]
        for some_params in chunks(new_params, PARAMS_PER_REQUEST):
            self._client().log_batch(run.info.run_id, params=some_params)
        for some_tags in chunks(new_tags, TAGS_PER_REQUEST):
            self._client().log_batch(run.info.run_id, tags=some_tags)

    def _log_history(self, run: Any, record: CellRecord) -> None:
        from mlflow.entities import Metric

        known = _latest_steps(run)
        fresh = []
        for key, value, step, timestamp_ms in record.history:
            name, number = accepted_name(key), accepted_value(value)
            if number is not None and step > known.get(name, -1):
                fresh.append(Metric(name, number, int(timestamp_ms), int(step)))
        # In the order of steps, so that "the highest step it has" is true after every batch.
        fresh.sort(key=lambda metric: (metric.step, metric.key))
        for batch in chunks(fresh, METRICS_PER_REQUEST):
            self._client().log_batch(run.info.run_id, metrics=batch)

    def _log_summary(self, run: Any, record: CellRecord) -> None:
        from mlflow.entities import Metric

        last_step = max((step for _, _, step, _ in record.history), default=0)
        now_ms = int(time.time() * 1000)
        numbers = {accepted_name(key): accepted_value(value) for key, value in record.summary.items()}
        changed = [
            Metric(name, number, now_ms, last_step)
            for name, number in numbers.items()
            if number is not None and run.data.metrics.get(name) != number
        ]
        for batch in chunks(changed, METRICS_PER_REQUEST):
            self._client().log_batch(run.info.run_id, metrics=batch)

    def _log_artifacts(self, run: Any, record: CellRecord) -> None:
        if not record.artifacts:
            return
        contents = _contents(record.artifacts)
        digest = _digest(contents)
        if run.data.tags.get(ARTIFACTS_DIGEST) == digest:
            return
        with tempfile.TemporaryDirectory(prefix="llavolta-artifacts-") as folder:
            for name, content in contents.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self._client().log_artifacts(run.info.run_id, folder)
        self._client().set_tag(run.info.run_id, ARTIFACTS_DIGEST, digest)

    def _set_status(self, run: Any, record: CellRecord) -> None:
        run_id, status = run.info.run_id, _STATUS[record.status]
        if run.info.run_name != record.cell_name:
            self._client().update_run(run_id, name=record.cell_name)
        if status in ("RUNNING", "SCHEDULED"):
            if run.info.status != status:
                self._client().update_run(run_id, status=status)
            self._running.add(run_id)
            return
        self._running.discard(run_id)
        if run.info.status != status:
            end_ms = max((timestamp_ms for *_, timestamp_ms in record.history), default=None)
            self._client().set_terminated(run_id, status, end_time=end_ms)

    @contextmanager
    def _told_plainly(self) -> Iterator[None]:
        """Turns whatever MLflow, its database or the network raise into one sentence."""
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise TrackingError(
                f"MLflow at {_without_secrets(self._uri)} did not take the record: {shortened(reason, 300)}"
            ) from error


def _latest_steps(run: Any) -> dict[str, int]:
    """Metric name to the highest step a run has of it; part of every answer, though MLflow shows values only."""
    return {metric.key: metric.step for metric in run.data._metric_objs}


def _contents(artifacts: Mapping[str, str | bytes | Path]) -> dict[str, bytes]:
    return {
        accepted_name(name): content.encode()
        if isinstance(content, str)
        else content
        if isinstance(content, bytes)
        else content.read_bytes()
        for name, content in artifacts.items()
    }


def _digest(contents: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(contents):
        digest.update(f"{name}\0{len(contents[name])}\0".encode() + contents[name])
    return digest.hexdigest()


def _without_secrets(uri: str) -> str:
    """The address without a user and password written into it."""
    scheme, separator, rest = uri.partition("://")
    return scheme + separator + rest.rpartition("@")[2]

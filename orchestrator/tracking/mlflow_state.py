"""The state of an experiment in MLflow, read for all cells at once, and what of a cell's record it has.

It is read without importing MLflow where possible: the import takes longer than a `run` that finds nothing to do. An
sqlite file is read directly, a server with two requests; anything unknown here is left to MLflow's own client.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from orchestrator.errors import StorageError, TrackingError
from orchestrator.plan.cell_record import CELL_ID, NOTE, CellRecord
from orchestrator.plan.identity import digest
from orchestrator.plan.io_retry import retry_io, stat_or_none
from orchestrator.plan.ledger.backends import Backend
from orchestrator.plan.ledger.leases import Leases
from orchestrator.plan.ledger.process import Process
from orchestrator.plan.step_history import Point, points_since

SUMMARY_OF = "summary_of"
"""Tag of the run that shows an experiment as a whole, with the experiment's name; such a run is no cell's."""
TREE_SECONDS = "tree/train_seconds"
_OURS = "<!-- llavolta -->"
"""Stands in an experiment's description between what somebody wrote and what this program writes."""
_RUNS_PER_PAGE = 1000
_LOCK_SECONDS = 2.0
_SERVER_SECONDS = 10.0
# With one of these set, requests are left to MLflow's client.
_CLIENT_ONLY = (
    "MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4", "MLFLOW_TRACKING_CLIENT_CERT_PATH", "MLFLOW_WORKSPACE",
    "MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_TRACKING_SERVER_CERT_PATH",
)  # fmt: skip


@dataclass
class TrackedRun:
    """A cell's run in MLflow; the tracker updates it with what it sends.

    Attributes:
        metrics: By name, the value, step and timestamp (ms) of the highest step.
        points: Number of points of all metrics; None where one query cannot tell it.
        end_ms: When it ended.
    """

    run_id: str
    name: str
    status: str
    start_ms: int
    artifacts: str
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, tuple[float, int, int]] = field(default_factory=dict)
    points: int | None = None
    end_ms: int | None = None

    @property
    def artifact_folder(self) -> Path | None:
        """The folder on this machine that holds uploaded files; None where they are elsewhere."""
        place = urlsplit(self.artifacts)
        return Path(unquote(place.path)) if place.scheme in ("", "file") else None

    def lacks_artifacts(self, names: Iterable[str]) -> bool:
        """Return whether uploaded files are gone; known only for a folder on this machine."""
        folder = self.artifact_folder
        return folder is not None and not all(stat_or_none(folder / name) is not None for name in names)


@dataclass
class ExperimentState:
    """An experiment in MLflow.

    Attributes:
        experiment_id: None if there is no experiment of that name.
        is_deleted: Whether it was deleted; its runs are then deleted too.
        tags: Its own tags: its description and its saved views.
        runs: Runs by cell id, and summaries by the name of their experiment; the oldest where there are two; without
            deleted ones.
    """

    experiment_id: str | None = None
    is_deleted: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    runs: dict[str, TrackedRun] = field(default_factory=dict)

    def add(self, run: TrackedRun) -> None:
        """Add a run if it is a cell's or a summary."""
        cell = run.tags.get(CELL_ID, run.tags.get(SUMMARY_OF))
        if cell is not None and (cell not in self.runs or run.start_ms < self.runs[cell].start_ms):
            self.runs[cell] = run


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an `sqlite:///` address, None for other addresses."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def read_state(uri: str, experiment: str, *, count: bool = True) -> ExperimentState | None:
    """Return the state of an experiment without importing MLflow; None where only its client can read it.

    Args:
        uri: MLflow's tracking URI.
        experiment: The experiment's name.
        count: Whether to count the points of each run, where that is possible.
    """
    if (file := sqlite_file(uri)) is not None:
        return _look_into_file(file, experiment, count)
    if uri.startswith(("http://", "https://")) and not any(map(os.environ.get, _CLIENT_ONLY)):
        return _ask_server(uri.rstrip("/"), experiment)
    return None


def read_state_with_client(client: Any, experiment: str) -> ExperimentState:
    """Return the state of an experiment, read with MLflow's client.

    Args:
        client: An `MlflowClient`.
        experiment: The experiment's name.

    Raises:
        Exception: of many kinds; MLflow's own, the database's, the network's.
    """
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return ExperimentState()
    seen = ExperimentState(found.experiment_id, found.lifecycle_stage == "deleted", dict(found.tags))
    token = None
    while not seen.is_deleted:
        page = client.search_runs([found.experiment_id], max_results=_RUNS_PER_PAGE, page_token=token)
        for run in page:
            info, data = run.info, run.data
            # Steps and timestamps are in every response, though MLflow's public mapping has values only.
            metrics = {metric.key: (metric.value, metric.step, metric.timestamp) for metric in data._metric_objs}
            seen.add(
                TrackedRun(
                    info.run_id, info.run_name, info.status, info.start_time or 0, info.artifact_uri,
                    dict(data.params), dict(data.tags), metrics, end_ms=info.end_time or None,
                )
            )  # fmt: skip
        token = page.token
        if not token:
            break
    return seen


def _look_into_file(file: Path, experiment: str, count: bool) -> ExperimentState | None:
    if stat_or_none(file) is None:
        return ExperimentState()
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=_LOCK_SECONDS)) as opened:
            opened.execute("BEGIN")  # a consistent snapshot
            return _read_tables(opened, experiment, count)
    except sqlite3.Error:
        return None  # locked, damaged, or of another schema: left to MLflow's client


def _read_tables(opened: sqlite3.Connection, experiment: str, count: bool) -> ExperimentState:
    found = opened.execute(
        "SELECT experiment_id, lifecycle_stage FROM experiments WHERE name = ?", (experiment,)
    ).fetchone()
    if found is None:
        return ExperimentState()
    tags = opened.execute("SELECT key, value FROM experiment_tags WHERE experiment_id = ?", (found[0],))
    seen = ExperimentState(str(found[0]), found[1] == "deleted", dict(tags))

    def rows(columns: str, table: str, end: str = "") -> sqlite3.Cursor:
        ours = "SELECT run_uuid FROM runs WHERE experiment_id = ? AND lifecycle_stage = 'active'"
        return opened.execute(f"SELECT {columns} FROM {table} WHERE run_uuid IN ({ours}) {end}", (found[0],))

    runs = {
        row[0]: TrackedRun(row[0], row[1] or "", row[2], row[3] or 0, row[4] or "", end_ms=row[5] or None)
        for row in rows("run_uuid, name, status, start_time, artifact_uri, end_time", "runs")
    }
    for run_id, key, value in rows("run_uuid, key, value", "tags"):
        runs[run_id].tags[key] = value
    for run_id, key, value in rows("run_uuid, key, value", "params"):
        runs[run_id].params[key] = value
    for run_id, key, value, step, timestamp_ms in rows("run_uuid, key, value, step, timestamp", "latest_metrics"):
        runs[run_id].metrics[key] = (value, step, timestamp_ms)
    if count:
        for run in runs.values():
            run.points = 0
        for run_id, points in rows("run_uuid, COUNT(*)", "metrics", "GROUP BY run_uuid"):
            runs[run_id].points = points
    for run in runs.values():
        seen.add(run)
    return seen


def _ask_server(uri: str, experiment: str) -> ExperimentState | None:
    import requests

    user, password, token = (os.environ.get(f"MLFLOW_TRACKING_{n}") for n in ("USERNAME", "PASSWORD", "TOKEN"))
    if not (user and password) and (Path.home() / ".mlflow" / "credentials").exists():
        return None
    try:
        with requests.Session() as session:  # it knows the password in an address, and ~/.netrc
            if user and password:
                session.auth = (user, password)
            elif token:
                session.headers["Authorization"] = f"Bearer {token}"
            api = f"{uri}/api/2.0/mlflow"
            found = session.get(
                f"{api}/experiments/get-by-name", params={"experiment_name": experiment}, timeout=_SERVER_SECONDS
            )
            if found.status_code == 404 and found.json().get("error_code") == "RESOURCE_DOES_NOT_EXIST":
                return ExperimentState()
            found.raise_for_status()
            about = found.json()["experiment"]
            tags = {entry["key"]: entry.get("value", "") for entry in about.get("tags", ())}
            seen = ExperimentState(str(about["experiment_id"]), about.get("lifecycle_stage") == "deleted", tags)
            question: dict[str, Any] = {"experiment_ids": [seen.experiment_id], "max_results": _RUNS_PER_PAGE}
            while not seen.is_deleted:
                page = session.post(f"{api}/runs/search", json=question, timeout=_SERVER_SECONDS)
                page.raise_for_status()
                answer = page.json()
                for run in answer.get("runs", ()):
                    seen.add(_run_of(run))
                if not answer.get("next_page_token"):
                    break
                question["page_token"] = answer["next_page_token"]
            return seen
    except (requests.RequestException, ValueError, KeyError, TypeError, json.JSONDecodeError):
        return None


def _run_of(run: Mapping[str, Any]) -> TrackedRun:
    info, data = run["info"], run.get("data", {})
    return TrackedRun(
        info["run_id"],
        info.get("run_name", ""),
        info.get("status", ""),
        int(info.get("start_time") or 0),
        info.get("artifact_uri", ""),
        {entry["key"]: entry.get("value", "") for entry in data.get("params", ())},
        {entry["key"]: entry.get("value", "") for entry in data.get("tags", ())},
        {
            entry["key"]: (float(entry.get("value", 0.0)), int(entry.get("step", 0)), int(entry.get("timestamp", 0)))
            for entry in data.get("metrics", ())
        },
        end_ms=int(info.get("end_time") or 0) or None,
    )


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


ARTIFACTS_DIGEST = "artifacts_sha256"
ALONG_DIGEST = "evaluations_along_sha256"
DATA_DIGEST = "data_sha256"
MODEL = "logged_model"
"""Tag with the id of a run's logged model, or what says that the server has none."""
NO_MODELS = "not taken by this server"
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
    "stopped": "KILLED",
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
        and end_of(run, record) in (None, run.end_ms)
        and sent_params(record).keys() <= run.params.keys()
        and all(run.tags.get(key) == text for key, text in sent_tags(run, record).items())
        and not changed_summary(run, record)
        and not lost_points(run)
        and has_artifacts(run, record)
        and has_data(run, record)
        and has_model(run, record)
        and has_along(run, record)
        and next(fresh_points(run, record), None) is None
    )


def has_artifacts(run: TrackedRun, record: CellRecord) -> bool:
    """Return whether MLflow has a record's files."""
    return not record.artifacts or (
        run.tags.get(ARTIFACTS_DIGEST) == (record.artifacts_digest or files_digest(file_contents(record.artifacts)))
        and not run.lacks_artifacts(map(accepted_name, record.artifacts))
    )


def data_digest(record: CellRecord) -> str:
    """Return the digest of a record's data sets, the tag of a run that has them as inputs."""
    # Without the source: a folder that is mounted elsewhere holds the same rows.
    return digest([[data.name, data.digest, data.uses] for data in record.data])


def has_data(run: TrackedRun, record: CellRecord) -> bool:
    """Return whether a run has a record's data sets as inputs."""
    return not record.data or run.tags.get(DATA_DIGEST) == data_digest(record)


def has_model(run: TrackedRun, record: CellRecord) -> bool:
    """Return whether there is a logged model of a record's kept state; its metrics are those of the run."""
    return record.kept is None or MODEL in run.tags


def model_of(run: TrackedRun) -> str | None:
    """Return the id of a run's logged model; None where it has none."""
    return None if run.tags.get(MODEL) == NO_MODELS else run.tags.get(MODEL)


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


def end_of(run: TrackedRun, record: CellRecord) -> int | None:
    """Return when a finished run ends, so that the dashboard's duration is what training took; None: not known.

    The first of its steps may be another cell's of days ago, and the last may wait for its evaluation.
    """
    took = record.summary.get(TREE_SECONDS if record.id_tag == SUMMARY_OF else "cost/train_seconds")
    seconds = took if record.status == "finished" else None
    return None if seconds is None else run.start_ms + round(1000 * seconds)


def sent_params(record: CellRecord) -> dict[str, str]:
    """Return a record's params in the form that MLflow accepts."""
    return {accepted_name(key): shortened(str(text), PARAM_CHARACTERS) for key, text in record.params.items()}


def sent_tags(run: TrackedRun, record: CellRecord) -> dict[str, str]:
    """Return a record's tags in the form that MLflow accepts."""
    tags = {**record.tags, record.id_tag: record.cell_id}
    if record.id_tag == SUMMARY_OF:
        tags = with_own_note(tags, run.tags)
    elif NOTE in tags:
        tags[NOTE] = run.tags.get(NOTE) or tags[NOTE]  # somebody may have written more
    # A param can be written once; a value that changed since (a default, a label) becomes a tag.
    changed = {key: text for key, text in sent_params(record).items() if run.params.get(key, text) != text}
    tags |= {CHANGED_PARAM + key: text for key, text in changed.items()}
    return {accepted_name(key): shortened(str(text), TAG_CHARACTERS) for key, text in tags.items()}


def changed_summary(run: TrackedRun, record: CellRecord) -> dict[str, float]:
    """Return the final metrics of a record that a run lacks or has with another value."""
    numbers = {accepted_name(key): accepted_value(value) for key, value in record.summary.items()}
    # A score along the way that is the final one is no final one.
    along = {accepted_name(key) for key, *_ in record.along}

    def is_there(name: str, value: float) -> bool:
        known, step, _ = run.metrics.get(name, (None, -1, 0))
        return known == value and (name not in along or step >= record.last_step)

    return {name: value for name, value in numbers.items() if value is not None and not is_there(name, value)}


def along_digest(record: CellRecord) -> str:
    """Return the digest of a record's points along the way, the tag of a run that has them; empty without any."""
    return hashlib.sha256(repr(list(sent_points(record.along))).encode()).hexdigest() if record.along else ""


def has_along(run: TrackedRun, record: CellRecord) -> bool:
    """Return whether a run has a record's points along the way."""
    return not record.along or run.tags.get(ALONG_DIGEST) == along_digest(record)


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
        accepted_name(name): (
            retry_io(content.read_bytes)
            if isinstance(content, Path)
            else content.encode()
            if isinstance(content, str)
            else content
        )
        for name, content in artifacts.items()
    }


def files_digest(contents: Mapping[str, bytes]) -> str:
    """Return the digest of artifacts, names and contents."""
    found = hashlib.sha256()
    for name in sorted(contents):
        found.update(f"{name}\0{len(contents[name])}\0".encode() + contents[name])
    return found.hexdigest()


def with_own_note(tags: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """Return tags of the experiment as a whole: the description keeps what somebody wrote into the one there is."""
    if NOTE not in tags:
        return dict(tags)
    own = known.get(NOTE, "").partition(_OURS)[0].rstrip()
    return {**tags, NOTE: "\n\n".join([*([own] if own else []), _OURS, tags[NOTE]])}


def make_database(path: Path) -> None:
    """Create an sqlite file with MLflow's tables if there is none yet.

    MLflow creates its tables one after the other: killed in between, or with a second process that does the same, it
    leaves a file that neither it nor `mlflow server` opens again. So they are created in a temporary file, which is
    then linked into place.

    Args:
        path: The file; an existing one is left as it is.

    Raises:
        Exception: of many kinds, MLflow's too: the disk is full, or the folder cannot be written.
    """
    retry_io(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    if stat_or_none(path) is not None:
        return
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=path.parent) as folder:
        made, copy = Path(folder) / "made.db", Path(folder) / "copy.db"
        MlflowClient(f"sqlite:///{made}")
        # A copy: MLflow keeps the first file open, and its locks must not be those of the second.
        shutil.copyfile(made, copy)
        with copy.open("rb") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(copy, path)


WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.2


@contextlib.contextmanager
def one_at_a_time(store: Backend, experiment_name: str) -> Iterator[None]:
    """Hold a short lease on an experiment: two drivers that find no run of a cell would both create one.

    Args:
        store: Holds the lease.
        experiment_name: The experiment's name in MLflow.

    Raises:
        TrackingError: the lease cannot be acquired, or another driver holds it for too long.
    """
    name = f"track-{digest(experiment_name)}"
    leases = Leases(store, f"tracker-{uuid.uuid4().hex[:12]}")
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while leases.acquire(name) is None:
            if time.monotonic() > deadline:
                raise TrackingError(f"another run is recording {experiment_name}; run again to upload what is missing")
            time.sleep(_POLL_SECONDS)
        try:
            yield
        finally:
            leases.forget(name)
    except StorageError as error:
        raise TrackingError(str(error)) from error
    finally:
        with contextlib.suppress(StorageError):  # it expires with this process
            leases.close()

"""What MLflow has of an experiment: one question for all of its cells, asked without importing MLflow where that works.

The import takes longer than a `run` that finds nothing to do. An sqlite file is read as it lies, a server is asked by
two requests; a database, settings or an answer that this file does not know are left to MLflow's own client.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from orchestrator.plan.io_retry import stat_or_none

CELL_ID = "cell_id"
_RUNS_PER_PAGE = 1000
_LOCK_SECONDS = 2.0
_SERVER_SECONDS = 10.0
# With one of these set a request is made in a way that MLflow's client knows best.
_CLIENT_ONLY = (
    "MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4", "MLFLOW_TRACKING_CLIENT_CERT_PATH", "MLFLOW_WORKSPACE",
    "MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_TRACKING_SERVER_CERT_PATH",
)  # fmt: skip


@dataclass
class SeenRun:
    """A cell's run as MLflow has it; the tracker keeps it up to date with what it sends.

    Attributes:
        metrics: Name to the value, step and timestamp (ms) of its highest step.
        points: How many points of all metrics there are; None where it cannot be asked in one question.
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

    def lacks_artifacts(self, names: Iterable[str]) -> bool:
        """Return whether files that were sent are gone; only of a folder on this machine can that be told."""
        place = urlsplit(self.artifacts)
        if place.scheme not in ("", "file"):
            return False
        folder = Path(unquote(place.path))
        return not all(stat_or_none(folder / name) is not None for name in names)


@dataclass
class SeenExperiment:
    """An experiment as MLflow has it.

    Attributes:
        experiment_id: None where there is none of that name.
        is_deleted: Whether it was deleted there; its runs are then deleted too.
        runs: Cell id to its run, the oldest where there are two; deleted ones do not count.
    """

    experiment_id: str | None = None
    is_deleted: bool = False
    runs: dict[str, SeenRun] = field(default_factory=dict)

    def add(self, run: SeenRun) -> None:
        """Take a run that is a cell's."""
        cell = run.tags.get(CELL_ID)
        if cell is not None and (cell not in self.runs or run.start_ms < self.runs[cell].start_ms):
            self.runs[cell] = run


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an `sqlite:///` address."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def quick_look(uri: str, experiment: str, *, count: bool = True) -> SeenExperiment | None:
    """Return what MLflow has of an experiment, without MLflow; None where only its client can tell.

    Args:
        uri: Where MLflow is.
        experiment: Its name.
        count: Whether to count the points of each run, where that can be done.
    """
    if (file := sqlite_file(uri)) is not None:
        return _look_into_file(file, experiment, count)
    if uri.startswith(("http://", "https://")) and not any(map(os.environ.get, _CLIENT_ONLY)):
        return _ask_server(uri.rstrip("/"), experiment)
    return None


def client_look(client: Any, experiment: str) -> SeenExperiment:
    """Return the same by MLflow's client.

    Args:
        client: An `MlflowClient`.
        experiment: Its name.

    Raises:
        Exception: of many kinds; MLflow's own, the database's, the network's.
    """
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return SeenExperiment()
    seen = SeenExperiment(found.experiment_id, found.lifecycle_stage == "deleted")
    token = None
    while not seen.is_deleted:
        page = client.search_runs([found.experiment_id], max_results=_RUNS_PER_PAGE, page_token=token)
        for run in page:
            info, data = run.info, run.data
            # Part of every answer, though MLflow's own mapping shows values only.
            metrics = {metric.key: (metric.value, metric.step, metric.timestamp) for metric in data._metric_objs}
            seen.add(
                SeenRun(
                    info.run_id, info.run_name, info.status, info.start_time or 0, info.artifact_uri,
                    dict(data.params), dict(data.tags), metrics,
                )
            )  # fmt: skip
        token = page.token
        if not token:
            break
    return seen


def _look_into_file(file: Path, experiment: str, count: bool) -> SeenExperiment | None:
    if stat_or_none(file) is None:
        return SeenExperiment()
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=_LOCK_SECONDS)) as opened:
            opened.execute("BEGIN")  # all of it as it stood at one moment
            return _read_tables(opened, experiment, count)
    except sqlite3.Error:
        return None  # locked, torn, or other tables than these: MLflow knows, or says what is wrong


def _read_tables(opened: sqlite3.Connection, experiment: str, count: bool) -> SeenExperiment:
    found = opened.execute(
        "SELECT experiment_id, lifecycle_stage FROM experiments WHERE name = ?", (experiment,)
    ).fetchone()
    if found is None:
        return SeenExperiment()
    seen = SeenExperiment(str(found[0]), found[1] == "deleted")
    runs = {
        row[0]: SeenRun(row[0], row[1] or "", row[2], row[3] or 0, row[4] or "")
        for row in opened.execute(
            "SELECT run_uuid, name, status, start_time, artifact_uri FROM runs "
            "WHERE experiment_id = ? AND lifecycle_stage = 'active'",
            (found[0],),
        )
    }
    ours = "WHERE run_uuid IN (SELECT run_uuid FROM runs WHERE experiment_id = ?)"
    for table, name in (("tags", "tags"), ("params", "params")):
        for run_id, key, value in opened.execute(f"SELECT run_uuid, key, value FROM {table} {ours}", (found[0],)):
            if run_id in runs:
                getattr(runs[run_id], name)[key] = value
    for run_id, key, *point in opened.execute(
        f"SELECT run_uuid, key, value, step, timestamp FROM latest_metrics {ours}", (found[0],)
    ):
        if run_id in runs:
            runs[run_id].metrics[key] = (point[0], point[1], point[2])
    if count:
        for run in runs.values():
            run.points = 0
        for run_id, points in opened.execute(
            f"SELECT run_uuid, COUNT(*) FROM metrics {ours} GROUP BY run_uuid", (found[0],)
        ):
            if run_id in runs:
                runs[run_id].points = points
    for run in runs.values():
        seen.add(run)
    return seen


def _ask_server(uri: str, experiment: str) -> SeenExperiment | None:
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
                return SeenExperiment()
            found.raise_for_status()
            about = found.json()["experiment"]
            seen = SeenExperiment(str(about["experiment_id"]), about.get("lifecycle_stage") == "deleted")
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


def _run_of(run: Mapping[str, Any]) -> SeenRun:
    info, data = run["info"], run.get("data", {})
    return SeenRun(
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
    )

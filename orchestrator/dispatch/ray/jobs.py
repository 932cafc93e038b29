"""An experiment as a job of a Ray cluster: submitted by its content, followed, cancelled; over HTTP, from anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shlex
import signal
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.dispatch.package import Package, command
from orchestrator.dispatch.signals import TRY_AGAIN
from orchestrator.errors import Interrupted, StageRunError, UsageError, first_line, shorten

STOP_SECONDS = 1800
"""Seconds that a cancelled run has for its step and its checkpoint, before Ray kills it."""
ANSWER_SECONDS = 30.0
QUIET_SECONDS = 60.0
LOST_SECONDS = 300.0
_POLL_SECONDS = 1.0
_NOT_FOUND = 127  # the shell's exit code
_OPTIONS = "llavolta_options"


class JobServer:
    """The job server of a Ray cluster, which its dashboard holds.

    Args:
        address: `http://HOST:8265`.

    Raises:
        UsageError: no job server answers there, it wants another token, or Ray lacks what asks it.
    """

    def __init__(self, address: str) -> None:
        self.address = (address if "://" in address else f"http://{address}").rstrip("/")
        if not self.address.startswith(("http://", "https://")):
            raise UsageError(f"--address {address}: write http://HOST:8265, where the cluster's dashboard is")
        asks_for_token = _asks_for_token(self.address)
        try:
            self._client = _client(self.address, asks_for_token)
        except Exception as error:
            raise _explained(self.address, error) from error

    def submit(self, package: Package, name: str, verb: str, sets: Sequence[str], options: Sequence[str]) -> ClusterJob:
        """Return the job that does this: the one that is at it, or else a new one.

        Args:
            package: What travels.
            name: The experiment's.
            verb: `run` or `search`.
            sets: Texts of `--set`.
            options: Other options of the verb.

        Raises:
            UsageError: it is at it with other options, or the cluster refuses the job.
        """
        given = shlex.join(options)
        jobs = self.jobs(package, name)
        if not (jobs and jobs[-1].is_open):
            new = f"{job_prefix(package, name)}{jobs[-1].number + 1 if jobs else 1}"
            refused = self._start(package, new, command(package, verb, sets, options), given)
            jobs = self.jobs(package, name)
            if refused is None:
                return ClusterJob(self, new, joined=False, elsewhere=package.elsewhere)
            # Another submission of the same may have been quicker by a moment.
            if not (jobs and jobs[-1].is_open):
                raise _explained(self.address, refused)
        found = jobs[-1]
        if (other := found.details.metadata.get(_OPTIONS, "")) != given:
            raise UsageError(
                f"{found.id} is at it already, with {other or 'no options'} instead of {given or 'none'}: submit it "
                "with these, or cancel it first"
            )
        return replace(found, elsewhere=package.elsewhere)

    def _start(self, package: Package, job: str, command: str, options: str) -> Exception | None:
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / "experiment.zip"
            package.write(archive)
            try:
                self._client.submit_job(
                    entrypoint=command,
                    submission_id=job,
                    runtime_env={
                        "working_dir": str(archive),
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
                    },
                    metadata={_OPTIONS: options},
                )
            except Exception as error:
                return error
        return None

    def jobs(self, package: Package, name: str) -> list[ClusterJob]:
        """Return the jobs of an experiment on this cluster, the oldest first.

        Raises:
            UsageError: the cluster does not answer.
        """
        prefix = job_prefix(package, name)
        ids = [each.submission_id or "" for each in self.call("list_jobs")]
        found = [ClusterJob(self, each) for each in ids if re.fullmatch(rf"{re.escape(prefix)}\d+", each)]
        return sorted(found, key=lambda job: job.number)

    def call(self, method: str, *arguments: str) -> Any:
        """Ask the server.

        Raises:
            UsageError: it does not answer, or refuses.
        """
        try:
            return getattr(self._client, method)(*arguments)
        except Exception as error:
            raise _explained(self.address, error) from error

    def tail(self, job: str) -> Any:
        """Return the job's log, in parts as they are written, as an asynchronous iterator."""
        return self._client.tail_job_logs(job)


@dataclass(frozen=True)
class ClusterJob:
    """An experiment that a cluster runs or ran, as a job of Ray.

    Attributes:
        server: The cluster's job server.
        id: The job's name: `llavolta-EXPERIMENT-CONTENT-NUMBER`.
        joined: Whether it was at it before it was submitted.
        elsewhere: What must be on the cluster, as `KEY: PATH`; known of a job that was submitted here.
    """

    server: JobServer
    id: str
    joined: bool = True
    elsewhere: tuple[str, ...] = ()

    @property
    def number(self) -> int:
        """How often this content was submitted, this time included."""
        return int(self.id.rpartition("-")[2])

    @property
    def details(self) -> Any:
        """What Ray knows of it: `ray.job_submission.JobDetails`."""
        return self.server.call("get_job_info", self.id)

    @property
    def status(self) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED, or STOPPED where it was cancelled."""
        return str(self.details.status.value)

    @property
    def is_open(self) -> bool:
        """Whether it waits or runs."""
        return not self.details.status.is_terminal()

    def log(self) -> str:
        """Return what it has printed so far."""
        return str(self.server.call("get_job_logs", self.id))

    def follow(self, write: Callable[[str], object], *, skip: int = 0) -> int:
        """Write what it prints until it ends, and return the exit code of its run.

        Args:
            write: Takes text.
            skip: Characters of its log that are known.

        Raises:
            StageRunError: it could not be started, or was lost with its machine.
            Interrupted: the cluster does not answer any more; the job may go on.
        """
        known, heard = skip, time.monotonic()

        async def tail() -> None:
            nonlocal known, heard
            position, parts = 0, self.server.tail(self.id)
            # A connection that is cut without a word looks like a run that is silent: ask anew now and then.
            while (text := await asyncio.wait_for(anext(parts, None), QUIET_SECONDS)) is not None:
                heard = time.monotonic()
                write(text[max(0, known - position) :])
                position += len(text)
                known = max(known, position)

        while True:
            with contextlib.suppress(Exception):
                asyncio.run(tail())
            try:
                details, heard = self.details, time.monotonic()
            except UsageError as error:
                if time.monotonic() - heard > LOST_SECONDS:
                    message = f"{error}\n    {self.id} may go on there; the same command follows it again"
                    raise Interrupted(message, TRY_AGAIN) from error
            else:
                if details.status.is_terminal():
                    write(self.log()[known:])
                    return exit_code(details, f"{self.id} on {self.server.address}")
            time.sleep(_POLL_SECONDS)

    def cancel(self, write: Callable[[str], object]) -> None:
        """Stop it at a checkpoint, as SIGTERM does, write what it prints meanwhile, and wait for its end."""
        said = len(self.log())
        self.server.call("stop_job", self.id)
        with contextlib.suppress(StageRunError):
            self.follow(write, skip=said)

    def document(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        details = self.details
        return {
            "job": self.id,
            "address": self.server.address,
            "status": details.status.value,
            "started": details.start_time and details.start_time / 1000,
            "ended": details.end_time and details.end_time / 1000,
            "exit_code": details.driver_exit_code,
            "command": details.entrypoint,
        }


def job_prefix(package: Package, name: str) -> str:
    """Return what the names of an experiment's jobs begin with; a number follows."""
    return f"llavolta-{re.sub('[^A-Za-z0-9_.-]+', '-', name)[:60]}-{package.digest[:16]}-"


def exit_code(details: Any, name: str) -> int:
    """Return the exit code of the run of a job that ended; 75 where it was cancelled.

    Args:
        details: `ray.job_submission.JobDetails`.
        name: The job and the cluster, for messages.

    Raises:
        StageRunError: there is none: it was not started, or was killed.
    """
    code, status = details.driver_exit_code, details.status.value
    if status == "STOPPED":
        return TRY_AGAIN
    if code is None and status == "SUCCEEDED":
        return 0
    if code is None:
        raise StageRunError(f"{name} did not run to its end: {details.message}")
    if code == _NOT_FOUND:
        raise StageRunError(
            f"{name}: the head finds no `llavolta`: install this package there, and start Ray with the `bin` of that "
            "environment in PATH"
        )
    if code < 0:
        raise StageRunError(f"{name} was killed by {signal.Signals(-code).name}; submit it again to resume")
    return int(code)


def _client(address: str, asks_for_token: bool) -> Any:
    import ray._raylet
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Ray's client, which waits for ever for a server that does not answer."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=ANSWER_SECONDS, **options)

    for told in ("dashboard_sdk", "job.sdk"):  # every upload and every closed connection
        logging.getLogger(f"ray.dashboard.modules.{told}").setLevel(logging.WARNING)
    loader = ray._raylet.AuthenticationTokenLoader.instance()
    # Ray itself sends it only where RAY_AUTH_MODE was set when it was imported.
    headers = loader.get_token_for_http_header(ignore_auth_mode=True) if asks_for_token else None
    with _unset("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # either would overrule the address
        return Client(address, headers=headers)


def _asks_for_token(address: str) -> bool:
    """Return whether a job server wants a token.

    Raises:
        UsageError: no job server answers.
    """
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=ANSWER_SECONDS) as answer:
            if "ray_version" in json.load(answer):
                return False
        reason = "what answers is no dashboard of Ray"
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return True
        reason = f"what answers is no dashboard of Ray (HTTP {error.code})"
    except Exception as error:  # refused, unknown, silent, or another protocol
        reason = first_line(getattr(error, "reason", None) or error)
    raise UsageError(
        f"--address {address}: no job server answers: {reason}\n"
        "    hint: it is part of the dashboard, on port 8265 of the head: `pip install 'ray[default]'` there, then "
        "`ray start --head --dashboard-host=...`; from outside, forward the port: `ssh -L 8265:localhost:8265 HEAD`"
    )


def _explained(address: str, error: Exception) -> UsageError:
    from ray.exceptions import AuthenticationError

    if isinstance(error, AuthenticationError):
        missing = str(error).startswith("Authentication required")
        what = "the cluster asks for a token, and there is none here" if missing else "the cluster refuses the token"
        return UsageError(
            f"--address {address}: {what}\n"
            "    hint: put the cluster's token into RAY_AUTH_TOKEN, a file named by RAY_AUTH_TOKEN_PATH, or "
            "~/.ray/auth_token"
        )
    if "ray[default]" in str(error):
        import ray

        return UsageError(
            f"jobs are submitted by what `ray[default]` brings, and it is not installed: pip install "
            f"'ray[default]=={ray.__version__}'"
        )
    # The server answers with its traceback, which says at its end what is wrong.
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = lines[-1] if "Traceback" in str(error) else first_line(error)
    return UsageError(f"--address {address}: {shorten(reason, 300)}")


@contextlib.contextmanager
def _unset(*names: str) -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)

"""Starts or joins Ray quietly, runs work in lanes on it, and leaves no process behind."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from orchestrator.dispatch.conductor import Rules
from orchestrator.dispatch.driver import Hooks, Outcome, RunState, environment
from orchestrator.dispatch.signals import DeferredInterrupt, children_ignore_hang_up
from orchestrator.dispatch.worker import DEFAULT_EXECUTOR
from orchestrator.errors import Interrupted, UsageError, first_line
from orchestrator.plan.jobs import Job
from orchestrator.plan.ledger import Ledger
from orchestrator.spec.infrastructure import ClusterSpec

# Only job descriptions travel through Ray's object store, never tensors.
OBJECT_STORE_BYTES = 128 * 2**20
EXIT_SECONDS = 2.0
CONNECT_SECONDS = 5.0

# What makes Ray Train quiet and quick to notice a dead worker.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # It ends a group where a node's time is over; the driver watches for itself, and has a checkpoint written before.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",
}
_LOCAL_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # What a dashboard would show, which is off: events of every call, metrics, what processes take of the machine.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "600000",
    "SCAN_EVENT_DIR_INTERVAL_SECONDS": "600",
    "RAY_memory_monitor_refresh_ms": "1000",
    # Workers kept ready for calls without an environment of their own; a lane's workers have one.
    "RAY_prestart_worker_first_driver": "0",
    # Ray's own 15 leaves a worker a thirtieth of a core that another process keeps busy.
    "RAY_worker_niceness": "0",
}


@dataclass
class RaySession:
    """A connection to Ray.

    Attributes:
        owned: Whether this process started the Ray it is connected to, and so ends it.
        folder: Ray's session folder with its logs.
    """

    owned: bool
    folder: Path
    _processes: list[psutil.Process] = field(default_factory=list)

    def remember_processes(self) -> None:
        """Note the processes of this session, so that those Ray forgets can be ended with it."""
        if self.owned:
            with contextlib.suppress(psutil.Error):
                known = {process.pid for process in self._processes}
                children = psutil.Process().children(recursive=True)
                self._processes += [child for child in children if child.pid not in known and _of(child, self.folder)]


@contextlib.contextmanager
def ray_session(address: str | None) -> Iterator[RaySession]:
    """Connect to Ray for the length of a `with` block.

    Args:
        address: None starts a Ray of our own, whatever else runs here; `auto`, `host:port` or `ray://...` joins one.
            Where this process is connected already, that connection is used and left open.

    Raises:
        UsageError: there is no Ray at the address, or none can be started here.
    """
    variables = {**_ENVIRONMENT, **(_LOCAL_ENVIRONMENT if address is None else _token_mode(address))}
    with environment(variables, keep=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Ray reads its environment when it is imported.
        import ray

        from orchestrator.dispatch.ray import compat

        if ray.is_initialized():
            yield RaySession(owned=False, folder=Path(compat.session_folder()))
            return
        compat.own_token(ours=address is None)
        with compat.own_sigterm_handler():
            if address is not None:
                _check_port(address, compat.host_and_port(address))
            _connect(address)
        compat.own_token(ours=False)  # where none could be made so, Ray has made one now
        compat.silence_driver()
        session = RaySession(owned=address is None, folder=Path(compat.session_folder()))
        try:
            session.remember_processes()
            yield session
        finally:
            session.remember_processes()
            _leave(session)


def _token_mode(address: str) -> dict[str, str]:
    """Return whether to send this user's token: to a cluster that asks for none it does harm, without it the other
    refuses.

    Asked by a process of its own, which takes half a second: Ray reads the mode once, when it is imported.
    """
    if address.startswith("ray://"):
        return {}  # the port of Ray's client answers no such question
    code = "import sys; from orchestrator.dispatch.ray.compat import greet; greet(sys.argv[1])"
    asked = subprocess.run(
        [sys.executable, "-c", code, address],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return {"RAY_AUTH_MODE": "token" if "AuthenticationError" in asked.stderr else "disabled"}


def _connect(address: str | None) -> None:
    import ray

    from orchestrator.dispatch.ray.compat import few_processes

    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            with few_processes(), children_ignore_hang_up():
                ray.init(
                    address="local",  # never join a Ray that happens to run here, not even one named by RAY_ADDRESS
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    **quiet,
                )
        else:
            ray.init(address=address, **quiet)
    except Exception as error:
        ray.shutdown()
        reason = first_line(error)
        if address is None:
            place = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
            hint = f"its logs are under {place}/ray/session_latest/logs"
            if "AF_UNIX" in reason:  # a batch system may give each job a folder with a long name
                hint = f"set RAY_TMPDIR to a folder with a shorter path than {place}, e.g. /tmp"
            raise UsageError(
                f"Ray could not be started on this machine: {reason}\n"
                f"    hint: {hint}; `llavolta run --local` works without Ray"
            ) from error
        raise _no_ray(address, reason) from error


def _check_port(address: str, place: tuple[str, int] | None) -> None:
    """Refuse an address nobody listens at; left to itself Ray tries for minutes and prints a line every few seconds.

    Raises:
        UsageError: there is no Ray at the address.
    """
    if place is None:
        return  # nothing to try: Ray looks for itself, or says what is wrong with it
    host, port = place
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise _no_ray(address, f"{host}:{port}: {error}") from error


def _no_ray(address: str, reason: str) -> UsageError:
    return UsageError(
        f"cluster.address: no Ray answers at {address!r}: {reason}\n"
        "    hint: start one with `ray start --head`, correct the address (a Ray that was killed leaves a stale one "
        "behind: `ray stop` clears it), or leave cluster.address out to start a local Ray"
    )


def _leave(session: RaySession) -> None:
    """Disconnect; of a session of our own, no process is left."""
    import ray

    ray.shutdown()
    if not session.owned:
        return
    # Ray's agents are known to outlive it when it ends in disorder. psutil compares start times, so a process that
    # got the number of a gone one is safe.
    for process in _wait_for_end(session._processes):
        with contextlib.suppress(psutil.Error):
            process.kill()
    _wait_for_end(session._processes)


def _wait_for_end(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Wait a little and return those still alive; a zombie, which only its parent can clear, is not."""
    deadline = time.monotonic() + EXIT_SECONDS
    alive = [process for process in processes if _is_alive(process)]
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        alive = [process for process in alive if _is_alive(process)]
    return alive


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _of(process: psutil.Process, session_folder: Path) -> bool:
    """Return whether a descendant of ours belongs to the session: a Ray process, or the child of one."""
    with contextlib.suppress(psutil.Error):
        for one in (process, *process.parents()):
            if one.pid == os.getpid():
                return False
            if one.name().startswith(("ray::", "raylet", "gcs_server")) or session_folder.name in " ".join(
                one.cmdline()
            ):
                return True
    return False


def run_on_ray(
    work: Sequence[Job],
    ledger: Ledger,
    cluster: ClusterSpec,
    hooks: Hooks,
    *,
    executor: str = DEFAULT_EXECUTOR,
    fail_fast: bool = False,
) -> Outcome:
    """Do the work in as many lanes as `cluster` says and return what became of it.

    Args:
        work: Jobs, parents before children; a parent that is not in the list is finished already.
        hooks: Called in this thread.
        executor: `module:function` that does one job.
        fail_fast: The first failed job ends the run.

    Raises:
        UsageError: no Ray at the address, or the cluster is too small for the lanes.
        StageRunError: no lane can run.
        Interrupted: KeyboardInterrupt, or `stop_asked` returned 2; no process of ours is left.
    """
    try:
        # Nothing below is torn apart by Ctrl-C: Ray is started, asked and ended in whole steps.
        with DeferredInterrupt() as interrupt, ray_session(cluster.address) as session:
            # Ray reads its environment when it is imported, which the session has set by now.
            from orchestrator.dispatch.ray.lanes import Lanes, collective_seconds

            def stop_asked() -> int:
                interrupt.check()
                hooks.on_tick()
                return hooks.stop_asked()

            rules = Rules.of(cluster, fail_fast, hooks.replans)
            state = RunState(work, hooks)
            patience = collective_seconds(hooks.checkpoint_bytes())
            return Lanes(state, ledger, cluster, executor, rules, patience, session.folder, stop_asked, hooks.say).run()
    except KeyboardInterrupt:
        raise Interrupted("stopped at once; interrupted work resumes from its last checkpoint") from None

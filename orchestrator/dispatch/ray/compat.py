"""The one place that touches Ray's private parts; test_ray_compat.py fails when one of them moves."""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import ray
import ray._private.node
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

from orchestrator.redaction import is_secret_variable

# The cleaner: an actor and about 12 s at the end of each run, and it frees nothing where no dashboard runs. It is
# there for a controller that dies while its driver lives on; here the driver frees the group itself then
# (`release_placement_group`), and where the driver dies Ray frees what belonged to its job.
# The datasets: two actors of Ray Data, which a lane does not use.
UNWANTED_CALLBACKS = (PlacementGroupCleanerCallback, DatasetsCallback)


class LaneTrainer(TorchTrainer):
    """A TorchTrainer that starts no actor a lane has no use for."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [*(each for each in callbacks if not isinstance(each, UNWANTED_CALLBACKS)), _EndSynchronization()]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if type(options["scaling_policy"]) is FixedScalingPolicy:
            options["scaling_policy"] = _FixedWorkers(self.scaling_config)
        return super()._initialize_and_run_controller(**options)


class _EndSynchronization(WorkerGroupCallback):
    """Ends the actor at which the workers of a group meet for `ray.train.report`, which no lane calls."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """End it; the group's own end does so again, which does nothing."""
        ray.kill(worker_group.get_worker_group_state().sync_actor)


class _FixedWorkers(FixedScalingPolicy):
    """Workers whose number stays, asked for by their placement group alone.

    Ray's own policy tells Ray Data's coordinator of them as well, an actor that imports Ray Data for it and wakes up
    for as long as the run lasts; a lane's first worker would wait for it.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        """Register nothing."""

    def _maybe_send_resource_request(self) -> None:
        """Renew nothing."""


# What a Ray of our own does without: the autoscaler (its one node stays), what brings logs to a driver (who reads them
# where they are), and the web server of a dashboard that is off. Each is a Python process that starts and wakes up
# beside training.
UNWANTED_SERVICES = ("start_monitor", "start_log_monitor", "start_api_server")


@contextlib.contextmanager
def few_processes() -> Iterator[None]:
    """Let a Ray that starts in the block start without `UNWANTED_SERVICES`."""
    node = ray._private.node.Node
    before = {name: getattr(node, name) for name in UNWANTED_SERVICES}
    try:
        for name in before:
            setattr(node, name, lambda *_, **__: None)
        yield
    finally:
        for name, start in before.items():
            setattr(node, name, start)


def current_placement_group() -> str | None:
    """Return the hexadecimal id of the placement group this worker runs in, or None."""
    from ray.util.placement_group import get_current_placement_group

    group = get_current_placement_group()
    return None if group is None else group.id.hex()


def release_placement_group(group_id: str) -> None:
    """Free a placement group by its hexadecimal id; one that is gone already is no error."""
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group_id))))


def free_resources() -> list[dict[str, float]]:
    """Return what of each living node's resources nobody holds."""
    from ray._private.state import available_resources_per_node

    if ray.util.client.ray.is_connected():  # Ray's client gives sums only
        return [ray.available_resources()]
    return [dict(free) for free in available_resources_per_node().values()]


def draining_nodes() -> set[str]:
    """Return the ids of the nodes that are about to be taken away: Ray puts nothing new on them."""
    if ray.util.client.ray.is_connected():  # Ray's client does not tell
        return set()
    return set(ray._private.state.state.get_draining_nodes())


def session_folder() -> str:
    """Return the folder of the Ray session this process is connected to, e.g. `/tmp/ray/session_2026-01-01_...`."""
    return str(ray._private.worker.global_worker.node.get_session_dir_path())


def kill_controllers() -> None:
    """End the Train controllers of this driver at once; each runs on the driver's own machine.

    A thread that waits for one in `fit` gets its error and ends. Shutting Ray down under such a thread crashes the
    process (SIGSEGV, seen in one of four runs).
    """
    from ray._private.state import actors

    job = ray.get_runtime_context().get_job_id()
    for actor in actors().values():
        ours = actor["JobID"] == job and actor["State"] == "ALIVE"
        if ours and "TrainController" in actor["ActorClassName"] and actor["Pid"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(actor["Pid"], signal.SIGKILL)


def silence_driver() -> None:
    """Keep Ray from printing what befell a worker ("A worker died ...") on the driver's terminal.

    `log_to_driver=False` does not cover it. What happened reaches the user as an event, in one sentence.
    """
    import ray._private.worker as worker

    worker.print_to_stdstream = lambda *arguments, **options: None


@contextlib.contextmanager
def own_sigterm_handler() -> Iterator[None]:
    """Keep this process's SIGTERM handler, although Ray starts in the block; without one, Ray's stays.

    Ray replaces it by one that ends the process, and its C++ side puts one of its own before it, which calls it and
    three seconds later, by SIGALRM, aborts (exit code -6, seen with Ray 2.60).
    """
    import ray._private.utils as utils

    handler, set_handler = signal.getsignal(signal.SIGTERM), utils.set_sigterm_handler
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)
        handler(number, frame)

    signal.signal(signal.SIGTERM, handle)
    utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = set_handler
        signal.signal(signal.SIGTERM, handler)  # on the C side too
        if came:
            signal.alarm(0)


def keep_credentials_from_trials() -> None:
    """Keep Ray Tune from handing credentials to its trials, which need none: they wait for what the lanes do.

    It puts AWS_SECRET_ACCESS_KEY and others into the trials' `runtime_env`, which Ray writes into
    `runtime_env_agent.log` and shows in its dashboard.
    """
    from ray.tune.execution import class_cache

    names = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not is_secret_variable(name)}


def own_token(ours: bool) -> None:
    """Make the token by which this user's Ray knows him, or find it, for this user's eyes only.

    Ray 2.60 makes it with the first Ray of this user and leaves `~/.ray/auth_token` to the umask, 0644 mostly; who
    can read it runs code as this user.

    Args:
        ours: The Ray is started by this process, so that a home that cannot be written needs no file: the token is
            inherited.
    """
    from ray._private.authentication import authentication_token_setup as setup
    from ray._private.authentication.authentication_token_generator import generate_new_authentication_token

    path = setup._get_default_token_path()
    loader = setup.AuthenticationTokenLoader.instance()
    try:
        if path.exists():
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
            return
        if os.environ.get(setup.AUTH_MODE_ENV_VAR, "token") != "token" or loader.has_token(ignore_auth_mode=True):
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        try:
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(generate_new_authentication_token())
            with contextlib.suppress(FileExistsError):  # another process was quicker
                os.link(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError:
        if ours and not loader.has_token(ignore_auth_mode=True):
            os.environ["RAY_AUTH_TOKEN"] = generate_new_authentication_token()
    loader.reset_cache()


def host_and_port(address: str) -> tuple[str, int] | None:
    """Return where a cluster's address leads; None where there is nothing to try.

    `auto` is what RAY_ADDRESS says, or what `ray start` noted on this machine, whether or not that Ray still lives.
    """
    from ray._private.utils import read_ray_address

    wanted = (os.environ.get("RAY_ADDRESS") or read_ray_address()) if address == "auto" else address
    host, separator, port = (wanted or "").rpartition("://")[2].rpartition(":")
    return (host.strip("[]"), int(port)) if separator and port.isdigit() else None


def greet(address: str) -> None:
    """Ask a cluster for something small.

    Raises:
        OSError: nobody listens there; left to itself Ray would try for most of a minute.
        ray.exceptions.AuthenticationError: it asks for a token that was not sent.
    """
    place = host_and_port(address)
    if place is not None:
        socket.create_connection(place, timeout=5).close()
        raylet: Any = importlib.import_module("ray._raylet")
        raylet.GcsClient(address=f"{place[0]}:{place[1]}").internal_kv_keys(b"", None, 5)

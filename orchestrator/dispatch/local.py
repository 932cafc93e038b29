"""run_local(): does a work list in this process, without Ray, so that a debugger can step through it."""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.dispatch.conductor import Conductor
from orchestrator.dispatch.execute import DEFAULT_EXECUTOR
from orchestrator.dispatch.failures import describe
from orchestrator.dispatch.lane import forget
from orchestrator.dispatch.outcome import Outcome
from orchestrator.dispatch.record import Teller
from orchestrator.dispatch.worker_log import append_traceback, log_path
from orchestrator.errors import Interrupted
from orchestrator.plan.jobs import Job, job_from_json, job_to_json
from orchestrator.registry import load_object
from orchestrator.spec.infrastructure import ClusterSpec

if TYPE_CHECKING:
    from orchestrator.plan.ledger import Ledger

LANE = "local"


def run_local(
    work: Sequence[Job],
    ledger: Ledger,
    cluster: ClusterSpec,
    on_event: Callable[[Mapping[str, Any]], None],
    should_stop: Callable[[], bool | int] = lambda: False,
    *,
    executor: str = DEFAULT_EXECUTOR,
    fail_fast: bool = False,
) -> Outcome:
    """Does the work as one worker in this thread; arguments, events and outcome are those of `run_on_ray`.

    What jobs print goes to the terminal; a failed job's traceback goes to its log as well.

    Raises:
        Interrupted: KeyboardInterrupt.
    """
    teller = Teller(ledger, on_event)
    conductor = Conductor([job_to_json(job) for job in work], cluster.max_failures, fail_fast)
    memory: dict[str, Any] = {}

    def stop_asked() -> bool:
        if should_stop():
            conductor.interrupt()
        return conductor.stopping()

    try:
        with _single_process_group(cluster):
            run = load_object(executor)
            while _next_attempt(conductor, run, ledger, memory, stop_asked, teller):
                pass
    except KeyboardInterrupt:
        raise Interrupted("stopped at once; what was under way goes on from its last checkpoint") from None
    finally:
        forget(memory)
    return conductor.outcome()


def _next_attempt(
    conductor: Conductor,
    run: Callable[..., str],
    ledger: Ledger,
    memory: dict[str, Any],
    stop_asked: Callable[[], bool],
    teller: Teller,
) -> bool:
    """Works until the conductor says stop (False) or wants a fresh start (True)."""
    attempt = conductor.begin(LANE, world_size=1)
    k = 0
    while True:
        stop_asked()
        item = conductor.item(attempt, k)
        teller.tell(conductor.events(teller.seen))
        if isinstance(item, str):
            return item != "stop"
        job = job_from_json(item)
        try:
            ending = run(job, ledger, memory, stop_asked)
        except Exception as error:
            forget(memory)
            append_traceback(log_path(ledger.work_folder(job.id), 0), error, 0)
            conductor.failed(attempt, k, 0, describe(error).to_json())
        else:
            report = conductor.interrupted if ending == "interrupted" else conductor.finished
            report(attempt, k, 0)
        teller.tell(conductor.events(teller.seen))
        k += 1


@contextlib.contextmanager
def _single_process_group(cluster: ClusterSpec) -> Iterator[None]:
    """A process group of one, as a worker of a lane would find it; one that exists already is used."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    use_gpu = torch.cuda.is_available() and cluster.use_gpu is not False
    variables = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    if not use_gpu:
        variables["DS_ACCELERATOR"] = "cpu"
    before = {name: os.environ.get(name) for name in variables}
    threads_before = torch.get_num_threads()
    os.environ.update(variables)
    torch.set_num_threads(max(1, math.floor(cluster.resources_per_worker.get("CPU", 1))))
    dist.init_process_group("nccl" if use_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads_before)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

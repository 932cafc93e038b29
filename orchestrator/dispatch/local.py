"""run_local(): does a work list in this process, without Ray, so that a debugger can step through it."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from orchestrator.dispatch.account import Account
from orchestrator.dispatch.conductor import STOP, WAIT, Conductor
from orchestrator.dispatch.execute import DEFAULT_EXECUTOR
from orchestrator.dispatch.failures import describe
from orchestrator.dispatch.feed import Feed, Planned
from orchestrator.dispatch.lane import forget
from orchestrator.dispatch.outcome import Outcome
from orchestrator.dispatch.rules import Rules, new_driver
from orchestrator.dispatch.worker_log import append_traceback, log_path
from orchestrator.errors import Interrupted, StorageError, UsageError
from orchestrator.plan.jobs import Job, job_from_json
from orchestrator.plan.ledger import Ledger
from orchestrator.registry import load_object
from orchestrator.spec.infrastructure import ClusterSpec

LANE = "local"
PAUSE_SECONDS = 0.1


def run_local(
    work: Sequence[Job],
    ledger: Ledger,
    cluster: ClusterSpec,
    on_event: Callable[[Mapping[str, Any]], None],
    should_stop: Callable[[], bool | int] = lambda: False,
    *,
    executor: str = DEFAULT_EXECUTOR,
    fail_fast: bool = False,
    feed: Feed | None = None,
) -> Outcome:
    """Do the work as one worker in this thread; arguments, events and outcome are those of `run_on_ray`.

    What jobs print goes to the terminal; a failed job's traceback goes to its log as well.

    Raises:
        UsageError: a GPU is asked for and there is none.
        Interrupted: KeyboardInterrupt.
    """
    planned, account = Planned(work, feed), Account(on_event)
    conductor = Conductor(ledger.url, new_driver(), Rules.of(cluster, fail_fast, plans_again=feed is not None))
    lane = _Lane(conductor, planned, account, Ledger(ledger.url), should_stop)
    try:
        with _single_process_group(cluster):
            lane.work(load_object(executor))
    except KeyboardInterrupt:
        raise Interrupted("stopped at once; what was under way goes on from its last checkpoint") from None
    finally:
        forget(lane.memory)
        conductor.leave()
    return account.outcome(planned.jobs, lane.was_asked)


class _Lane:
    """The driver and the one worker of its one lane, in one thread."""

    def __init__(
        self,
        conductor: Conductor,
        planned: Planned,
        account: Account,
        ledger: Ledger,
        should_stop: Callable[[], bool | int],
    ) -> None:
        self._conductor, self._planned, self._account = conductor, planned, account
        self._ledger, self._should_stop = ledger, should_stop
        self.memory: dict[str, Any] = {}
        self.was_asked = False
        conductor.set_work(planned.jobs, planned.closed)

    def work(self, run: Callable[..., str]) -> None:
        """Do items until there are no more."""
        while not self._attempt(run):
            pass

    def _attempt(self, run: Callable[..., str]) -> bool:
        """Work until the conductor says stop (True) or wants a fresh start (False)."""
        who = {"lane": LANE, "attempt": uuid.uuid4().hex, "world_size": 1, "rank": 0}
        self._conductor.begin(who)
        k, last, report = 0, None, None
        while True:
            self._is_stop_asked()
            item = self._conductor.next_item(who, k, last, report)
            self._hear()
            if item == WAIT:
                time.sleep(PAUSE_SECONDS)
            elif isinstance(item, str):
                return item == STOP
            else:
                job = job_from_json(item["job"])
                self._ledger.fences = {job.id: item["token"]}
                report = self._do(job, run)
                k, last = k + 1, job.id

    def _do(self, job: Job, run: Callable[..., str]) -> str | dict[str, Any]:
        try:
            return run(job, self._ledger, self.memory, self._is_stop_asked)
        except Exception as error:
            forget(self.memory)
            append_traceback(log_path(self._ledger.work_folder(job.id), 0), error, 0)
            with contextlib.suppress(StorageError):
                self._ledger.share_progress(job.id)
            return describe(error).to_json()

    def _hear(self) -> None:
        news = self._conductor.poll(self._account.epoch, self._account.seen)
        self._account.epoch = news["epoch"]
        self._account.take(news["events"])
        if self._planned.look():
            self._conductor.set_work(self._planned.jobs, self._planned.closed)

    def _is_stop_asked(self) -> bool:
        if self._should_stop() and not self.was_asked:
            self.was_asked = True
            self._conductor.interrupt()
        return self._conductor.is_stopping()


@contextlib.contextmanager
def _single_process_group(cluster: ClusterSpec) -> Iterator[None]:
    """Return a process group of one, as a worker of a lane would find it; one that exists already is used."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    asked = cluster.use_gpu is True or cluster.resources_per_worker.get("GPU", 0) > 0
    if asked and not torch.cuda.is_available():
        raise UsageError(
            "cluster: use_gpu or resources_per_worker asks for a GPU, and torch sees none on this machine\n"
            "    hint: cluster.use_gpu: auto takes what there is"
        )
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
        # DeepSpeed keeps groups made within this one; its own call forgets them, else the next run would use them.
        comm = sys.modules.get("deepspeed.comm")
        (comm if comm is not None and comm.is_initialized() else dist).destroy_process_group()
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

"""The driver's side of a run, however it is dispatched: hooks, job states, outcome; and the run in this process."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.dispatch.conductor import STOP, WAIT, Conductor, Rules, new_driver
from orchestrator.dispatch.worker import DEFAULT_EXECUTOR, do_job, forget
from orchestrator.errors import Interrupted, UsageError
from orchestrator.plan.jobs import Job, job_from_json, job_to_json
from orchestrator.plan.ledger import Ledger
from orchestrator.spec.infrastructure import ClusterSpec

_ENDINGS = ("finished", "failed", "skipped")

# How long a thread of libgomp spins before it sleeps while others work: by default so long (300,000 turns) that a step
# takes several times its time as soon as one core is busy with something else. It is read when torch is imported.
PATIENCE = {"GOMP_SPINCOUNT": "10000"}


class Hooks:
    """What a dispatcher calls in the driver's thread; a driver overrides what it needs.

    Attributes:
        replans: Whether `newer_work` brings a new plan after a stored state turned out to be damaged.
    """

    replans = False

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Take an event.

        `event` holds `event` (started, finished, failed, retried, interrupted, skipped, damaged), `id`, `type`,
        `attempt`, and where there is one `lane`, `error`, `kind` (of the error), `elsewhere` (another driver did it)
        and `state` (the damaged state, which the ledger has let go of).
        """

    def on_tick(self) -> None:
        """Do what is due; called about ten times a second, in a local run between steps too. Must return at once."""

    def say(self, text: str) -> None:
        """Tell the user why nothing happens yet."""

    def stop_asked(self) -> int:
        """Return 0 to continue, 1 to checkpoint and end the lanes, 2 to stop at once; asked after each tick."""
        return 0

    def newer_work(self) -> Sequence[Job] | None:
        """Return the newest complete plan, parents before children; None if nothing changed.

        A job that has not begun and is not in it is dropped.
        """
        return None

    def checkpoint_bytes(self) -> float:
        """Return the size of the largest checkpoint: the ranks of a lane wait for the one that moves it."""
        return 0.0

    def is_closed(self) -> bool:
        """Return whether no newer work will come: the run ends when the work is done."""
        return True


@dataclass(frozen=True)
class Outcome:
    """What became of the work.

    Attributes:
        finished: Ids of finished jobs, in the order the driver heard of it (of some late, if a conductor was lost).
        failed: Job id to reason.
        skipped: Ids of jobs whose parent failed.
        left: Ids of jobs not done because the run was stopped.
        interrupted: Whether a stop was asked for.
    """

    finished: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    interrupted: bool = False


class RunState:
    """The newest plan and how its jobs ended; it outlives a conductor that dies.

    Each event is passed on once and in order.

    Args:
        work: The first plan.
        hooks: The driver's.

    Attributes:
        jobs: The newest plan, as `job_to_json` writes it.
        is_closed: Whether no newer plan will come.
        epoch: Which life of the conductor the latest events came from.
        seen: How many of that life's events were taken.
    """

    def __init__(self, work: Sequence[Job], hooks: Hooks) -> None:
        self._hooks = hooks
        self._endings: dict[str, str] = {}
        self._errors: dict[str, str] = {}
        self._attempts: dict[str, int] = {}
        self.jobs: list[Mapping[str, Any]] = [job_to_json(job) for job in work]
        self.is_closed = hooks.is_closed()
        self.epoch = ""
        self.seen = 0

    def refresh(self) -> tuple[list[Mapping[str, Any]] | None, bool] | None:
        """Ask for newer work; return what is new as `Conductor.set_work` takes it, None if nothing is."""
        # In this order: what came with the end is in the plan asked for after it.
        before, self.is_closed = self.is_closed, self._hooks.is_closed()
        work = self._hooks.newer_work()
        if work is None:
            return None if self.is_closed == before else (None, self.is_closed)
        self.jobs = [job_to_json(job) for job in work]
        return self.jobs, self.is_closed

    def take(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Take the events since `seen`."""
        for event in events:
            self.seen += 1
            if self._is_new(event):
                self._hooks.on_event(event)

    def _is_new(self, event: Mapping[str, Any]) -> bool:
        name, kind = event["id"], event["event"]
        if kind == "damaged":
            # What it was is gone: it will finish a second time.
            self._endings.pop(event["state"], None)
            return True
        if kind == "started":
            self._attempts[name] = event["attempt"]
            self._endings.pop(name, None)
        if kind not in _ENDINGS:
            return True
        if self._endings.get(name) == kind:
            return False
        self._endings[name] = kind
        if kind == "failed":
            self._errors[name] = event["error"]
        return True

    def known(self) -> dict[str, Any]:
        """Return what a restarted conductor has to know: `endings` and `attempts` by job."""
        return {"endings": dict(self._endings), "attempts": dict(self._attempts)}

    def outcome(self, interrupted: bool) -> Outcome:
        """Return what became of the work."""
        ended: dict[str, list[str]] = {kind: [] for kind in _ENDINGS}
        for name, kind in self._endings.items():
            ended[kind].append(name)
        return Outcome(
            finished=tuple(ended["finished"]),
            failed={name: self._errors[name] for name in ended["failed"]},
            skipped=tuple(ended["skipped"]),
            left=tuple(str(job["id"]) for job in self.jobs if job["id"] not in self._endings),
            interrupted=interrupted,
        )


LANE = "local"
PAUSE_SECONDS = 0.1


def run_local(
    work: Sequence[Job],
    ledger: Ledger,
    cluster: ClusterSpec,
    hooks: Hooks,
    *,
    executor: str = DEFAULT_EXECUTOR,
    fail_fast: bool = False,
) -> Outcome:
    """Do the work as one worker in this thread; arguments, events and outcome are those of `run_on_ray`.

    What jobs print goes to the terminal; a failed job's traceback goes to its log as well.

    Raises:
        UsageError: a GPU is asked for and there is none.
        Interrupted: KeyboardInterrupt.
    """
    conductor = Conductor(ledger.url, new_driver(), Rules.of(cluster, fail_fast, hooks.replans))
    lane = _Lane(conductor, RunState(work, hooks), Ledger(ledger.url), hooks)
    try:
        with environment(PATIENCE, keep=True), _single_process_group(cluster):
            lane.work(executor)
    except KeyboardInterrupt:
        raise Interrupted("stopped at once; interrupted work resumes from its last checkpoint") from None
    finally:
        forget(lane.memory)
        conductor.leave()
    return lane.state.outcome(lane.was_asked)


class _Lane:
    """The driver and the one worker of its one lane, in one thread."""

    def __init__(self, conductor: Conductor, state: RunState, ledger: Ledger, hooks: Hooks) -> None:
        self._conductor, self._ledger, self._hooks = conductor, ledger, hooks
        self.state = state
        self.memory: dict[str, Any] = {}
        self.was_asked = False
        conductor.set_work(state.jobs, state.is_closed)

    def work(self, executor: str) -> None:
        """Do items until there are no more."""
        while not self._attempt(executor):
            pass

    def _attempt(self, executor: str) -> bool:
        """Work until the conductor says stop (True) or wants a fresh start (False)."""
        who = {"lane": LANE, "attempt": uuid.uuid4().hex, "world_size": 1, "rank": 0}
        self._conductor.begin(who)
        k, last, report = 0, None, None
        while True:
            self._is_stop_asked()
            item = self._conductor.next_item(who, k, last, report)
            self._poll()
            if item == WAIT:
                time.sleep(PAUSE_SECONDS)
            elif isinstance(item, str):
                return item == STOP
            else:
                job = job_from_json(item["job"])
                self._ledger.fences = {job.id: item["token"]}
                report = do_job(executor, job, self._ledger, self.memory, self._is_stop_asked)
                k, last = k + 1, job.id

    def _poll(self) -> None:
        news = self._conductor.poll(self.state.epoch, self.state.seen)
        self.state.epoch = news["epoch"]
        self.state.take(news["events"])
        if (newer := self.state.refresh()) is not None:
            self._conductor.set_work(*newer)

    def _is_stop_asked(self) -> bool:
        self._hooks.on_tick()
        if self._hooks.stop_asked() and not self.was_asked:
            self.was_asked = True
            self._conductor.interrupt()
        return self._conductor.is_stopping()


@contextlib.contextmanager
def _single_process_group(cluster: ClusterSpec) -> Iterator[None]:
    """Hold a process group of one, as a worker of a lane would find it; an existing one is used."""
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
    threads_before = torch.get_num_threads()
    with environment(variables):
        torch.set_num_threads(max(1, math.floor(cluster.resources_per_worker.get("CPU", 1))))
        dist.init_process_group("nccl" if use_gpu else "gloo")
        try:
            yield
        finally:
            # DeepSpeed keeps groups made within this one; its own call forgets them, else the next run would use them.
            comm = sys.modules.get("deepspeed.comm")
            (comm if comm is not None and comm.is_initialized() else dist).destroy_process_group()
            torch.set_num_threads(threads_before)


@contextlib.contextmanager
def environment(variables: Mapping[str, str], keep: bool = False) -> Iterator[None]:
    """Set environment variables for the length of a `with` block.

    Args:
        keep: Leaves those that are set already as they are.
    """
    before = {name: os.environ.get(name) for name in variables}
    changed = [name for name, value in before.items() if value is None or not keep]
    os.environ.update({name: variables[name] for name in changed})
    try:
        yield
    finally:
        for name in changed:
            os.environ.pop(name, None)
            if (value := before[name]) is not None:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

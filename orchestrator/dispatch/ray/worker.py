"""A lane's workers: each rank asks the conductor for item after item and does it, inside Ray Train's process group."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from orchestrator.dispatch.conductor import RESTART, STOP, WAIT
from orchestrator.dispatch.ray.compat import current_placement_group
from orchestrator.dispatch.worker import do_job, log_path, now, printed_to
from orchestrator.plan.jobs import Job, job_from_json
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.process import start_ticks

HEARTBEAT_SECONDS = 0.3


class Heartbeat:
    """Sends heartbeats from a thread of its own; calling it counts as progress and returns whether to stop.

    So a stage run asks it at every step without a call to the conductor, and continues while there is none.

    Args:
        conductor: The actor's handle.
        who: The rank, as the conductor's `heartbeat` takes it.
    """

    def __init__(self, conductor: Any, who: Mapping[str, Any]) -> None:
        self._conductor = conductor
        self._who = who
        self._progress = 0
        self._stop = threading.Event()
        self._leave = threading.Event()
        self._has_dumped = False
        self.log: Path | None = None
        """Where the stacks go: the log of the current job."""
        self.at: tuple[int, str | None] | None = None
        """Number of the current item and the job before it."""
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def __call__(self) -> bool:
        """Return whether this rank should leave at the next checkpoint."""
        self._progress += 1
        return self._stop.is_set()

    def close(self) -> None:
        """End the beating."""
        self._leave.set()

    def _beat(self) -> None:

        while not self._leave.wait(HEARTBEAT_SECONDS):
            try:
                heard = ray.get(self._conductor.heartbeat.remote(self._who, self._progress, self._has_dumped, self.at))
            except ray.exceptions.RayError:
                return  # it is gone for good, and with it the driver; the next call for an item says so
            if heard["stop"]:
                self._stop.set()
            if heard["dump"]:
                self._dump()

    def _dump(self) -> None:
        self._has_dumped = True
        if self.log is not None:
            with contextlib.suppress(OSError), self.log.open("a", encoding="utf-8") as log:
                log.write(f"[{now()}] rank {self._who['rank']} hangs; where its threads are:\n")
                log.flush()
                faulthandler.dump_traceback(file=log, all_threads=True)


SHORTEST_PAUSE_SECONDS = 0.01
LONGEST_PAUSE_SECONDS = 0.25


class LaneRestart(Exception):
    """Ends this worker group so that Ray Train starts a fresh one; its job was queued again."""


def run_lane(config: dict[str, Any]) -> None:
    """Ray Train's loop on one worker.

    Args:
        config: `conductor` (actor handle), `lane`, `storage`, `executor`, `threads`.
    """
    import torch
    import torch.distributed as dist

    attempt = [uuid.uuid4().hex]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(attempt, src=0, device=_collective_device())
    who = {"lane": config["lane"], "attempt": attempt[0], "world_size": dist.get_world_size(), **_this_process()}
    torch.set_num_threads(config["threads"])
    worker = _Worker(config, who)
    worker.begin()
    heartbeat = Heartbeat(config["conductor"], who)
    try:
        worker.work(heartbeat)
    finally:
        heartbeat.close()


class _Worker:
    """One rank of one attempt."""

    def __init__(self, config: dict[str, Any], who: dict[str, Any]) -> None:
        self._conductor = config["conductor"]
        self._who = who
        self._ledger = Ledger(config["storage"])
        self._executor = config["executor"]
        self._memory: dict[str, Any] = {}

    def begin(self) -> None:
        """Rank 0 tells that the group is there; no other rank asks before that."""
        import torch.distributed as dist

        if self._who["rank"] == 0:
            ray.get(self._conductor.begin.remote(self._who))
        dist.barrier()

    def work(self, heartbeat: Heartbeat) -> None:
        k, last, report = 0, None, None
        pause_seconds = SHORTEST_PAUSE_SECONDS
        while True:
            item = self._next(k, last, report)
            if item == STOP:
                return
            if item == RESTART:
                raise LaneRestart("the conductor gave this worker group up")
            if item == WAIT:
                time.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
                continue
            pause_seconds = SHORTEST_PAUSE_SECONDS
            job = job_from_json(item["job"])
            self._ledger.fences = {job.id: item["token"]}
            heartbeat.at = (k, last)
            report = self._do(job, heartbeat)
            k, last, heartbeat.at = k + 1, job.id, None

    def _do(self, job: Job, heartbeat: Heartbeat) -> str | dict[str, Any]:
        """Do a job and return what to report of it."""
        rank = self._who["rank"]
        heartbeat.log = log_path(self._ledger.work_folder(job.id), rank)
        try:
            with printed_to(heartbeat.log):
                print(f"[{now()}] {type(job).__name__} {job.id}, process {os.getpid()}", flush=True)
            printing = printed_to(heartbeat.log)
            return do_job(self._executor, job, self._ledger, self._memory, heartbeat, rank=rank, printing=printing)
        finally:
            heartbeat.log = None

    def _next(self, k: int, last: str | None, report: str | dict[str, Any] | None) -> Any:

        return ray.get(self._conductor.next_item.remote(self._who, k, last, report))


def _this_process() -> dict[str, Any]:
    import torch.distributed as dist

    return {
        "rank": dist.get_rank(),
        "pid": os.getpid(),
        "started": start_ticks(),
        "node": ray.get_runtime_context().get_node_id(),
        "placement_group": current_placement_group(),
    }


def _collective_device() -> Any:
    import torch
    import torch.distributed as dist

    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")

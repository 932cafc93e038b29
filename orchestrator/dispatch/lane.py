"""A lane's workers: each rank asks the conductor for item after item and does it, inside Ray Train's process group."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Any

from orchestrator.dispatch.conductor import RESTART, STOP, WAIT
from orchestrator.dispatch.failures import describe
from orchestrator.dispatch.worker_log import append_traceback, log_path, now, printed_to
from orchestrator.plan.jobs import Job, job_from_json
from orchestrator.plan.ledger import Ledger
from orchestrator.registry import load_object

SHORTEST_PAUSE_SECONDS = 0.01
LONGEST_PAUSE_SECONDS = 0.25
STOP_POLL_SECONDS = 0.3


class LaneRestart(Exception):
    """Ends this worker group so that Ray Train starts a fresh one; the work in hand was given back."""


class StopFlag:
    """Knows, without a call to the conductor at every step, whether a stop was asked for."""

    def __init__(self, conductor: Any) -> None:
        self._conductor = conductor
        self._set = threading.Event()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop-flag", daemon=True)
        self._thread.start()

    def __call__(self) -> bool:
        """Whether this rank should leave at the next checkpoint."""
        return self._set.is_set()

    def close(self) -> None:
        """Ends the watching thread."""
        self._leave.set()

    def _watch(self) -> None:
        import ray

        while not self._leave.wait(STOP_POLL_SECONDS):
            try:
                if ray.get(self._conductor.stopping.remote()):
                    self._set.set()
                    return
            except ray.exceptions.RayError:
                return  # the conductor is gone; the next call for an item says so


def run_lane(config: dict[str, Any]) -> None:
    """Ray Train's loop on one worker.

    Args:
        config: `conductor` (actor handle), `lane`, `storage`, `executor`, `threads`.
    """
    import ray
    import torch
    import torch.distributed as dist

    from orchestrator.dispatch.ray_compat import current_placement_group

    torch.set_num_threads(config["threads"])
    rank, world_size = dist.get_rank(), dist.get_world_size()
    conductor = config["conductor"]
    number = [-1]
    if rank == 0:
        number = [ray.get(conductor.begin.remote(config["lane"], world_size, current_placement_group()))]
    if world_size > 1:
        dist.broadcast_object_list(number, src=0, device=_collective_device())
    worker = _Worker(config, number[0], rank)
    should_stop = StopFlag(conductor)
    try:
        worker.work(should_stop)
    finally:
        should_stop.close()


def forget(memory: dict[str, Any]) -> None:
    """Lets go of all a worker kept: after a failure none of it can be trusted."""
    for value in memory.values():
        with contextlib.suppress(Exception):
            value.release()
    memory.clear()


class _Worker:
    """One rank of one attempt."""

    def __init__(self, config: dict[str, Any], attempt: int, rank: int) -> None:
        self._conductor = config["conductor"]
        self._attempt = attempt
        self._rank = rank
        self._ledger = Ledger(Path(config["storage"]))
        self._executor = config["executor"]
        self._memory: dict[str, Any] = {}

    def work(self, should_stop: StopFlag) -> None:
        k = 0
        pause_seconds = SHORTEST_PAUSE_SECONDS
        while True:
            item = self._call("item", k)
            if item == STOP:
                return
            if item == RESTART:
                raise LaneRestart("the conductor gave this worker group up")
            if item == WAIT:
                time.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
                continue
            pause_seconds = SHORTEST_PAUSE_SECONDS
            self._do(job_from_json(item), k, should_stop)
            k += 1

    def _do(self, job: Job, k: int, should_stop: StopFlag) -> None:
        folder = self._ledger.work_folder(job.id)
        try:
            with printed_to(log_path(folder, self._rank)):
                print(f"[{now()}] {type(job).__name__} {job.id}, process {os.getpid()}", flush=True)
                ending = load_object(self._executor)(job, self._ledger, self._memory, should_stop)
        except Exception as error:
            forget(self._memory)
            append_traceback(log_path(folder, 0), error, self._rank)
            self._call("failed", k, self._rank, describe(error).to_json())
            return
        self._call("interrupted" if ending == "interrupted" else "finished", k, self._rank)

    def _call(self, method: str, *arguments: Any) -> Any:
        import ray

        return ray.get(getattr(self._conductor, method).remote(self._attempt, *arguments))


def _collective_device() -> Any:
    import torch
    import torch.distributed as dist

    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")

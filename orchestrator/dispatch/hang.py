"""Ends the processes of a worker group that hangs, each by a task on its own node, and notes in its log why."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.dispatch.worker_log import log_path, now
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.process import start_ticks

KILL_SECONDS = 20.0


def end_processes(ranks: Sequence[Mapping[str, Any]], url: str) -> None:
    """Kill ranks as `Conductor.poll` names them under `hung`; a node that is gone took its ranks along.

    Args:
        url: The storage, for the logs.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(end_process)
    done = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(rank["node"], soft=False)).remote(rank, url)
        for rank in ranks
    ]
    ray.wait(done, num_returns=len(done), timeout=KILL_SECONDS)


def end_process(rank: Mapping[str, Any], url: str) -> None:
    """Kill one rank's process on this node; what could not write its stacks itself gets what the system knows.

    Args:
        rank: `pid` and `started` (ticks) of the process, its `rank` and `job`, whether it is `silent`, and `why`.
    """
    if start_ticks(rank["pid"]) != rank["started"]:
        return  # another process got its number
    if rank["job"] is not None:
        _note(log_path(Ledger(url).work_folder(rank["job"]), rank["rank"]), rank)
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank["pid"], signal.SIGKILL)


def _note(log: Path, rank: Mapping[str, Any]) -> None:
    lines = [f"[{now()}] rank {rank['rank']}, process {rank['pid']}, is killed: {rank['why']}"]
    if rank["silent"]:
        lines += [f"it is silent; {line}" for line in _state_of(rank["pid"])]
    with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def _state_of(pid: int) -> list[str]:
    """Return what /proc knows of a process that says nothing: its state and where in the kernel it waits."""
    found = []
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        found += [line for line in status if line.startswith("State:")]
    with contextlib.suppress(OSError):
        found.append(f"wchan: {Path(f'/proc/{pid}/wchan').read_text() or '0'}")
    return found

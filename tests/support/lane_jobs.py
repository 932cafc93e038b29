"""Trivial executors that stand in for training: they leave marks in the storage."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

from orchestrator.errors import DataError


def marks(ledger) -> Path:
    folder = ledger.storage / "marks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def once(path: Path) -> bool:
    """True for the first caller, over all processes."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def meet(job, ledger, memory, should_stop):
    """Each rank writes down the names of all ranks' machines, which it has from them."""
    import torch.distributed as dist

    names = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    (marks(ledger) / f"rank{dist.get_rank()}").write_text(" ".join(sorted(names)))
    return "finished"


def run(job, ledger, memory, should_stop):
    """What a job does is its `model["do"]`; each rank appends a line to `order`."""
    import torch
    import torch.distributed as dist

    rank, do = dist.get_rank(), job.model.get("do", "")
    folder = marks(ledger)
    memory["jobs"] = [*memory.get("jobs", []), job.id]
    print(f"hello from {job.id} rank {rank}", flush=True)
    os.system(f"echo child of {job.id}")
    if do == "raise":
        raise DataError("row 7: the image is broken")
    if do == "raise_on_rank_1" and rank == 1:
        raise DataError("row 8: the image is broken")
    if do == "flaky" and rank == 0 and once(folder / f"{job.id}.flaky"):
        raise ConnectionResetError("the file server went away")
    if do == "always_flaky":
        raise ConnectionResetError("the file server went away")
    if do == "kill" and rank == dist.get_world_size() - 1 and once(folder / f"{job.id}.killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "begin_together":  # with the job of the other lane; alone it would wait for ever
        (folder / f"{job.id}.running").touch()
        while len(list(folder.glob("*.running"))) < 2:
            should_stop()
            time.sleep(0.02)
    if do == "until_told":
        (folder / f"{job.id}.running").write_text(str(os.getpid()))
        while not (folder / f"{job.id}.go").exists():
            should_stop()
            time.sleep(0.02)
    if do == "freeze" and rank == dist.get_world_size() - 1 and once(folder / f"{job.id}.frozen"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if do == "until_stopped":
        (folder / f"{job.id}.running").touch()
        while not should_stop():
            time.sleep(0.02)
        (folder / f"{job.id}.checkpoint").touch()
        return "interrupted"
    if do == "hang":
        (folder / f"{job.id}.running").touch()
        while True:
            time.sleep(0.1)
    dist.barrier()
    with (folder / "order").open("a") as order:
        line = f"{job.id} rank {rank} of {dist.get_world_size()} threads {os.environ.get('OMP_NUM_THREADS')}"
        line += f" niceness {os.nice(0)} spins {os.environ.get('GOMP_SPINCOUNT')}"
        line += f" patience {dist.group.WORLD._get_backend(torch.device('cpu')).options._timeout.total_seconds():g} s"
        order.write(f"{line} memory {len(memory['jobs'])}\n")
    return "finished"

"""Collectives of a worker group: run on one rank and share the outcome, agree, sum, take the maximum."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from orchestrator.errors import LlavoltaError, StageRunError

T = TypeVar("T")


def rank() -> int:
    """Return this worker's rank."""
    return dist.get_rank()


def world_size() -> int:
    """Return the number of workers."""
    return dist.get_world_size()


def device() -> torch.device:
    """Return the device that collectives take tensors from: the current GPU under NCCL, else the CPU."""
    if torch.cuda.is_available() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def decide(action: Callable[[], T]) -> T:
    """Run `action` on rank 0; every rank returns its value, or raises its error. Also a barrier.

    An error on rank 0 alone would leave the others waiting in their next collective.
    """
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = action()
        except LlavoltaError as error:
            answer[1] = error
        except Exception as error:
            answer[1] = StageRunError(f"{type(error).__name__}: {error}")
            answer[1].__cause__ = error
    if world_size() > 1:
        local = answer[1]
        dist.broadcast_object_list(answer, src=0, device=device())
        answer[1] = local or answer[1]
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def on_each_node(action: Callable[[], object]) -> None:
    """Run `action` on the first rank of every node, for work needed once per disk. Also a barrier.

    Raises:
        LlavoltaError: it failed on a node; every rank raises the same error.
    """
    failed: LlavoltaError | None = None
    if node_rank() == rank():
        try:
            action()
        except LlavoltaError as error:
            failed = error
        except Exception as error:
            failed = StageRunError(f"{type(error).__name__}: {error}")
            failed.__cause__ = error
    failures: list[LlavoltaError | None] = [failed]
    if world_size() > 1:
        failures = [None] * world_size()
        dist.all_gather_object(failures, failed)
    for failure in (failed, *failures):
        if failure is not None:
            raise failure


def node_rank() -> int:
    """Return the first rank on this rank's node."""
    return rank() - int(os.environ.get("LOCAL_RANK", rank()))


def all_agree(flag: bool) -> bool:
    """Return whether `flag` is true on every rank."""
    return bool(reduce_values([0.0 if flag else 1.0])[0] == 0.0)


def reduce_values(values: list[float], largest: bool = False) -> list[float]:
    """Return the sums (or the maxima) over ranks, in float64."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return tensor.tolist()

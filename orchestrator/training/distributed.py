"""Collectives of a worker group: run on one rank and share the outcome, gather, sum, take the maximum."""

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
    value, failed = _tried(action) if rank() == 0 else (None, None)
    answer: list[Any] = [value, failed]
    if world_size() > 1:
        dist.broadcast_object_list(answer, src=0)
    if error := failed or answer[1]:  # one that was sent has lost its cause
        raise error
    return answer[0]


def on_each_node(action: Callable[[], object]) -> None:
    """Run `action` on the first rank of every node, for work needed once per disk. Also a barrier.

    Raises:
        LlavoltaError: it failed on a node; every rank raises the same error.
    """
    failed = _tried(action)[1] if node_rank() == rank() else None
    for failure in (failed, *gather(failed)):
        if failure is not None:
            raise failure


def _tried(action: Callable[[], T]) -> tuple[T | None, LlavoltaError | None]:
    """Return the value of an action and its error, one of ours."""
    try:
        return action(), None
    except LlavoltaError as error:
        return None, error
    except Exception as error:
        failed = StageRunError(f"{type(error).__name__}: {error}")
        failed.__cause__ = error
        return None, failed


def gather(value: T) -> list[T]:
    """Return the values of all ranks, in their order, on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def node_rank() -> int:
    """Return the first rank on this rank's node."""
    return rank() - int(os.environ.get("LOCAL_RANK", rank()))


def reduce_values(values: list[float], largest: bool = False) -> list[float]:
    """Return the sums (or the maxima) over ranks, in float64."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return tensor.tolist()

"""Collectives of a worker group: run on one rank and share the outcome, gather, sum, take the maximum."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from orchestrator.errors import LlavoltaError, StageRunError
from orchestrator.machine import available_memory_bytes

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


def host_memory_bytes() -> int:
    """Return the host's memory that this rank can still take: what is free, divided by the ranks of the node."""
    return available_memory_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def device_memory_bytes() -> int:
    """Return the memory of the device that this rank can still take: its GPU's, or its part of the host's."""
    return torch.cuda.mem_get_info()[0] if device().type == "cuda" else host_memory_bytes()


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


def on_each_rank(action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return their values, in their order. Also a barrier.

    Raises:
        LlavoltaError: it failed on a rank; every rank raises the same error.
    """
    own = _tried(action)
    every = gather(own)
    for _, failure in (own, *every):  # one that was sent has lost its cause
        if failure is not None:
            raise failure
    return [cast(T, value) for value, _ in every]


def on_each_node(action: Callable[[], object]) -> None:
    """Run `action` on the first rank of every node, for work needed once per disk. Also a barrier.

    Raises:
        LlavoltaError: it failed on a node; every rank raises the same error.
    """

    def on_first() -> None:
        if node_rank() == rank():
            action()

    on_each_rank(on_first)


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

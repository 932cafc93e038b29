"""Learned compressors at rest, and the file they lie in beside a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from orchestrator.errors import StorageError
from orchestrator.plan.ledger.storage import storage_error

LEARNED_FILE = "learned.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Parked:
    """A learned compressor at rest: it waits for a stage that uses it, and nothing of it changes.

    Attributes:
        weights: Parameters (float32) and persistent buffers by name.
        moments: Adam's `exp_avg` and `exp_avg_sq` by parameter; empty before the first step.
        steps: Adam's step count: optimizer steps in which the compressor was used, in this phase.
    """

    weights: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    steps: int = 0


def write_parked(parked: Mapping[str, Parked], path: Path) -> None:
    """Writes weights, moments and step counts as one safetensors file.

    Raises:
        StorageError: the disk is full.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, one in parked.items():
        tensors |= {f"weights.{name}.{key}": tensor for key, tensor in one.weights.items()}
        for key, moments in one.moments.items():
            tensors |= {f"{kind}.{name}.{key}": moments[kind] for kind in MOMENTS}
    steps = {name: one.steps for name, one in parked.items()}
    try:
        clean = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(clean, path, metadata={"steps": json.dumps(steps)})
    except Exception as error:  # safetensors raises its own kind and OSError
        raise storage_error(path.parent, error) from error


def read_parked(path: Path) -> dict[str, Parked]:
    """What `write_parked` wrote.

    Raises:
        StorageError: the file is missing or cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            steps: dict[str, int] = json.loads(file.metadata()["steps"])
            found = {name: Parked({}, steps=count) for name, count in steps.items()}
            for key in file.keys():  # noqa: SIM118 (the handle is no mapping)
                kind, _, rest = key.partition(".")
                name, _, parameter = rest.partition(".")
                tensor = file.get_tensor(key)
                if kind == "weights":
                    found[name].weights[parameter] = tensor
                else:
                    found[name].moments.setdefault(parameter, {})[kind] = tensor
            return found
    except Exception as error:  # a broken file raises safetensors' own kind, KeyError, ValueError, OSError
        raise StorageError(f"{path} cannot be read: {error}") from error

"""Weights of learned compressors; a weights file holds them with the model's, under `llavolta_compressors.NAME`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from orchestrator.errors import StageRunError, StorageError
from orchestrator.models.build import check_names_and_shapes, weight_tensors

LEARNED_MODULES = "llavolta_compressors"
_PREFIX = f"{LEARNED_MODULES}."


def learned_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the learned modules attached to a model, by name."""
    found = model._modules.get(LEARNED_MODULES)
    return {} if found is None else dict(found.named_children())


def learned_weights(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of all learned modules in a weights file, by module and name.

    Raises:
        StorageError: the file cannot be read.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (the handle is no mapping)
                if key.startswith(_PREFIX):
                    module, _, name = key.removeprefix(_PREFIX).partition(".")
                    found.setdefault(module, {})[name] = file.get_tensor(key)
    except Exception as error:  # safetensors raises its own kind and OSError
        raise StorageError(f"the weights {path} cannot be read: {error}") from error
    return found


def named_in_file(weights: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return tensors under the names that `learned_weights` reads."""
    return {f"{_PREFIX}{module}.{name}": tensor for module, named in weights.items() for name, tensor in named.items()}


def fill(module: nn.Module, weights: Mapping[str, torch.Tensor], name: str) -> None:
    """Copy weights into a learned module.

    Raises:
        StageRunError: names or shapes are not the module's.
    """
    targets = weight_tensors(module)
    given = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    check_names_and_shapes(given, {key: tuple(tensor.shape) for key, tensor in targets.items()}, name)
    for key, target in targets.items():
        target.copy_(weights[key])


def load_learned(model: nn.Module, path: Path) -> None:
    """Load the learned modules attached to a model from a weights file; others in the file are skipped.

    Raises:
        StageRunError: the file lacks a module, or holds it in other shapes.
        StorageError: the file cannot be read.
    """
    modules = learned_modules(model)
    if not modules:
        return
    known = learned_weights(path)
    if missing := sorted(modules.keys() - known.keys()):
        raise StageRunError(
            f"the weights {path} hold no learned compressor {', '.join(missing)} (they hold "
            f"{', '.join(sorted(known)) or 'none'}): the cell's schedule never used it; test under another variant"
        )
    for name, module in modules.items():
        fill(module, known[name], f"{name} in {path}")

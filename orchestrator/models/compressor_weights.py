"""Weights of learned compressors; a weights file holds them with the model's, under `llavolta_compressors.NAME`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from orchestrator.errors import StageRunError
from orchestrator.models.build import copy_weights
from orchestrator.models.weight_files import open_weights

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
    with open_weights(path) as file:
        for key in file:
            if key.startswith(_PREFIX):
                module, _, name = key.removeprefix(_PREFIX).partition(".")
                found.setdefault(module, {})[name] = file[key]
    return found


def named_in_file(weights: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return tensors under the names that `learned_weights` reads."""
    return {f"{_PREFIX}{module}.{name}": tensor for module, named in weights.items() for name, tensor in named.items()}


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
        copy_weights(known[name], module, f"{name} in {path}")

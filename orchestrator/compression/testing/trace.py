"""All that an attachment could leave behind in a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def trace(model: nn.Module) -> dict[str, Any]:
    """Return what a model is: its modules' attributes, hooks, modes, parameters' values, and its configs."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name}: attributes"] = {key: _value(value) for key, value in module.__dict__.items()}
        found[f"{name}: submodules"] = {key: id(child) for key, child in module._modules.items()}
        found[f"{name}: hooks"] = {
            key: len(value) for key, value in module.__dict__.items() if key.endswith("_hooks") and value is not None
        }
        config = module.__dict__.get("config")
        if config is not None and hasattr(config, "to_json_string"):
            found[f"{name}: config"] = (id(config), config.to_json_string(use_diff=False))
    found["parameters"] = {name: (id(one), one.requires_grad) for name, one in model.named_parameters()}
    found["values"] = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return found


def _value(value: Any) -> Any:
    plain = isinstance(value, bool | int | float | str | type(None))
    return value if plain else type(value).__name__


def left_behind(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """Return the differences between two traces, in words."""
    for name in sorted({*before, *after} - {"values"}):
        one, other = before.get(name), after.get(name)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            keys = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
            yield f"{name or 'model'}: {', '.join(map(str, keys))}"
        else:
            yield f"{name or 'model'}"
    changed = [
        name
        for name, value in before["values"].items()
        if name in after["values"] and not torch.equal(value, after["values"][name])
    ]
    if changed:
        yield f"values of {', '.join(changed[:3])}"

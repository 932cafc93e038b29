"""What autograd really keeps between forward and backward."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch


def kept_bytes(model: Any, batch_of: Callable[[int], dict[str, Any]], leave_out: str = "(?!)") -> float:
    """Bytes that a row more keeps; without weights and buffers, and without a mask between all images of a batch
    (Pixtral), which grows with the square of the batch.

    Args:
        model: The model.
        batch_of: Makes a batch of so many equal rows.
        leave_out: Regular expression of names of modules; what is saved while they are called does not count.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    under_way: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if re.search(leave_out, name):
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: under_way.append(name)))
            handles.append(module.register_forward_hook(lambda *_: under_way.clear()))
    held = []
    for rows in (2, 4):
        seen: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, seen: dict[int, torch.Tensor] = seen) -> torch.Tensor:
            of_all = tensor.ndim == 4 and tensor.shape[:2] == (1, 1) and tensor.shape[2] == tensor.shape[3]
            if not under_way and not of_all:
                seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**batch_of(rows), use_cache=False).loss
        assert loss.requires_grad
        held.append(sum(tensor.untyped_storage().nbytes() for place, tensor in seen.items() if place not in own))
    for handle in handles:
        handle.remove()
    return (held[1] - held[0]) / 2

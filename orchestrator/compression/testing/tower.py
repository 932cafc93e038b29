"""What the vision tower's CLS token sees in a plain model with eager attention, read from its full attention map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from orchestrator.compression.families import Family
from orchestrator.compression.testing.rows import RowState


@dataclass
class TowerMaps:
    """Filled by the calls of the tower's last used attention, images in the order of the batch.

    Attributes:
        maps: Attention maps: images x heads x tokens x tokens.
        keys: Keys: images x tokens x (heads side by side).
    """

    maps: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)


@contextmanager
def watched(family: Family, needed: bool) -> Iterator[TowerMaps]:
    """Collect what the tower's CLS token sees within the block, if it is needed."""
    found = TowerMaps()
    handles: list[Any] = []
    if needed:
        attention = family.cls_attention()
        handles = [
            attention.register_forward_hook(lambda _, args, output: found.maps.append(output[1])),
            attention.k_proj.register_forward_hook(lambda _, args, output: found.keys.append(output)),
        ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def with_cls(states: Sequence[RowState], seen: TowerMaps) -> list[RowState]:
    """Return the rows with what the CLS token paid to each visual token and its key, mean over heads, by original
    column.
    """
    if not seen.maps:
        return list(states)
    maps_IHTT, keys_ITD = torch.cat(seen.maps).detach(), torch.cat(seen.keys).detach()
    heads = maps_IHTT.shape[1]
    keys_ITd = keys_ITD.unflatten(2, (heads, -1)).mean(2)
    number, done = 0, []
    for state in states:
        attention_N = torch.zeros(len(state.sizes))
        keys_Nd = torch.zeros(len(state.sizes), keys_ITd.shape[2])
        for unit in state.units:
            if len(unit.columns) == 1:
                continue
            tokens, columns = len(unit.columns), list(unit.columns)
            attention_N[columns] = maps_IHTT[number, :, 0].mean(0)[-tokens:]
            keys_Nd[columns] = keys_ITd[number, -tokens:]
            number += 1
        done.append(replace(state, cls_N=attention_N, cls_keys_Nd=keys_Nd))
    if number != len(maps_IHTT):
        raise AssertionError(f"the tower ran {len(maps_IHTT)} images, the rows hold {number}")
    return done

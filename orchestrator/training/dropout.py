"""Dropout drawn by sample: its mask depends on (seed, step, sample), not on the other samples of a micro-batch.

A mask is a hash of (seed, step, sample), the module's name, the position in the sample's row and the feature. So it is
the same in any micro-batch, on any rank, device and length of padding, and where activation checkpointing computes the
forward pass again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from orchestrator.errors import StageRunError, UsageError
from orchestrator.models.parts import LANGUAGE_MODEL, part_of_or_none

_LOW_32 = 0xFFFFFFFF
# Names that transformers' models use; the dropout of attention is a plain number in the layer.
_PROBABILITY = re.compile("dropout|drop_prob|drop_path|pdrop|layerdrop")


class Draws:
    """The samples of the current micro-batch, from which all dropout of a model draws."""

    def __init__(self) -> None:
        self._samples: list[str] = []
        self._keys: dict[tuple[str, torch.device], Tensor] = {}

    def enter(self, seed: int, step: int, samples: Sequence[int]) -> None:
        """Set the samples of the next forward pass, row by row."""
        self._samples = [f"{seed}:{step}:{sample}" for sample in samples]
        self._keys = {}

    def keys_B2(self, module: str, device: torch.device) -> Tensor:
        """Return two 32-bit numbers for each sample and this module, as int64."""
        if (module, device) not in self._keys:
            digests = [hashlib.sha256(f"{sample}:{module}".encode()).digest() for sample in self._samples]
            numbers = [[int.from_bytes(d[:4], "little"), int.from_bytes(d[4:8], "little")] for d in digests]
            self._keys[module, device] = torch.tensor(numbers, dtype=torch.int64, device=device).reshape(-1, 2)
        return self._keys[module, device]


class SampleDropout(nn.Module):
    """`nn.Dropout` on rows of samples (B x T x ...), row i being the i-th sample of `draws`.

    Args:
        p: Probability of a zero.
        name: The module's name, which tells its draws from those of other modules.
        draws: The samples of the current micro-batch.
    """

    def __init__(self, p: float, name: str, draws: Draws) -> None:
        super().__init__()
        self.p, self._name, self._draws = p, name, draws

    def forward(self, hidden_BTX: Tensor) -> Tensor:
        """Set values to zero with probability p and divide the rest by 1 - p.

        Raises:
            StageRunError: the rows are not the micro-batch's samples.
        """
        if not self.training or self.p == 0.0:
            return hidden_BTX
        keys_B2 = self._draws.keys_B2(self._name, hidden_BTX.device)
        if hidden_BTX.ndim < 3 or len(hidden_BTX) != len(keys_B2):
            raise StageRunError(
                f"the dropout {self._name} gets {list(hidden_BTX.shape)}, not a row for each of the micro-batch's "
                f"{len(keys_B2)} samples: what it drops would depend on the micro-batch; set that dropout to 0"
            )
        dropped = dropped_mask(keys_B2, hidden_BTX.shape, self.p)
        return (hidden_BTX / (1.0 - self.p)).masked_fill(dropped, 0.0)


def dropped_mask(keys_B2: Tensor, shape_BTX: Sequence[int], p: float) -> Tensor:
    """Return a mask, true with probability p, by sample, position and feature; padding a row does not change it.

    The mixing of 32 bits is Wellons' `lowbias32` (nullprogram.com/blog/2018/07/31), once per position and once per
    number.
    """
    length, width = shape_BTX[1], 1
    for size in shape_BTX[2:]:
        width *= size
    positions_T = torch.arange(length, dtype=torch.int64, device=keys_B2.device)
    rows_BT1 = _mixed(keys_B2[:, :1] ^ (positions_T * 0x9E3779B9 & _LOW_32)) ^ keys_B2[:, 1:]
    rows_BT1 = rows_BT1[..., None]
    features_X = _mixed(torch.arange(1, width + 1, dtype=torch.int64, device=keys_B2.device))
    hashed_BTX = _signed(rows_BT1) ^ _signed(features_X)  # int32: half the memory of what follows
    for shift, mask, factor in ((16, 0xFFFF, 0x7FEB352D), (15, 0x1FFFF, 0x846CA68B - 2**32), (16, 0xFFFF, 1)):
        hashed_BTX ^= (hashed_BTX >> shift) & mask  # masked, since a signed shift fills with the sign
        hashed_BTX *= factor
    return (hashed_BTX < round(p * 2**32) - 2**31).view(*shape_BTX)


def _mixed(numbers: Tensor) -> Tensor:
    """Return the same mixing of 32-bit numbers in int64, where products wrap at 64 bits only."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        numbers = ((numbers ^ (numbers >> shift)) * factor) & _LOW_32
    return numbers


def _signed(numbers: Tensor) -> Tensor:
    return (numbers - ((numbers >> 31) << 32)).to(torch.int32)


def draw_by_sample(model: nn.Module, draws: Draws) -> None:
    """Replace the dropout of a language model and its adapters by one that draws by sample.

    Raises:
        UsageError: the model has dropout that cannot: inside attention, or where a row is not a sample's.
    """
    for prefix, parent in list(model.named_modules()):
        for child, module in list(parent.named_children()):
            name = f"{prefix}.{child}" if prefix else child
            if type(module) is nn.Dropout and module.p > 0 and part_of_or_none(name) == LANGUAGE_MODEL:
                setattr(parent, child, SampleDropout(module.p, name, draws))
    refuse_dropout(model, type(model).__name__)


def refuse_dropout(module: nn.Module, what: str) -> None:
    """Refuse dropout whose draws would depend on the micro-batch.

    Raises:
        UsageError: a module has such dropout; the first one is named.
    """
    for name, one in module.named_modules():
        if isinstance(one, SampleDropout):
            continue
        probability = _probability(one)
        if probability is not None:
            key, value = probability
            raise UsageError(
                f"{what}: {name or type(one).__name__} has dropout ({key}: {value}) that cannot be drawn by sample, so "
                "that training would depend on the micro-batch; set it to 0 (for a model in its config.json)"
            )


def _probability(module: nn.Module) -> tuple[str, float] | None:
    """Return the attribute and value of a module's own positive dropout probability; None if it has none."""
    if isinstance(module, _DropoutNd):
        return ("p", module.p) if module.p > 0 else None
    attributes: dict[str, Any] = vars(module)
    for key, value in attributes.items():
        if _PROBABILITY.search(key) and isinstance(value, float) and 0 < value <= 1:
            return key, value
    return None

"""Tensor pieces that merging and selecting methods share: means of members, cosines, distances.

Sums over members are matrix products and not `index_add`: its order on a GPU is not fixed, and a method that selects
by what was merged before must select the same again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import normalize


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast off, so that float32 products stay float32."""
    with torch.autocast(device.type, enabled=False):
        yield


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 where its own precision is lower."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def tokens_at(hidden_BND: Tensor, index_BM: Tensor) -> Tensor:
    """Return the tokens at some places of each image or row: B x M x D."""
    return hidden_BND.gather(1, index_BM.unsqueeze(2).expand(-1, -1, hidden_BND.shape[2]))


def merge_members(visual_BND: Tensor, slots_BN: Tensor, kept: int, weights_BN: Tensor | None = None) -> Tensor:
    """Return the weighted mean of the tokens of each slot, summed in float32 at least; gradients flow to the tokens.

    Args:
        visual_BND: Tokens.
        slots_BN: The slot that each token goes to, 0 to `kept` - 1; every slot has a member.
        kept: Number of slots M.
        weights_BN: A positive weight for each token; None = all alike.

    Returns:
        Means, B x M x D, of the tokens' dtype.
    """
    wide_BND = at_least_float32(visual_BND)
    if weights_BN is None:
        weights_BN = torch.ones_like(slots_BN)
    shares_BMN = wide_BND.new_zeros(len(slots_BN), kept, slots_BN.shape[1])
    shares_BMN.scatter_(1, slots_BN.unsqueeze(1), weights_BN.to(wide_BND.dtype).unsqueeze(1))
    with full_precision(visual_BND.device):
        sums_BMD = shares_BMN @ wide_BND
    return (sums_BMD / shares_BMN.sum(2, keepdim=True)).to(visual_BND.dtype)


def sum_members(values_XBN: Tensor, slots_BN: Tensor, kept: int) -> Tensor:
    """Sum of whole numbers over the members of each slot; exact.

    Args:
        values_XBN: Whole numbers, with any leading axes or none.
        slots_BN: The slot of each token, 0 to `kept` - 1.
        kept: Number of slots M.
    """
    sums = values_XBN.new_zeros(*values_XBN.shape[:-1], kept)
    return sums.scatter_add_(-1, slots_BN.expand_as(values_XBN), values_XBN)


def cosines(first_BND: Tensor, second_BMD: Tensor) -> Tensor:
    """Return the cosine of every token with every other, B x N x M, in float64; 0 with a token that is all zero.

    Products of float32 would be fewer bits on a GPU where TF32 is allowed; compare with `choices` and a scale of 1.
    """
    with full_precision(first_BND.device):
        return normalize(first_BND.double(), dim=-1) @ normalize(second_BMD.double(), dim=-1).mT


def distances(first_BND: Tensor, second_BMD: Tensor) -> Tensor:
    """L2 distance of every token to every other, B x N x M, in float64.

    Distances and not their squares: an error of the tokens moves them by no more than itself.
    """
    first_BND, second_BMD = first_BND.double(), second_BMD.double()
    lengths_BNM = first_BND.square().sum(2, keepdim=True) + second_BMD.square().sum(2).unsqueeze(1)
    with full_precision(first_BND.device):
        return torch.baddbmm(lengths_BNM, first_BND, second_BMD.mT, alpha=-2).clamp(min=0).sqrt()

"""What the tokens of a segment may see: cached keys of its layers, then its own tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.compression.caches import CacheRecord, SegmentCache
from orchestrator.compression.masks import Keys
from orchestrator.compression.segments import Flow, Segment
from orchestrator.errors import UsageError


def keys_of(
    config: Any,
    flow: Flow,
    cache: Any,
    segment: Segment,
    record: CacheRecord | None,
    number: int,
    padding_BK: Tensor | None,
) -> Keys:
    """The keys of one segment.

    Args:
        config: The language model's config.
        flow: What enters the segment.
        cache: The whole KV cache, or None.
        segment: The segment.
        record: What the filled cache remembers, or None.
        number: The segment's number.
        padding_BK: The padding mask as the caller gave it, cached tokens first, or None.

    Raises:
        UsageError: the cache's rows or tokens are not those it was filled with.
    """
    device = flow.hidden_BND.device
    past = cache.get_seq_length(segment.first) if cache is not None else 0
    mask_BK = _mask(flow, record.masks[number] if record else None, past, segment, padding_BK)
    sizes_BK = None
    past_sizes = record.sizes[number] if record is not None else None
    if flow.size_bias or past_sizes is not None:
        if past_sizes is None:
            past_sizes = torch.ones(len(mask_BK), past, dtype=torch.long, device=device)
        sizes_BK = torch.cat([past_sizes[:, :past], flow.sizes_BN], dim=1)
    # Queries see all that is cached anyway: no cached token needs a block.
    blocks_BK = nn.functional.pad(flow.blocks_BN, (past, 0), value=-1) if flow.blocked else None
    return Keys(
        hidden_BND=flow.hidden_BND,
        mask_BK=mask_BK,
        config=config,
        layer_types=tuple((getattr(config, "layer_types", None) or ())[segment.first : segment.last]),
        cache=SegmentCache(cache, segment.first, segment.last) if cache is not None else None,
        blocks_BK=blocks_BK,
        sizes_BK=sizes_BK,
    )


def _mask(flow: Flow, recorded_BK: Tensor | None, past: int, segment: Segment, padding_BK: Tensor | None) -> Tensor:
    device, (rows, columns) = flow.hidden_BND.device, flow.hidden_BND.shape[:2]
    if flow.layout is not None:
        mask_BN = flow.layout.real_BN.to(device, non_blocking=True)
    elif padding_BK is not None:
        mask_BN = padding_BK[:, -columns:].to(torch.bool)
    else:
        mask_BN = torch.ones(rows, columns, dtype=torch.bool, device=device)
    if not past:
        return mask_BN
    if recorded_BK is not None:
        past_BN = recorded_BK[:, :past]
    elif padding_BK is not None:
        past_BN = padding_BK[:, :past].to(torch.bool)
    else:
        past_BN = torch.ones(rows, past, dtype=torch.bool, device=device)
    if past_BN.shape != (rows, past):
        raise UsageError(
            f"compression: the KV cache holds {rows} rows of {past} tokens before layer {segment.first}, "
            f"but was filled with {tuple(past_BN.shape)}; rows of a cache cannot be added after the prompt"
        )
    return torch.cat([past_BN, mask_BN], dim=1)

"""What enters the decoder of a compressed model: a pass of the top model, padding, ids, where the images are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.compression.attention.recorder import Recording
from orchestrator.compression.families.base import Family
from orchestrator.compression.forward.cache import CacheRecord
from orchestrator.compression.forward.queries import Queries
from orchestrator.compression.forward.segments import Flow
from orchestrator.compression.layout import ImageGroup, Layout, build_layout
from orchestrator.compression.protocol import IGNORED, Kept
from orchestrator.errors import UsageError


@dataclass
class Pass:
    """One forward of the top model: what came in, and what the head must know of what the decoder did.

    Attributes:
        inputs: Keyword arguments of the top model's forward.
        labels_BN: Labels on the device, or None.
        flow: The decoder's last state; None where nothing was compressed.
        visual_tokens_per_layer: Visual tokens that ran in each decoder layer, summed over rows.
        tower: What is recorded of the vision tower; None where no point needs it.
        idle: A training rank whose batch has no image: what learns is called all the same.
        located: Layout and labels on the host, once they are known.
        projected: What points at the projector left, and of which units.
        router_logits: Of each layer with experts what its router gave the tokens that ran, without padding.
        shift_labels_BN: Labels already shifted by the caller, or None.
        label_logits_only: Logits are computed only where a label needs them, so nothing else of the last layer is read.
        queries: The tokens that the last layer ran for; None where it ran for all.
    """

    inputs: dict[str, Any]
    labels_BN: Tensor | None = None
    flow: Flow | None = None
    visual_tokens_per_layer: tuple[int, ...] = ()
    tower: Recording | None = None
    idle: bool = False
    located: tuple[Layout | None, Tensor | None] | None = None
    projected: list[tuple[ImageGroup, Kept]] | None = None
    router_logits: tuple[Tensor, ...] = ()
    shift_labels_BN: Tensor | None = None
    label_logits_only: bool = False
    queries: Queries | None = None

    def targets_BN(self, flow: Flow | None) -> Tensor:
        """Return what each token of the decoder's rows is to predict, `IGNORED` where nothing.

        Args:
            flow: The rows after all points; None where nothing was compressed.
        """
        if flow is not None and flow.labels_BN is not None and flow.layout is not None:
            targets_BN = nn.functional.pad(flow.labels_BN[:, 1:], (0, 1), value=IGNORED)
            # Padding predicts nothing (with padding on the left it stands before a row's first token).
            return targets_BN.masked_fill(~flow.layout.real_BN, IGNORED)
        if self.shift_labels_BN is not None:
            return self.shift_labels_BN
        assert self.labels_BN is not None
        return nn.functional.pad(self.labels_BN[:, 1:], (0, 1), value=IGNORED)


def entering(
    family: Family,
    current: Pass,
    arguments: dict[str, Any],
    record: CacheRecord | None,
    given: Tensor | None,
    has_points: bool,
) -> Flow:
    """Return the first layer's input: hidden states, ids as the plain model has them, and where the images are.

    Args:
        family: The model's adapter.
        current: The pass under way.
        arguments: The language model's keyword arguments.
        record: What the filled cache remembers, or None.
        given: The padding mask, cached tokens first, or None.
        has_points: There are points, so images must be found.
    """
    embeds_BND = arguments["inputs_embeds"]
    rows, columns = embeds_BND.shape[:2]
    device = embeds_BND.device
    cache = arguments.get("past_key_values")
    seen = record.seen_tokens if record is not None else 0
    if record is None and cache is not None:
        seen = int(cache.get_seq_length())
    column_N = torch.arange(columns, device=device)
    positions = arguments.get("position_ids")
    if positions is None:
        positions = column_N + seen
    if positions.ndim < 3:
        positions = positions.expand(rows, columns).unsqueeze(0)
    blocks_BN = family.block_ids_BN(current.inputs) if current.inputs else None
    blocks_1BN = (
        blocks_BN[:, -columns:].to(positions).unsqueeze(0)
        if blocks_BN is not None
        else torch.full_like(positions[:1], -1)
    )
    columns_1BN = column_N.to(positions.dtype).expand(1, rows, columns)
    meta_CBN = torch.cat([positions, blocks_1BN, torch.ones_like(positions[:1]), columns_1BN])
    layout, labels_BN = None, None
    if not (seen and columns == 1):
        layout, labels_BN = locate(family, current, given, columns, has_points)
    return Flow(embeds_BND, meta_CBN, layout, labels_BN, blocked=blocks_BN is not None)


def locate(
    family: Family, current: Pass, mask: Tensor | None, columns: int, has_points: bool
) -> tuple[Layout | None, Tensor | None]:
    """Return where the images are and what the labels are, on the host; found once in a pass.

    Raises:
        UsageError: there are points but no `input_ids`, or images and placeholders do not match.
    """
    if current.located is not None:
        return current.located
    input_ids = current.inputs.get("input_ids")
    if input_ids is None:
        if not has_points:
            return None, None
        raise UsageError("compression: the model needs input_ids to know where images are, not inputs_embeds alone")
    parts = [input_ids]
    parts.append(mask[:, -columns:].to(input_ids) if mask is not None else torch.ones_like(input_ids))
    parts.extend([current.labels_BN.to(input_ids)] if current.labels_BN is not None else [])
    host = torch.stack(parts).cpu()  # the one copy to the host of a forward
    visual_BN, real_BN = family.visual_BN(host[0]), host[1].bool()
    if not bool(visual_BN.any()):
        current.located = (None, None)
        return None, None
    grids = family.grids({**current.inputs, "input_ids": host[0]}, int(visual_BN.sum()))
    layout = build_layout(visual_BN, real_BN, grids)
    # Visual positions never carry a label.
    labels_BN = host[2].masked_fill(visual_BN, IGNORED) if current.labels_BN is not None else None
    current.located = layout, labels_BN
    return layout, labels_BN


def padding_mask(family: Family, current: Pass, arguments: dict[str, Any]) -> Tensor | None:
    """Return the 2-D padding mask (B x K), or None for no padding.

    Families whose top model makes masks (Gemma 3, PaliGemma) hand ready ones of the full length to the language model;
    these are of no use here, and what they were made of is what the top model was given.
    """
    masks = [arguments.get("attention_mask")]
    if current.inputs and family.remakes_masks:
        masks.append(current.inputs.get("attention_mask"))
    for mask in masks:
        if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
            return mask
    raise UsageError(
        "compression: attention_mask must be 2-D (batch x tokens); a ready-made mask (static cache) cannot follow "
        "tokens that are dropped"
    )


def check_positions(arguments: dict[str, Any]) -> None:
    """Refuse packed rows.

    Raises:
        UsageError: position ids restart within a row.
    """
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if positions is None or mask is not None or arguments.get("past_key_values") is not None:
        return
    if positions.ndim == 3:
        if len(positions) == 3:  # heights and widths restart in every image
            return
        positions = positions[0]
    if bool((positions[..., 1:] < positions[..., :-1]).any()):
        raise UsageError("compression: position_ids restart within a row; packed rows cannot be compressed")

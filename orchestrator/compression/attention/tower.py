"""What the vision tower's CLS token saw, and whose visual tokens it was: images in the order of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from orchestrator.compression.attention.recorder import Recording, recording_of
from orchestrator.compression.attention.stats import Records, Seen, needs_of, prompt_of
from orchestrator.compression.families.base import Family
from orchestrator.compression.layout import ImageGroup, Layout
from orchestrator.compression.protocol import Point
from orchestrator.errors import UsageError


@contextmanager
def watched_tower(family: Family, points: Sequence[Point]) -> Iterator[Recording | None]:
    """While the model's forward runs, records the CLS row of the tower's last used layer and the keys.

    Gives None, and costs nothing, where no point needs it. The recording fills while the tower runs; read it with
    `cls_of_images` (before the decoder) or `cls_seen` (in it).

    Raises:
        UsageError: the tower's attention cannot be recorded.
    """
    if "cls" not in needs_of(points):
        yield None
        return
    with recording_of(family.cls_attention(), Recording(torch.zeros(1, 1, dtype=torch.long), None, True), _WHAT) as one:
        yield one


_WHAT = "compression: a method that needs the vision tower's CLS token"


def cls_of_images(recording: Recording | None, tokens: int, numbers_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the CLS token's attention to each visual token of some images, and the visual tokens' keys.

    For methods that act before the decoder: image `i` of the batch is row `i` of what the tower ran.

    Args:
        recording: What `watched_tower` gave.
        tokens: Visual tokens of each of these images, without the CLS token unless it is one of them.
        numbers_I: Numbers of the images; None = all.

    Returns:
        Attention, mean over heads (I x N, as it was in the softmax over all tokens), and keys, mean over heads
        (I x N x head size), in float32.

    Raises:
        UsageError: the tower did not run in this forward, or gave other tokens than these.
    """
    if recording is None or not recording.attentions:
        raise UsageError(
            f"{_WHAT}: the tower's attention was not seen in this forward (features given ready-made, or attention "
            "that is not looked up in transformers' ALL_ATTENTION_FUNCTIONS); pass pixel_values"
        )
    attention_IT = torch.cat(recording.attentions)
    keys_ITD = torch.cat([keys_IHTD.mean(1) for keys_IHTD in recording.keys])
    if attention_IT.shape[1] not in (tokens, tokens + 1):
        raise UsageError(
            f"{_WHAT}: the tower has {attention_IT.shape[1] - 1} patches an image but the decoder {tokens} visual "
            "tokens"
        )
    if numbers_I is not None:
        numbers_I = numbers_I.to(attention_IT.device)
        attention_IT, keys_ITD = attention_IT[numbers_I], keys_ITD[numbers_I]
    return attention_IT[:, -tokens:], keys_ITD[:, -tokens:]


def cls_seen(recording: Recording | None, layout: Layout, origins_BN: Tensor) -> Seen:
    """Return the CLS token's attention and keys by column of the rows, so that points at any layer find their tokens.

    Args:
        recording: What `watched_tower` gave.
        layout: The rows as the processor made them.
        origins_BN: Original column of each token.

    Raises:
        UsageError: see `cls_of_images`; also where the tower ran another number of images than the rows hold.
    """
    groups = [group for group in layout.groups if group.columns_IN.shape[1] > 1]
    numbers = image_numbers(groups, layout.length)
    images = sum(len(one) for one in numbers)
    ran = sum(len(one) for one in recording.attentions) if recording is not None else 0
    if recording is not None and ran not in (0, images):
        raise UsageError(f"{_WHAT}: the tower ran {ran} images, the rows hold {images}")
    rows, length = layout.real_BN.shape
    attention = keys = None
    for group, numbers_I in zip(groups, numbers, strict=True):
        attention_IN, keys_IND = cls_of_images(recording, group.columns_IN.shape[1], numbers_I)
        if attention is None or keys is None:
            attention = attention_IN.new_zeros(rows * length)
            keys = keys_IND.new_zeros(rows * length, keys_IND.shape[2])
        places = group.places(length).to(attention.device)
        attention[places] = attention_IN.flatten()
        keys[places] = keys_IND.flatten(0, 1)
    if attention is None or keys is None:
        raise UsageError(f"{_WHAT}: the rows hold no image of more than one visual token")
    return Seen(layout, origins_BN, length, attention.unflatten(0, (rows, length)), keys.unflatten(0, (rows, length)))


def image_numbers(groups: Sequence[ImageGroup], length: int) -> list[Tensor]:
    """Return number of each image in the order of the batch, group by group: images stand in the rows in that order."""
    if not groups:
        return []
    first = torch.cat([group.rows_I * length + group.columns_IN[:, 0] for group in groups])
    return list(first.argsort().argsort().split([len(group.rows_I) for group in groups]))


def records_for(
    points: Sequence[Point],
    layout: Layout | None,
    origins_BN: Tensor,
    labels_BN: Tensor | None,
    limit: int | None,
    recording: Recording | None,
) -> Records | None:
    """Return the records beside the hidden states of one forward; None where no point needs any.

    Args:
        points: All points of the forward.
        layout: The rows as the processor made them; None without an image.
        origins_BN: Original column of each token, on the device.
        labels_BN: Labels on the host, or None.
        limit: Columns of the prompt, see `prompt_of`.
        recording: What `watched_tower` gave.
    """
    needs = needs_of(points)
    if layout is None or not needs & {"queries", "keys", "cls", "text"}:
        return None
    visual_BN = torch.zeros_like(layout.real_BN)
    for group in layout.groups:
        visual_BN[group.rows_I.unsqueeze(1), group.columns_IN] = True
    records = Records(prompt_of(visual_BN, layout.real_BN, labels_BN, limit).to(origins_BN.device))
    if any("cls" in point.spec.needs and point.spec.layer != "projector" for point in points):
        records.cls = cls_seen(recording, layout, origins_BN)
    return records

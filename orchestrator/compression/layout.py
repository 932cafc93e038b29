"""Where text and images are in the rows of a batch, and where everything goes when images get shorter.

All of it is index arithmetic on the host, computed once per forward; the tensors on the device are only gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from orchestrator.compression.protocol import evenly_spaced
from orchestrator.errors import UsageError
from orchestrator.spec.components import Grid


@dataclass(frozen=True)
class ImageGroup:
    """All images of one grid: I images of N visual tokens.

    Attributes:
        grid: Their grid.
        rows_I: Row of each image.
        columns_IN: Column of each visual token.
        frames_I: Number of each image in its video, 0 for a first frame or an image of its own.
    """

    grid: Grid
    rows_I: Tensor
    columns_IN: Tensor
    frames_I: Tensor

    @property
    def tokens(self) -> int:
        """Visual tokens of all its images."""
        return self.columns_IN.numel()

    def places(self, columns: int) -> Tensor:
        """Return the flat places (row * columns + column) of its visual tokens, image after image."""
        return (self.rows_I.unsqueeze(1) * columns + self.columns_IN).flatten()


@dataclass(frozen=True)
class Layout:
    """The rows of a batch in one segment.

    Attributes:
        real_BN: True where a token is, False where padding is.
        groups: The images, by grid.
        pad_left: Padding stands on the left.
    """

    real_BN: Tensor
    groups: tuple[ImageGroup, ...]
    pad_left: bool

    @property
    def length(self) -> int:
        """Columns, padding included."""
        return self.real_BN.shape[1]

    @property
    def tail(self) -> int:
        """Columns after the last visual token of any row."""
        last = max((int(group.columns_IN.max()) for group in self.groups if group.tokens), default=-1)
        return self.length - 1 - last

    @property
    def text_BN(self) -> Tensor:
        """True at text: neither padding nor visual tokens."""
        text_BN = self.real_BN.clone()
        for group in self.groups:
            text_BN[group.rows_I.unsqueeze(1), group.columns_IN] = False
        return text_BN

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of all rows."""
        return sum(group.tokens for group in self.groups)


@dataclass(frozen=True)
class Moves:
    """Flat indices (row * columns + column) that lead from one layout to the next.

    Attributes:
        text_from: Places of text tokens before.
        text_to: Their places after.
        kept_to: Places of each group's kept tokens after.
        added: How many tokens were added before each place in its row (flat), None where none was added.
    """

    text_from: Tensor
    text_to: Tensor
    kept_to: tuple[Tensor, ...]
    added: Tensor | None = None

    def to(self, device: torch.device) -> Moves:
        """Move all indices to another device."""
        if device.type == "cpu":
            return self
        return Moves(
            self.text_from.to(device, non_blocking=True),
            self.text_to.to(device, non_blocking=True),
            tuple(index.to(device, non_blocking=True) for index in self.kept_to),
            self.added.to(device, non_blocking=True) if self.added is not None else None,
        )


def build_layout(visual_BN: Tensor, real_BN: Tensor, grids: Sequence[Grid]) -> Layout:
    """Return the layout of a batch as the processor made it.

    Args:
        visual_BN: True at placeholders of visual tokens.
        real_BN: True where there is no padding.
        grids: The images' grids, in the order of the batch.

    Raises:
        UsageError: placeholders and images do not match.
    """
    places = visual_BN.flatten().nonzero().squeeze(1)
    counts = [grid.tokens for grid in grids]
    if sum(counts) != places.numel():
        raise UsageError(
            f"compression: input_ids hold {places.numel()} image placeholders but the batch's {len(counts)} images "
            f"have {sum(counts)} visual tokens; expand each image's placeholder to its number of visual tokens"
        )
    numbers: dict[Grid, list[int]] = {}
    starts = torch.tensor([0, *counts]).cumsum(0)
    for number, grid in enumerate(grids):
        numbers.setdefault(grid, []).append(number)
    groups = []
    for grid, members in numbers.items():
        places_IN = places[starts[members].unsqueeze(1) + torch.arange(grid.tokens)]
        rows_IN = places_IN // visual_BN.shape[1]
        if not bool((rows_IN == rows_IN[:, :1]).all()):
            raise UsageError("compression: an image's placeholders in input_ids are spread over two rows of the batch")
        frames_I = torch.tensor([grids[member].frame for member in members])
        groups.append(ImageGroup(grid, rows_IN[:, 0], places_IN % visual_BN.shape[1], frames_I))
    pad_left = bool(real_BN[:, -1].all()) and not bool(real_BN[:, 0].all())
    return Layout(real_BN | visual_BN, tuple(groups), pad_left)


def join_frames(layout: Layout) -> Layout:
    """Return the layout with all frames of a video in a row as one image, frame after frame; an image stays alone."""
    videos: dict[Grid, list[tuple[int, Tensor]]] = {}
    for group in layout.groups:
        images = zip(group.rows_I.tolist(), group.columns_IN[:, 0].tolist(), range(len(group.rows_I)), strict=True)
        runs: list[list[int]] = []
        for row, _, image in sorted(images):
            frame = int(group.frames_I[image])
            last = runs[-1][-1] if runs else -1
            if frame and runs and int(group.rows_I[last]) == row and int(group.frames_I[last]) == frame - 1:
                runs[-1].append(image)
            else:
                runs.append([image])
        for run in runs:
            grid = Grid(group.grid.height * len(run), group.grid.width, frames=len(run))
            videos.setdefault(grid, []).append((int(group.rows_I[run[0]]), group.columns_IN[run].flatten()))
    groups = []
    for grid, members in videos.items():
        rows_I, columns_IN = torch.tensor([row for row, _ in members]), torch.stack([each for _, each in members])
        groups.append(ImageGroup(grid, rows_I, columns_IN, torch.zeros_like(rows_I)))
    return replace(layout, groups=tuple(groups))


def split_frames(layout: Layout) -> Layout:
    """Return the layout with the frames of videos as images of their own again, where a method left frames whole."""
    groups = []
    for group in layout.groups:
        frames, grid = group.grid.frames, group.grid
        if frames > 1:
            columns_IN = group.columns_IN.unflatten(1, (frames, -1)).flatten(0, 1)
            frames_I = torch.arange(frames).repeat(len(group.rows_I))
            one = Grid(grid.height // frames, grid.width)
            group = ImageGroup(one, group.rows_I.repeat_interleave(frames), columns_IN, frames_I)
        groups.append(group)
    return replace(layout, groups=tuple(groups))


def rearrange(
    layout: Layout,
    kept: Sequence[int],
    kept_grids: Sequence[Grid],
    before: Sequence[int],
    sources: Sequence[Tensor | None],
) -> tuple[Layout, Moves]:
    """Return the layout after each group's images keep `kept` tokens, padded again on the side it was padded.

    Padding that is not needed any more goes; text keeps its order around the images. Where an image gets more tokens
    than it had, `before` of the new ones stand before its first and the others follow its last. Kept tokens stand where
    their `sources` (I x M, on the host) stood, or evenly spread over the image's columns.
    """
    text_BN = layout.text_BN
    stays_BN = text_BN.long()
    lead_BN, extra_BN = torch.zeros_like(stays_BN), torch.zeros_like(stays_BN)
    slots = []
    for group, count, lead, source_IM in zip(layout.groups, kept, before, sources, strict=True):
        tokens = group.columns_IN.shape[1]
        if source_IM is not None:
            slot_IM = group.columns_IN.gather(1, source_IM)
        else:
            slot_IM = group.columns_IN[:, evenly_spaced(tokens, min(count, tokens))]
        stays_BN[group.rows_I.unsqueeze(1), slot_IM] = 1
        lead_BN[group.rows_I, group.columns_IN[:, 0]] = lead
        extra_BN[group.rows_I, group.columns_IN[:, -1]] = max(0, count - lead - tokens)
        slots.append(slot_IM)
    counts_BN = stays_BN + lead_BN + extra_BN
    lengths_B = counts_BN.sum(1)
    columns = int(lengths_B.max())
    new_column_BN = counts_BN.cumsum(1) - extra_BN - 1
    column_range = torch.arange(columns)
    if layout.pad_left:
        new_column_BN += (columns - lengths_B).unsqueeze(1)
        real_BM = column_range >= (columns - lengths_B).unsqueeze(1)
    else:
        real_BM = column_range < lengths_B.unsqueeze(1)
    new_place_BN = torch.arange(len(lengths_B)).unsqueeze(1) * columns + new_column_BN
    text_from = text_BN.flatten().nonzero().squeeze(1)
    added = torch.zeros(real_BM.numel(), dtype=torch.long) if bool((lead_BN + extra_BN).any()) else None
    before_BN = (lead_BN + extra_BN).cumsum(1) - extra_BN
    groups, kept_to = [], []
    for group, slot_IM, count, grid, lead in zip(layout.groups, slots, kept, kept_grids, before, strict=True):
        rows_I1 = group.rows_I.unsqueeze(1)
        columns_IM = new_column_BN[rows_I1, slot_IM]
        less, more = torch.arange(-lead, 0), torch.arange(1, 1 + count - lead - slot_IM.shape[1])
        columns_IM = torch.cat([columns_IM[:, :1] + less, columns_IM, columns_IM[:, -1:] + more], dim=1)
        groups.append(ImageGroup(grid, group.rows_I, columns_IM, group.frames_I))
        kept_to.append((rows_I1 * columns + columns_IM).flatten())
        if added is not None:
            added[kept_to[-1]] = before_BN[group.rows_I, group.columns_IN[:, 0]].repeat_interleave(count)
    text_to = new_place_BN.flatten()[text_from]
    if added is not None:
        added[text_to] = before_BN.flatten()[text_from]
    return Layout(real_BM, tuple(groups), layout.pad_left), Moves(text_from, text_to, tuple(kept_to), added)

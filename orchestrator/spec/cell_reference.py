"""How a user refers to a cell: by its name, the beginning of its id, or the value of an axis."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from orchestrator import registry
from orchestrator.errors import shorten


class Named(Protocol):
    """A cell of the grid, planned or not."""

    @property
    def name(self) -> str:
        """Unique in its experiment."""

    @property
    def axes(self) -> dict[str, Any]:
        """Dotted path of each axis to its value."""


Found = TypeVar("Found", bound=Named)
_NEAR = 4
_LISTED = 20
_ID_BEGINNING = re.compile(r"[0-9a-f]{4,64}")


def by_name(cells: Sequence[Found], wanted: str) -> list[Found]:
    """Return the cell of a name."""
    return [cell for cell in cells if cell.name == wanted]


def by_axis(cells: Sequence[Found], wanted: str) -> list[Found]:
    """Return the cells where an axis, named by its last part or in full, has a value: `axis=value`."""
    axis, _, value = wanted.partition("=")
    return [
        cell
        for cell in cells
        for name, given in cell.axes.items()
        if value and name.split(".")[-1] == axis.split(".")[-1] and str(given) == value
    ]


def may_be_id(wanted: str) -> bool:
    """Return True for a text that an identity may begin with."""
    return _ID_BEGINNING.fullmatch(wanted) is not None


def misfit(cells: Sequence[Named], fits: Sequence[Named], wanted: str) -> str:
    """Return why none or several cells fit, with names to choose from."""
    short = shorten(wanted)
    if fits:
        return f"{short} fits several cells: {_listed(fits)}"
    near = near_cells(cells, wanted)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return (
        f"{short} fits no cell; {meant}there are {_listed(cells)}"
        if cells
        else f"{short} fits no cell: there is none yet"
    )


def which(cells: Sequence[Named]) -> str:
    """Return, where a name is needed, what there is to choose from."""
    return f"name one of {_listed(cells)}" if cells else "there is no cell yet"


def near_cells(cells: Sequence[Named], wanted: str) -> list[str]:
    """Return the names of a few cells that hold the text, else of those with a part spelt like it."""
    low = wanted.strip().lower()
    found = [cell.name for cell in cells if low and low in cell.name.lower()]
    if not found:
        values = {part.partition("=")[2] or part: None for cell in cells for part in cell.name.split(",")}
        near = registry.nearest(wanted.partition("=")[2] or wanted, tuple(values))
        found = [cell.name for cell in cells if near is not None and near in re.split("[,=]", cell.name)]
    return found[:_NEAR]


def _listed(cells: Sequence[Named]) -> str:
    names = ", ".join(cell.name for cell in cells[:_LISTED])
    return names if len(cells) <= _LISTED else f"{names} and {len(cells) - _LISTED:,} more"

"""How a user names a cell: by its name, an id's beginning, or `axis=value`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar


class Named(Protocol):
    """A cell of the grid, planned or not."""

    @property
    def name(self) -> str:
        """Unique in its experiment."""

    @property
    def axes(self) -> dict[str, Any]:
        """Dotted path of each axis to its value."""


Found = TypeVar("Found", bound=Named)
_ID_BEGINNING = re.compile(r"[0-9a-f]{4,64}")


def by_name(cells: Sequence[Found], wanted: str) -> list[Found]:
    """The cell of a name."""
    return [cell for cell in cells if cell.name == wanted]


def by_axis(cells: Sequence[Found], wanted: str) -> list[Found]:
    """Cells where an axis, named by its last part or in full, has a value: `axis=value`."""
    axis, _, value = wanted.partition("=")
    return [
        cell
        for cell in cells
        for name, given in cell.axes.items()
        if value and name.split(".")[-1] == axis.split(".")[-1] and str(given) == value
    ]


def may_be_id(wanted: str) -> bool:
    """True for a text that an identity may begin with."""
    return _ID_BEGINNING.fullmatch(wanted) is not None


def misfit(cells: Sequence[Named], fits: Sequence[Named], wanted: str) -> str:
    """Why none or several cells fit, with names to choose from."""
    names = ", ".join(cell.name for cell in (fits or cells)[:20])
    return f"{wanted} {'fits several cells:' if fits else 'fits no cell; there are'} {names}"

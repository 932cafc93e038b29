"""The documented table of methods and model families, made by the contract kit and checked against it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from orchestrator import registry
from orchestrator.compression.testing.families import TINY
from orchestrator.compression.testing.kit import PROVEN, Refused, Stopped, check_cell

BEGIN, END = "<!-- compressors x families -->", "<!-- end of compressors x families -->"
_OURS = "orchestrator_plugins."
_YES, _NO = "✓", "–"
Cells = Mapping[str, Mapping[str, str]]


def built_in_methods() -> tuple[str, ...]:
    """Return the compressors that come with this package."""
    kinds = registry.kinds(registry.COMPRESSORS)
    return tuple(kind for kind in kinds if registry.spec_class(registry.COMPRESSORS, kind).__module__.startswith(_OURS))


def run_cells(
    methods: Iterable[str], families: Iterable[str], tell: Callable[[str], None] = lambda _: None
) -> dict[str, dict[str, str]]:
    """Return the result of each method on each family: `proven`, `refused: REASON`, or `failed: CHECKS`.

    Args:
        methods: Kinds of compressors.
        families: Names in `TINY`.
        tell: Called with a line for each cell.
    """
    cells: dict[str, dict[str, str]] = {}
    families = tuple(families)
    for method in methods:
        cells[method] = {}
        for family in families:
            cells[method][family] = result = run_cell(method, family)
            tell(f"{method} on {family}: {result}")
    return cells


def run_cell(method: str, family: str) -> str:
    """Return one cell: `proven`, `refused: REASON`, or `failed: CHECKS`."""
    try:
        faults = check_cell({"kind": method}, family)
    except Refused as error:
        return f"refused: {error}"
    except Stopped as error:
        return f"failed: {error}"
    return f"failed: {'; '.join(faults)}" if faults else PROVEN


def markdown(cells: Cells) -> str:
    """Return the table, a row a method and a column a family, with the reasons of refusals below."""
    families = list(next(iter(cells.values())))
    reasons: dict[str, int] = {}
    lines = [f"| | {' | '.join(families)} |", f"|---|{'---|' * len(families)}"]
    for method, row in cells.items():
        marks = [_mark(row[family], reasons) for family in families]
        lines.append(f"| `{method}` | {' | '.join(marks)} |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, *(["", f"{_YES} proven, {_NO} refused with the reason:", "", *notes] if notes else [])])


def _mark(result: str, reasons: dict[str, int]) -> str:
    if result == PROVEN:
        return _YES
    word, _, reason = result.partition(": ")
    if word == "failed":
        return "**failed**"
    reason = re.sub(r"\w+ForConditionalGeneration", "the model", reason)
    return f"{_NO} ({reasons.setdefault(reason, len(reasons) + 1)})"


def read_marks(text: str) -> dict[str, dict[str, bool]]:
    """Return what a Markdown table says: method, family, whether it is proven.

    Raises:
        ValueError: the text holds no such table.
    """
    inside = between(text)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in inside.splitlines() if line[:1] == "|"]
    if len(rows) < 3:
        raise ValueError(f"no table between {BEGIN} and {END}")
    families = rows[0][1:]
    return {
        row[0].strip("`"): {family: mark == _YES for family, mark in zip(families, row[1:], strict=True)}
        for row in rows[2:]
    }


def between(text: str) -> str:
    """Return what stands between the markers.

    Raises:
        ValueError: the markers are missing.
    """
    found = re.search(f"{re.escape(BEGIN)}\n(.*?){re.escape(END)}", text, re.DOTALL)
    if found is None:
        raise ValueError(f"the markers {BEGIN} and {END} are missing")
    return found.group(1)


def write(path: Path, cells: Cells) -> None:
    """Put the table between the markers of a Markdown file.

    Raises:
        ValueError: the markers are missing.
    """
    text = path.read_text()
    path.write_text(text.replace(f"{BEGIN}\n{between(text)}{END}", f"{BEGIN}\n{markdown(cells)}\n{END}"))


def all_cells(tell: Callable[[str], None] = lambda _: None) -> dict[str, dict[str, str]]:
    """Return all built-in methods on all families; minutes."""
    return run_cells(built_in_methods(), TINY, tell)

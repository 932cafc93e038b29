"""`python -m orchestrator.compression.testing KIND...` proves compressors; `--table FILE` writes the documented table.

The table has a row for each method and a column for each model family; a test checks the document against it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from orchestrator import registry
from orchestrator.compression.testing.families import TINY
from orchestrator.compression.testing.kit import PROVEN, Refused, Stopped, check_cell, check_compressor
from orchestrator.errors import UsageError

BEGIN, END = "<!-- compressors x families -->", "<!-- end of compressors x families -->"
_OURS = "orchestrator_plugins."
_YES, _NO = "✓", "–"


def main() -> int:
    """Return 0 where all holds, 1 where something does not, 2 for a wrong command."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.compression.testing", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="registered compressors")
    parser.add_argument("--families", nargs="+", choices=sorted(TINY), help="by default all")
    parser.add_argument("--table", type=Path, metavar="FILE", help="run all and write the table between its markers")
    arguments = parser.parse_args()
    if arguments.table is None and not arguments.kinds:
        parser.error("name a KIND, or --table FILE")
    failed = False
    for kind in arguments.kinds:
        try:
            print(f"{kind}\n  " + str(check_compressor({"kind": kind}, arguments.families)).replace("\n", "\n  "))
        except AssertionError as error:
            failed = True
            print(f"{kind}\n  {error}")
        except UsageError as error:
            parser.error(str(error))
    if arguments.table is not None:
        cells: dict[str, dict[str, str]] = {method: {} for method in built_in_methods()}
        for method, row in cells.items():
            for family in TINY:
                row[family] = result = run_cell(method, family)
                failed = failed or result.startswith("failed")
                print(f"{method} on {family}: {result}", flush=True)
        write(arguments.table, cells)
    return int(failed)


def built_in_methods() -> tuple[str, ...]:
    """Return the compressors that come with this package."""
    kinds = registry.kinds(registry.COMPRESSORS)
    return tuple(kind for kind in kinds if registry.spec_class(registry.COMPRESSORS, kind).__module__.startswith(_OURS))


def run_cell(method: str, family: str) -> str:
    """Return the result of one method on one family: `proven`, `refused: REASON`, or `failed: CHECKS`."""
    try:
        errors = check_cell({"kind": method}, family)
    except Refused as error:
        return f"refused: {error}"
    except Stopped as error:
        return f"failed: {error}"
    return f"failed: {'; '.join(errors)}" if errors else PROVEN


def markdown(cells: Mapping[str, Mapping[str, str]]) -> str:
    """Return the table of results by method and family, with the reasons of refusals below."""
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
    """Return whether a Markdown table says that a method is proven on a family, by method and family.

    Raises:
        ValueError: the markers are missing, or no table is between them.
    """
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in _inside(text).splitlines() if line[:1] == "|"
    ]
    if len(rows) < 3:
        raise ValueError(f"no table between {BEGIN} and {END}")
    families = rows[0][1:]
    return {
        row[0].strip("`"): {family: mark == _YES for family, mark in zip(families, row[1:], strict=True)}
        for row in rows[2:]
    }


def write(path: Path, cells: Mapping[str, Mapping[str, str]]) -> None:
    """Put the table between the markers of a Markdown file.

    Raises:
        ValueError: the markers are missing.
    """
    text = path.read_text()
    path.write_text(text.replace(f"{BEGIN}\n{_inside(text)}{END}", f"{BEGIN}\n{markdown(cells)}\n{END}"))


def _inside(text: str) -> str:
    found = re.search(f"{re.escape(BEGIN)}\n(.*?){re.escape(END)}", text, re.DOTALL)
    if found is None:
        raise ValueError(f"the markers {BEGIN} and {END} are missing")
    return found.group(1)


if __name__ == "__main__":
    sys.exit(main())

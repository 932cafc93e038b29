"""`ledger ls` for people: tables of states, work under way, evaluations and failures."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_SHOWN_CELLS = 3


def size_text(size: float) -> str:
    """Return the bytes in the unit that fits."""
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} {_UNITS[unit]}" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def print_ledger(document: dict[str, Any], console: Console) -> None:
    """Print what `ledger_document` found."""
    console.print(f"{document['storage']}: {size_text(document['bytes'])}", highlight=False)
    states = (
        (_short(e["id"]), e["phase"] or e["type"] or "damaged", _steps(e), ", ".join(e["kept"]) or "result",
         size_text(e["bytes"]), _when(e["when"]), _reached(e))
        for e in document["states"]
    )  # fmt: skip
    _print(console, ("state", "phase", "steps", "kept", "size", "finished", "reached by"), states)
    work = (
        (_short(e["id"]), ", ".join(map(str, e["steps"])) or "none", size_text(e["bytes"]),
         "running" if e["running"] else "left")
        for e in document["work"]
    )  # fmt: skip
    _print(console, ("work under way", "checkpoints at step", "size", ""), work)
    evaluations = (
        (_short(e["id"]), ", ".join(f"{k} {v:.4g}" for k, v in e["metrics"].items()), ", ".join(e["experiments"]))
        for e in document["evaluations"]
    )
    _print(console, ("evaluation", "metrics", "reached by"), evaluations)
    _print(console, ("failure", "why"), ((_short(e["id"]), e["error"]) for e in document["failures"]))
    leases = ((_short(e["id"]), e["lane"], f"pid {e['pid']} on {e['host']}") for e in document["leases"])
    _print(console, ("lease", "lane", "held by"), leases)
    counts = ("proposed", "finished", "failed")
    searches = ((_short(e["id"]), *(str(e[state]) for state in counts)) for e in document["searches"])
    _print(console, ("search", *counts), searches)
    experiments = ((e["name"], e["file"], str(e["cells"]), _when(e["when"])) for e in document["experiments"])
    _print(console, ("experiment", "file", "cells", "recorded"), experiments)


def _print(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*row)
    if table.row_count:
        console.print()
        console.print(table, highlight=False)


def _short(identity: str) -> str:
    return identity[:12]


def _steps(entry: dict[str, Any]) -> str:
    return "" if entry["last_step"] is None else f"{entry['first_step']} to {entry['last_step']}"


def _when(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _reached(entry: dict[str, Any]) -> str:
    if not entry["experiments"]:
        return "no recorded experiment"
    cells = entry["cells"]
    more = f" and {len(cells) - _SHOWN_CELLS} more" if len(cells) > _SHOWN_CELLS else ""
    return f"{', '.join(entry['experiments'])}: {', '.join(cells[:_SHOWN_CELLS])}{more}"

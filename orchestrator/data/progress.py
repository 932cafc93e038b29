"""Progress of long work on the error stream: a bar on a terminal, one line at the end elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_REPORT_SECONDS = 5.0


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show how far some work is and how fast it goes.

    Args:
        what: The unit of work, for instance `rows read`.
        total: The total; None if it is not known.

    Yields:
        A function that takes how many more are done.
    """
    began, done = time.monotonic(), 0
    bar = _bar(what, total) if sys.stderr.isatty() and total != 0 else None

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if bar is not None:
            bar.update(bar.task_ids[0], advance=count, rate=f"{done / max(1e-9, time.monotonic() - began):,.0f}/s")

    if bar is not None:
        bar.start()
    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()
        seconds = time.monotonic() - began
        if seconds > _REPORT_SECONDS:
            print(f"{done:,} {what} in {seconds:,.0f} s ({done / seconds:,.0f}/s)", file=sys.stderr)


def _bar(what: str, total: int | None) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")]
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    bar.add_task(what, total=total, rate="")
    return bar

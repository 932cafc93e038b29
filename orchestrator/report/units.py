"""Numbers and names as people read them; documents keep TFLOPs, seconds and bytes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import shorten

_PREFIXES = ((1e9, "Z"), (1e6, "E"), (1e3, "P"), (1.0, "T"), (1e-3, "G"))
_DAYS_FROM = 48 * 3600
_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")
_REASON_LINES = 8
_REASON_WIDTH = 400
_NAMES_WIDTH = 44
_LOWER = ("loss", "perplexity", "unread")
LEGEND = {
    "CR": "compression ratio, decoder layers x visual tokens / visual layer-tokens",
    "visual layer-tokens": "visual tokens of an image, summed over the decoder's layers",
    "seconds": "training time on the clock, from the first step of the first phase, shared stages counted in full",
}


@dataclass(frozen=True)
class Operations:
    """One unit for numbers that are compared: GFLOPs to ZFLOPs, by the largest of them.

    Attributes:
        name: E.g. `PFLOPs`.
        scale: TFLOPs in one.
    """

    name: str = "TFLOPs"
    scale: float = 1.0

    @classmethod
    def of(cls, tflops: Iterable[float | None]) -> Operations:
        """Return the unit in which the largest number is at least one."""
        largest = max((abs(value) for value in tflops if value is not None), default=0.0)
        for scale, prefix in _PREFIXES:
            if largest >= scale:
                return cls(f"{prefix}FLOPs", scale)
        return cls("GFLOPs", 1e-3) if largest else cls()

    def text(self, tflops: float | None) -> str:
        """Return a number of TFLOPs in this unit, four digits; `–` where there is none."""
        if tflops is None:
            return "–"
        value = tflops / self.scale
        if not value:
            return "0"
        if abs(value) >= 1000:
            return f"{value:,.0f}"
        digits_before_the_point = len(str(int(abs(value))))
        return f"{value:.{max(0, 4 - digits_before_the_point)}f}" if abs(value) >= 0.001 else f"{value:.2g}"


def operations(tflops: float | None) -> str:
    """Return a number of TFLOPs with the unit that fits it alone."""
    unit = Operations.of([tflops])
    return f"{unit.text(tflops)} {unit.name}"


def clock(seconds: float) -> str:
    """Return `2:03`, `1:02:03`, or from two days on `9 days 4 h`."""
    hours, rest = divmod(int(seconds), 3600)
    if seconds >= _DAYS_FROM:
        days, hours = divmod(hours, 24)
        return f"{days:,} days {hours} h"
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def counted_noun(number: int, noun: str) -> str:
    """Return `1 cell`, `1,200 cells`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names: Iterable[str], most: int = 12) -> str:
    """Return names in one line; of more than `most` the first ones, and how many others there are."""
    found = list(names)
    if len(found) <= most:
        return ", ".join(found)
    return f"{', '.join(found[: most // 2])} and {len(found) - most // 2:,} others"


def legend(names: Iterable[str]) -> str | None:
    """Return one line that says what short heads of a table mean; None where there are none to explain."""
    return "; ".join(f"{name}: {LEGEND[name]}" for name in names if name in LEGEND) or None


def size_text(size: float) -> str:
    """Return the bytes in the unit that fits."""
    unit = 0
    while size >= 1024 and unit < len(_BYTES) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} {_BYTES[unit]}" if unit == 0 else f"{size:.1f} {_BYTES[unit]}"


def whose(names: Sequence[str]) -> str:
    """Return a few names, or how many there are."""
    if not names:
        return ""
    text = ", ".join(names)
    return text if len(names) == 1 or (len(names) < 4 and len(text) <= _NAMES_WIDTH) else f"{len(names)} cells"


def counted(states: Iterable[str]) -> str:
    """Return `3 done, 2 new`."""
    return ", ".join(f"{number:,} {state}" for state, number in Counter(states).items())


def reason_lines(error: str) -> list[str]:
    """Return why a job failed: what happened, and the first of the rows or images that a line each below names."""
    first, *rest = error.strip().splitlines() or ["no reason given"]
    rows = itertools.takewhile(lambda line: line.startswith("    "), rest)
    lines = [shorten(line.rstrip(), _REASON_WIDTH) for line in (first, *rows)]
    more = len(lines) - _REASON_LINES
    return lines if more <= 0 else [*lines[:_REASON_LINES], f"… {more:,} more lines in the log"]


def number(value: float | None, digits: int = 2) -> str:
    """Return a number for a table; `–` where there is none."""
    if value is None:
        return "–"
    # What would round to nothing shows its first digits instead.
    return f"{value:.{digits}g}" if 0 < abs(value) < 0.1 else f"{value:,.{digits}f}"


def is_score(column: str) -> bool:
    """Return whether a column is of scores, whose differences are points; of what is measured they are per cent."""
    measured = ("_bytes", "_gib", "_milliseconds", "_seconds", "_per_second")
    return column.startswith("eval/") and not column.removesuffix("_iqr").endswith(measured)


def lower_is_better(column: str) -> bool:
    """Return whether less of a metric is better: losses, and what is measured but speeds."""
    metric = column.rpartition("/")[2]
    return metric in _LOWER or (not is_score(column) and not metric.endswith("_per_second"))


def metric_text(column: str, value: float | None) -> str:
    """Return a value with the digits that mean something for its column."""
    if value is None:
        return "–"
    if column.endswith("_bytes"):
        return size_text(value)
    if is_score(column):
        return f"{value:.3f}"
    if column.endswith("compression_ratio"):
        return f"{value:.2f}"
    if column.endswith("seconds") and not column.endswith("milliseconds"):
        return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
    if 0 < abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"


def difference_text(column: str, value: float, difference: float) -> str | None:
    """Return how a value differs from another: a score in points, what is measured in per cent; None from nothing."""
    # Zero added: what rounds to nothing has no minus.
    if is_score(column):
        return f"{round(difference, 3) + 0.0:+.3f}"
    before = value - difference
    return f"{round(difference / before, 2) + 0.0:+.0%}" if before else None


def bound(text: str, figures: Mapping[str, Any], sign: str = "≤") -> str:
    """Return a figure's text with the sign of a bound where its document says `at_most`."""
    return f"{sign} {text}" if figures.get("at_most") and text != "–" else text


def hours_text(totals: Mapping[str, Any]) -> str | None:
    """Return `0.50 GPU-hours of training done, 1.20 left; about 1:12:00 to the end`; None where no speed is known."""
    for unit, name in (("gpu", "GPU"), ("worker", "worker")):
        done, left = totals.get(f"{unit}_hours_done"), totals.get(f"{unit}_hours_left")
        if done is not None:
            text = f"{number(done)} {name}-hours of training done"
            # Where nothing is left there is nothing to forecast.
            if not left:
                return text
            given = totals.get("device_tflops")
            how = f" at {given:g} TFLOPs a second a worker (cluster.device_tflops)" if given else ""
            to_come = f"{text}, {number(left)} left" if done else f"about {number(left)} {name}-hours of training"
            return f"{to_come}{how}; about {clock(totals['seconds_left'])} to the end"
    return None

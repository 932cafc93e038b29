"""Numbers for people: operations in a unit that fits, spans of time, counts. Documents keep TFLOPs and seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_PREFIXES = ((1e9, "Z"), (1e6, "E"), (1e3, "P"), (1.0, "T"), (1e-3, "G"))
_DAYS_FROM = 48 * 3600
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
        return f"{value:.{max(0, 4 - _digits(value))}f}" if abs(value) >= 0.001 else f"{value:.2g}"


def _digits(value: float) -> int:
    """Return the digits before the decimal point, at least one."""
    return len(str(int(abs(value))))


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


def legend(names: Iterable[str]) -> str | None:
    """Return one line that says what short heads of a table mean; None where there are none to explain."""
    told = [f"{name}: {LEGEND[name]}" for name in names if name in LEGEND]
    return "; ".join(told) or None

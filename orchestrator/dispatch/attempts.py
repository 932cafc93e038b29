"""Attempts: one life of a lane's worker group, the items it was given, what its ranks said, and whether it hangs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.dispatch.failures import Failure

# Live ranks of a hung group have so long to write down where they are.
_STACKS_SECONDS = 15.0
# A group that still stands so long after it was to be killed is told of again.
_TELL_AGAIN_SECONDS = 30.0


@dataclass
class Item:
    """One job handed to one attempt, and what each rank said of it."""

    job: str
    token: int
    reports: dict[int, str | Failure] = field(default_factory=dict)
    first_failure: tuple[float, Failure] | None = None
    closed: bool = False

    @property
    def failures(self) -> list[Failure]:
        """What ranks met, in the order in which they told it."""
        return [report for report in self.reports.values() if isinstance(report, Failure)]

    def cause(self) -> Failure:
        """Return the failure to tell: one that stays before one that may pass, else the first: later ones often
        follow it.
        """
        plain = [failure for failure in self.failures if not failure.retry]
        if plain:
            return plain[0]
        return self.first_failure[1] if self.first_failure else self.failures[0]


@dataclass
class _Rank:
    """What is known of one process of a group; `heard` in the conductor's seconds."""

    who: Mapping[str, Any]
    heard: float
    progress: int = 0
    has_dumped: bool = False


@dataclass
class Attempt:
    """One life of a lane's worker group.

    Attributes:
        items: What it was given, by number; a conductor that took it over knows the last ones only.
        last: Number of the item given last; -1 before the first.
        holds: State its workers have in memory.
        moved: When a rank last got on, in the conductor's seconds.
        hung: Since when it counts as hung, and why.
        told: When the driver was told to kill it.
    """

    id: str
    lane: str
    world_size: int
    moved: float
    items: dict[int, Item] = field(default_factory=dict)
    last: int = -1
    holds: str | None = None
    answer_after: str | None = None
    ended: bool = False
    ranks: dict[int, _Rank] = field(default_factory=dict)
    hung: tuple[float, str] | None = None
    told: float | None = None

    @property
    def open_item(self) -> Item | None:
        """The item its ranks are at."""
        item = self.items.get(self.last)
        return None if item is None or item.closed else item

    def give(self, number: int, item: Item) -> None:
        """Note what all ranks get as their item of this number."""
        self.items[number], self.last = item, number

    def heard(self, who: Mapping[str, Any], now: float, progress: int = 0, has_dumped: bool = False) -> None:
        """Note a sign of life of a rank, and how far it is."""
        rank = self.ranks.setdefault(who["rank"], _Rank(who, now))
        rank.heard, rank.has_dumped = now, rank.has_dumped or has_dumped
        if progress > rank.progress:
            rank.progress, self.moved = progress, now

    def excuse(self, now: float) -> None:
        """Nobody could be heard until now: what came late is nobody's fault."""
        self.moved = now
        for rank in self.ranks.values():
            rank.heard = now

    def look(self, now: float, patience_seconds: float) -> None:
        """Note whether it hangs: no rank got on for so long, or a rank is silent for so long."""
        if self.ended or self.hung is not None:
            return
        silent = [str(number) for number in self._silent(now, patience_seconds)]
        minutes = f"{patience_seconds / 60:g} minutes"
        if silent:
            self.hung = now, f"rank {', '.join(silent)} gave no sign of life for {minutes}"
        elif self.open_item is not None and now - self.moved > patience_seconds:
            self.hung = now, f"no rank got on for {minutes}"

    def to_end(self, now: float, patience_seconds: float) -> list[dict[str, Any]]:
        """Process of a hung group that are to be killed, once live ranks have written their stacks."""
        if self.hung is None or (self.told is not None and now - self.told < _TELL_AGAIN_SECONDS):
            return []
        silent = self._silent(now, patience_seconds)
        waits = any(not rank.has_dumped for number, rank in self.ranks.items() if number not in silent)
        if waits and now - self.hung[0] < _STACKS_SECONDS:
            return []
        self.told = now
        job = self.items[self.last].job if self.open_item is not None else None
        return [
            {**rank.who, "job": job, "silent": number in silent, "why": self.hung[1]}
            for number, rank in self.ranks.items()
        ]

    def _silent(self, now: float, patience_seconds: float) -> list[int]:
        return [number for number, rank in self.ranks.items() if now - rank.heard > patience_seconds]

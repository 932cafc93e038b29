"""Outcome: what became of a work list."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Outcome:
    """What became of the work.

    Attributes:
        finished: Ids of finished jobs, in the order they ended.
        failed: Job id to reason.
        skipped: Ids of jobs whose parent failed.
        left: Ids of jobs not done because the run was stopped.
        interrupted: Whether a stop was asked for.
    """

    finished: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    interrupted: bool = False

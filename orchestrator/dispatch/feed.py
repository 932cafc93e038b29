"""Feed: where a run's work comes from while it goes on: a search that proposes cells, a plan made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from orchestrator.plan.jobs import Job, job_to_json


class Feed(Protocol):
    """Gives the newest work; asked ten times a second in the thread that runs it, so it answers at once."""

    def work(self) -> Sequence[Job] | None:
        """Return the newest complete plan, parents before children; None where it is as before.

        Complete: a job that has not begun and is not in it is not done.
        """
        ...

    def closed(self) -> bool:
        """Return whether nothing more will come: the run ends when the work is done."""
        ...


class Replanning:
    """The feed of a run whose work is known from the start, but is planned again where a stored state was damaged.

    Args:
        plan: Makes the newest plan.
    """

    def __init__(self, plan: Callable[[], Sequence[Job]]) -> None:
        self._plan = plan
        self._is_due = False

    def plan_again(self) -> None:
        """Return a state left the ledger: what needs it is to be planned with it."""
        self._is_due = True

    def work(self) -> Sequence[Job] | None:
        """Return the plan made anew, where it is due."""
        if not self._is_due:
            return None
        self._is_due = False
        return self._plan()

    def closed(self) -> bool:
        """Return nothing else comes."""
        return not self._is_due


class Planned:
    """The newest plan of a run, as the conductor takes it.

    Attributes:
        jobs: As `job_to_json` writes them.
        closed: Whether nothing more will come.
    """

    def __init__(self, work: Sequence[Job], feed: Feed | None) -> None:
        self._feed = feed
        self.jobs: list[Mapping[str, Any]] = [job_to_json(job) for job in work]
        self.closed = feed is None or feed.closed()

    def look(self) -> bool:
        """Ask the feed; True where something is new."""
        if self._feed is None:
            return False
        # In this order: what came with the end is in the plan asked for after it.
        before, self.closed = self.closed, self._feed.closed()
        work = self._feed.work()
        if work is not None:
            self.jobs = [job_to_json(job) for job in work]
        return work is not None or self.closed != before

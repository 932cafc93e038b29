"""WorkList: the jobs of a run in their order, what each needs, how it stands, and which a lane should take next."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from orchestrator.plan.jobs import needs_of

Standing = Literal["pending", "running", "elsewhere", "parked", "finished", "failed", "skipped"]
"""`elsewhere`: another driver works on it. `parked`: what it starts from is damaged, it waits for a new plan."""
OPEN = ("pending", "running", "elsewhere", "parked")
# Candidates that are weighed against each other; beyond them the order of the plan is good enough.
_WINDOW = 200


class WorkList:
    """Jobs as `job_to_json` writes them, parents before children; a parent that is not listed is finished already.

    Attributes:
        jobs: Every job that was listed, by id.
        standing: How each stands.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.standing: dict[str, Standing] = {}
        self._place: dict[str, int] = {}
        self._children: dict[str, list[str]] = {}
        self._ready: list[tuple[int, str]] = []
        self._num_open = 0

    @property
    def is_done(self) -> bool:
        """Nothing is left to do, and nothing under way."""
        return self._num_open == 0

    def replace(self, jobs: Sequence[Mapping[str, Any]], is_stored: Callable[[Mapping[str, Any]], bool]) -> list[str]:
        """Take a new complete plan: what is not begun is replaced, what runs, finished or failed stays as it is.

        Args:
            is_stored: Whether the ledger has a job's result: a finished one that it lost is done again.

        Returns:
            Jobs that are skipped from now on: what they start from failed.
        """
        old, skipped_before = self.standing, {n for n, s in self.standing.items() if s == "skipped"}
        kept = {name: self.jobs[name] for name, s in old.items() if s in ("running", "finished", "failed")}
        listed = {str(job["id"]): dict(job) for job in jobs}
        # All ranks of a lane get the same job, also those that ask after a new plan came.
        self.jobs = listed | {name: job for name, job in kept.items() if name not in listed or old[name] == "running"}
        self.standing = {name: old[name] for name in kept}
        for name, job in listed.items():
            before = old.get(name)
            redo = before not in ("running", "failed") and not (before == "finished" and is_stored(job))
            if redo:
                self.standing[name] = "pending"
        # What runs but is not listed any more stands first: its children may be listed.
        order = [name for name in kept if name not in listed] + list(listed)
        self._place = {name: place for place, name in enumerate(order)}
        self._children = {}
        for name in order:
            for need in self._needs(name):
                self._children.setdefault(need, []).append(name)
        gone = [name for name in order if self.standing[name] == "failed"]
        skipped = [name for failed in gone for name in self._skip_below(failed)]
        self._ready = [(self._place[name], name) for name in order if self._is_ready(name)]
        self._num_open = sum(standing in OPEN for standing in self.standing.values())
        return [name for name in skipped if name not in skipped_before]

    def set(self, name: str, standing: Standing) -> None:
        """Note how a job stands."""
        before, self.standing[name] = self.standing[name], standing
        self._num_open += (standing in OPEN) - (before in OPEN)
        entry = (self._place[name], name)
        at = bisect.bisect_left(self._ready, entry)
        is_listed = at < len(self._ready) and self._ready[at] == entry
        if is_listed and standing != "pending":
            del self._ready[at]
        elif not is_listed and self._is_ready(name):
            self._ready.insert(at, entry)
        if standing == "finished":
            for child in self._children.get(name, ()):
                if self._is_ready(child):
                    bisect.insort(self._ready, (self._place[child], child))

    def fail(self, name: str) -> list[str]:
        """Note that a job failed; returns those below it, which are skipped."""
        self.set(name, "failed")
        skipped = self._skip_below(name)
        self._num_open -= len(skipped)
        return skipped

    def that_are(self, standing: Standing) -> list[str]:
        """Return the ids of the jobs that stand so, in order."""
        return sorted((n for n, s in self.standing.items() if s == standing), key=self._place.__getitem__)

    def candidates(self, mine: str | None, others: Collection[str]) -> list[str]:
        """Return the jobs that can be begun, the best for a lane first.

        What goes on from the state in the lane's memory comes first. Then the plan's order, which is depth first,
        but away from where others work, so that each keeps its subtree and what it has in memory.

        Args:
            mine: State the lane has in memory.
            others: Jobs and states that other lanes and drivers are at.
        """
        names = [name for _, name in self._ready]
        if not others and mine is None:
            return names
        depths = self._depths(others)
        first = names[:_WINDOW]
        first.sort(key=lambda name: (mine not in needs_of(self.jobs[name]), self._closeness(name, depths)))
        return first + names[_WINDOW:]

    def _depths(self, names: Iterable[str]) -> dict[str, int]:
        """Return the ancestors of some jobs, themselves included, to how deep in the tree they are."""
        depths: dict[str, int] = {}
        for name in names:
            path = self._path(name)
            depths.update({one: len(path) - at for at, one in enumerate(path)})
        return depths

    def _closeness(self, name: str, depths: Mapping[str, int]) -> int:
        """Return the depth of the deepest state that a job shares with others."""
        return next((depths[one] for one in self._path(name) if one in depths), 0)

    def _path(self, name: str) -> list[str]:
        path = [name]
        while path[-1] in self.jobs and (needs := needs_of(self.jobs[path[-1]])):
            path.append(needs[0])
        return path

    def _needs(self, name: str) -> list[str]:
        return [need for need in needs_of(self.jobs[name]) if need in self.jobs]

    def _is_ready(self, name: str) -> bool:
        return self.standing[name] == "pending" and all(self.standing[n] == "finished" for n in self._needs(name))

    def _skip_below(self, name: str) -> list[str]:
        skipped: list[str] = []
        parents = [name]
        while parents:
            for child in self._children.get(parents.pop(), ()):
                if self.standing[child] in ("pending", "parked", "elsewhere"):
                    self.standing[child] = "skipped"
                    skipped.append(child)
                    parents.append(child)
        return sorted(skipped, key=self._place.__getitem__)


def parallel_width(jobs: Sequence[Mapping[str, Any]]) -> int:
    """Return how many of these jobs can be under way at once, at most."""
    needed = {need for job in jobs for need in needs_of(job)}
    return sum(job["id"] not in needed for job in jobs)

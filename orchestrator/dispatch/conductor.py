"""The conductor: hands the work out in order, counts attempts, and knows what became of every job. Pure Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.dispatch.failures import LOST_WORKER, Failure
from orchestrator.dispatch.outcome import Outcome

WAIT = "wait"
STOP = "stop"
RESTART = "restart"
# A lane whose workers die this often without touching a job has a fault of its own.
BARREN_ATTEMPTS = 3


@dataclass
class _Item:
    """One job handed to one attempt, and what each rank said of it."""

    job: str
    reports: dict[int, str | Failure] = field(default_factory=dict)
    first_failure: tuple[float, Failure] | None = None
    closed: bool = False


@dataclass
class _Attempt:
    """One life of a lane's worker group."""

    lane: str
    world_size: int
    items: list[_Item] = field(default_factory=list)
    answer_after: str | None = None
    ended: bool = False


class Conductor:
    """Holds the ordered work list, who does what, and what became of it.

    Lanes ask for item k of their attempt (one life of their worker group) and every rank of an attempt gets the same
    answer, so that no rank waits in a collective while there is nothing to do.

    Args:
        work: Jobs as `job_to_json` writes them, in the order they should be done.
        max_failures: Further attempts a job gets after a failure that may pass.
        fail_fast: The first failed job ends the run.
        patience_seconds: How long ranks may differ: after one rank failed, the others are given this long to report
            before the group is started anew (they may hang in a collective with the one that left).
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        work: Sequence[Mapping[str, Any]],
        max_failures: int = 3,
        fail_fast: bool = False,
        patience_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._jobs = {str(job["id"]): dict(job) for job in work}
        self._state = dict.fromkeys(self._jobs, "pending")
        self._needs = {name: _need(job, self._jobs) for name, job in self._jobs.items()}
        self._tries = dict.fromkeys(self._jobs, 0)
        self._errors: dict[str, str] = {}
        self._finished: list[str] = []
        self._events: list[dict[str, Any]] = []
        self._attempts: list[_Attempt] = []
        self._placement_groups: list[str] = []
        self._barren: dict[str, int] = {}
        self._fatal: str | None = None
        self._stopping = False
        self._interrupted = False
        self._max_failures = max_failures
        self._fail_fast = fail_fast
        self._patience_seconds = patience_seconds
        self._clock = clock
        self._first_pending = 0
        self._order = list(self._jobs)

    # What lanes call -------------------------------------------------------------------------------------------

    def begin(self, lane: str, world_size: int, placement_group: str | None = None) -> int:
        """A worker group of `lane` has started; returns the number of its attempt.

        What the lane's attempt before had in hand is given back: its workers are gone.

        Args:
            placement_group: Hexadecimal id of the resources it holds, for whoever has to free them.
        """
        if placement_group is not None:
            self._placement_groups.append(placement_group)
        for attempt in self._attempts:
            if attempt.lane == lane and not attempt.ended:
                self._end(attempt)
        if self._barren.get(lane, 0) >= BARREN_ATTEMPTS and self._fatal is None:
            self._fatal = f"the workers of {lane} died {self._barren[lane]} times before they took up any work"
            self._stopping = True
        self._barren[lane] = self._barren.get(lane, 0) + 1
        self._attempts.append(_Attempt(lane, world_size))
        return len(self._attempts) - 1

    def item(self, number: int, k: int) -> dict[str, Any] | str:
        """Item `k` of attempt `number`: a job, or `wait`, `stop` or `restart`; equal for every rank that asks."""
        attempt = self._attempts[number]
        if attempt.ended:
            return attempt.answer_after or RESTART
        if k < len(attempt.items):
            return self._jobs[attempt.items[k].job]
        if attempt.items and not attempt.items[-1].closed:
            return self._while_ranks_differ(attempt)
        if attempt.answer_after is None:
            return self._hand_out(attempt)
        return attempt.answer_after

    def finished(self, number: int, k: int, rank: int) -> None:
        """A rank has done its part of item `k`."""
        self._report(number, k, rank, "finished")

    def interrupted(self, number: int, k: int, rank: int) -> None:
        """A rank has left item `k` because a stop was asked for; its checkpoint is written."""
        self._report(number, k, rank, "interrupted")

    def failed(self, number: int, k: int, rank: int, failure: Mapping[str, Any]) -> None:
        """A rank's part of item `k` raised; `failure` as `Failure.to_json` writes it."""
        self._report(number, k, rank, Failure(**failure))

    def stopping(self) -> bool:
        """Whether a stop was asked for."""
        return self._stopping

    # What the driver calls -------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """No further item is handed out; what runs writes a checkpoint and leaves."""
        self._stopping = True
        self._interrupted = True

    def lane_ended(self, lane: str) -> None:
        """A lane is gone for good: what it had in hand is given back."""
        for attempt in self._attempts:
            if attempt.lane == lane and not attempt.ended:
                self._end(attempt)

    def events(self, seen: int) -> list[dict[str, Any]]:
        """Events from number `seen` on: `event`, `id`, `type`, `attempt`, and `error` where there is one."""
        return self._events[seen:]

    def placement_groups(self) -> list[str]:
        """Ids of the placement groups that worker groups have held."""
        return list(self._placement_groups)

    def fatal(self) -> str | None:
        """Why no lane can work, or None."""
        return self._fatal

    def outcome(self) -> Outcome:
        """What became of the work so far."""
        return Outcome(
            finished=tuple(self._finished),
            failed=dict(self._errors),
            skipped=tuple(name for name, state in self._state.items() if state == "skipped"),
            left=tuple(name for name, state in self._state.items() if state in ("pending", "running")),
            interrupted=self._interrupted,
        )

    # Inside ----------------------------------------------------------------------------------------------------

    def _hand_out(self, attempt: _Attempt) -> dict[str, Any] | str:
        if self._stopping:
            attempt.answer_after = STOP
            return STOP
        name = self._next_ready()
        if name is None:
            if any(state == "running" for state in self._state.values()):
                return WAIT
            attempt.answer_after = STOP
            return STOP
        self._state[name] = "running"
        self._tries[name] += 1
        self._barren[attempt.lane] = 0
        attempt.items.append(_Item(name))
        self._tell("started", name)
        return self._jobs[name]

    def _next_ready(self) -> str | None:
        while self._first_pending < len(self._order) and self._done_with(self._order[self._first_pending]):
            self._first_pending += 1
        for name in self._order[self._first_pending :]:
            if self._state[name] == "pending":
                need = self._needs[name]
                if need is None or self._state[need] == "finished":
                    return name
        return None

    def _done_with(self, name: str) -> bool:
        return self._state[name] in ("finished", "failed", "skipped")

    def _while_ranks_differ(self, attempt: _Attempt) -> str:
        item = attempt.items[-1]
        if item.first_failure is not None and self._clock() - item.first_failure[0] > self._patience_seconds:
            self._end(attempt)
            return RESTART
        return WAIT

    def _report(self, number: int, k: int, rank: int, report: str | Failure) -> None:
        attempt = self._attempts[number]
        if attempt.ended or attempt.items[k].closed:
            return  # a late word from a group that was already given up
        item = attempt.items[k]
        item.reports[rank] = report
        if isinstance(report, Failure) and item.first_failure is None:
            item.first_failure = (self._clock(), report)
        if len(item.reports) == attempt.world_size:
            self._close(attempt, item)

    def _close(self, attempt: _Attempt, item: _Item) -> None:
        item.closed = True
        reports = list(item.reports.values())
        failures = [report for report in reports if isinstance(report, Failure)]
        if not failures:
            self._settle(item.job, "interrupted" if "interrupted" in reports else "finished")
            return
        self._charge(item.job, _cause(item, failures))
        # Ranks that all failed alike before or after the same collective can go on together. Others cannot be
        # trusted to be in step, and after an error that may pass a fresh process is the better second try.
        alike = len({failure.kind for failure in failures}) == 1 and len(failures) == attempt.world_size
        if not alike or failures[0].retry:
            attempt.ended = True
            work_left = any(state in ("pending", "running") for state in self._state.values())
            attempt.answer_after = RESTART if work_left and not self._stopping else STOP

    def _end(self, attempt: _Attempt) -> None:
        attempt.ended = True
        if not attempt.items or attempt.items[-1].closed:
            return
        item = attempt.items[-1]
        item.closed = True
        failures = [report for report in item.reports.values() if isinstance(report, Failure)]
        cause = _cause(item, failures) if failures else None
        if cause is None or cause.retry:
            # What the survivors met (a connection closed by its peer) is seldom the cause.
            met = "" if cause is None else f"; another worker met {cause.message}"
            cause = Failure(
                LOST_WORKER, f"a worker process died or hung (killed, out of memory, machine lost){met}", True
            )
        self._charge(item.job, cause)

    def _settle(self, name: str, what: str) -> None:
        self._state[name] = "finished" if what == "finished" else "pending"
        if what == "finished":
            self._finished.append(name)
        self._tell(what, name)

    def _charge(self, name: str, failure: Failure) -> None:
        if self._stopping and failure.kind == LOST_WORKER:
            self._settle(name, "interrupted")
        elif failure.retry and self._tries[name] <= self._max_failures:
            self._state[name] = "pending"
            self._tell("retried", name, failure.message)
        else:
            again = f" (attempt {self._tries[name]} of {self._max_failures + 1})" if failure.retry else ""
            self._errors[name] = failure.message + again
            self._state[name] = "failed"
            self._tell("failed", name, self._errors[name], failure.kind)
            self._skip_children(name)
            self._stopping = self._stopping or self._fail_fast

    def _skip_children(self, parent: str) -> None:
        gone = {parent}
        # Parents stand before their children in the order, so one pass reaches every descendant.
        for name in self._order:
            if self._needs[name] in gone and self._state[name] == "pending":
                gone.add(name)
                self._state[name] = "skipped"
                self._tell("skipped", name, f"not run: {parent[:12]}, which it starts from, failed")

    def _tell(self, event: str, name: str, error: str | None = None, kind: str | None = None) -> None:
        told = {"event": event, "id": name, "type": self._jobs[name]["type"], "attempt": self._tries[name]}
        self._events.append(told if error is None else {**told, "error": error, "kind": kind})


def _need(job: Mapping[str, Any], jobs: Mapping[str, Any]) -> str | None:
    """The job of this work list that must be finished first; a parent outside it is finished already."""
    parent = job.get("parent") or job.get("state")
    return parent if parent in jobs else None


def _cause(item: _Item, failures: Sequence[Failure]) -> Failure:
    """The failure to tell: an error meant for users before any other, else the first: later ones often follow it."""
    plain = [failure for failure in failures if not failure.retry]
    if plain:
        return plain[0]
    return item.first_failure[1] if item.first_failure else failures[0]

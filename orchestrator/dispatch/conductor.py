"""The conductor: assigns jobs to lanes, watches their workers, and rebuilds its state after a restart."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.dispatch.failures import LOST_WORKER, Failure
from orchestrator.dispatch.job_queue import JobQueue
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.leases import Leases
from orchestrator.plan.ledger.process import Process
from orchestrator.spec.infrastructure import ClusterSpec

# Live ranks of a hung group have this long to write their stacks.
_STACKS_SECONDS = 15.0
# A group that still lives this long after it was to be killed is reported again.
_REPORT_AGAIN_SECONDS = 30.0
_NEWS_SECONDS = 2.0
_LOOK_SECONDS = 0.05


@dataclass
class Item:
    """One job assigned to one attempt, and what each rank reported of it."""

    job: str
    token: int
    reports: dict[int, str | Failure] = field(default_factory=dict)
    first_failure: tuple[float, Failure] | None = None
    closed: bool = False

    @property
    def failures(self) -> list[Failure]:
        """The failures that ranks reported, in order."""
        return [report for report in self.reports.values() if isinstance(report, Failure)]

    def cause(self) -> Failure:
        """Return the failure to report: a permanent one before a transient one, else the first, which often caused the
        others.
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
        items: What it was assigned, by number; a conductor that took it over knows only the last.
        last: Number of the item assigned last; -1 before the first.
        holds: State its workers have in memory.
        moved: When a rank last made progress, in the conductor's seconds.
        hung: Since when it counts as hung, and why.
        reported: When the driver was asked to kill it.
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
    reported: float | None = None

    @property
    def nodes(self) -> set[str]:
        """The nodes of the ranks that have been heard."""
        return {rank.who.get("node", "") for rank in self.ranks.values()}

    @property
    def open_item(self) -> Item | None:
        """The item its ranks are working on."""
        item = self.items.get(self.last)
        return None if item is None or item.closed else item

    def assign(self, number: int, item: Item) -> None:
        """Set the item of this number for all ranks."""
        self.items[number], self.last = item, number

    def heard(self, who: Mapping[str, Any], now: float, progress: int = 0, has_dumped: bool = False) -> None:
        """Record a heartbeat of a rank and its progress."""
        rank = self.ranks.setdefault(who["rank"], _Rank(who, now))
        rank.heard, rank.has_dumped = now, rank.has_dumped or has_dumped
        if progress > rank.progress:
            rank.progress, self.moved = progress, now

    def reset_timers(self, now: float) -> None:
        """Restart the timers: the conductor itself was busy, so late heartbeats count as on time."""
        self.moved = now
        for rank in self.ranks.values():
            rank.heard = now

    def look(self, now: float, patience_seconds: float) -> None:
        """Mark it hung if no rank made progress, or a rank was silent, for this long.

        A rank that stops after the last progress is found silent later than the group is found hung: it is the reason.
        """
        if self.ended or self.reported is not None:
            return
        silent = [str(number) for number in self._silent(now, patience_seconds)]
        since, minutes = self.hung[0] if self.hung else now, f"{patience_seconds / 60:g} minutes"
        if silent:
            self.hung = since, f"rank {', '.join(silent)} sent no heartbeat for {minutes}"
        elif self.hung is None and self.open_item is not None and now - self.moved > patience_seconds:
            self.hung = since, f"no rank made progress for {minutes}"

    def to_kill(self, now: float, patience_seconds: float) -> list[dict[str, Any]]:
        """Return the processes of a hung group to kill, once live ranks have written their stacks."""
        if self.hung is None or (self.reported is not None and now - self.reported < _REPORT_AGAIN_SECONDS):
            return []
        silent = self._silent(now, patience_seconds)
        waits = any(not rank.has_dumped for number, rank in self.ranks.items() if number not in silent)
        if waits and now - self.hung[0] < _STACKS_SECONDS:
            return []
        self.reported = now
        job = self.items[self.last].job if self.open_item is not None else None
        return [
            {**rank.who, "job": job, "silent": number in silent, "why": self.hung[1]}
            for number, rank in self.ranks.items()
        ]

    def _silent(self, now: float, patience_seconds: float) -> list[int]:
        return [number for number, rank in self.ranks.items() if now - rank.heard > patience_seconds]


@dataclass(frozen=True)
class Rules:
    """How a conductor treats failures, damage and hung worker groups.

    Attributes:
        max_failures: Further attempts a job gets after a failure that may pass.
        fail_fast: The first failed job ends the run.
        plans_again: Whether the driver makes a new plan where a stored state turns out to be damaged.
        stall_seconds: How long a group may make no progress, or a rank be silent; None for as long as it likes.
        patience_seconds: How long ranks may differ: after one rank failed, the others are given this long to report
            before the group is started anew (they may hang in a collective with the one that left).
    """

    max_failures: int = 3
    fail_fast: bool = False
    plans_again: bool = False
    stall_seconds: float | None = None
    patience_seconds: float = 2.0

    @classmethod
    def of(cls, cluster: ClusterSpec, fail_fast: bool, plans_again: bool) -> Rules:
        """Return the rules that `cluster` asks for."""
        stall = None if cluster.stall_minutes is None else 60 * float(cluster.stall_minutes)
        return cls(cluster.max_failures, fail_fast, plans_again, stall)


def new_driver() -> str:
    """Return an id for a driver: the owner of its leases."""
    return f"driver-{uuid.uuid4().hex[:12]}"


WAIT = "wait"
STOP = "stop"
RESTART = "restart"
# A lane whose workers die this often before they take a job is itself the problem.
BARREN_ATTEMPTS = 3


class Conductor:
    """Holds the jobs, which lane does which, and how they ended.

    Every rank of a lane's worker group (an attempt) asks for item k when it has done item k - 1, and all ranks get
    the same answer, so that no rank waits in a collective while there is nothing to do. A question carries all that a
    conductor has to know to answer it, so a restarted one continues where it was: the driver sends it the plan, the
    leases say what is running, and each rank says who it is and what it did last. All calls may be repeated.

    Args:
        url: The storage.
        driver: Id of the driver; owns the leases.
        process: The driver's, as `asdict` writes it: leases live as long as it does. None: this process.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        url: str,
        driver: str,
        rules: Rules | None = None,
        process: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rules = rules or Rules()
        ledger = Ledger(url)
        self._leases = Leases(ledger.store, driver, process=Process(**process) if process else None)
        self._queue = JobQueue(ledger, self._leases, self._rules.max_failures, self._rules.plans_again, clock)
        self._clock = clock
        self._epoch = uuid.uuid4().hex
        self._attempts: dict[str, Attempt] = {}
        self._reserved: dict[str, list[str]] = {}
        self._barren: dict[str, int] = {}
        self._given_up: dict[str, str] = {}
        self._groups: dict[str, list[str]] = {}
        self._leaving: frozenset[str] = frozenset()
        self._is_planned = self._is_closed = self._is_interrupted = False

    # What lanes call -------------------------------------------------------------------------------------------

    def begin(self, who: Mapping[str, Any]) -> None:
        """Take note that a worker group has started; the job of the lane's earlier group is queued again.

        Args:
            who: A rank: `lane`, `attempt` (unique), `world_size`, `rank`, `placement_group`, and `unfit` where the node
                of one cannot do what the run asks of it.
        """
        lane = who["lane"]
        if who["attempt"] in self._attempts:
            return
        if who.get("placement_group"):
            self._groups.setdefault(lane, []).append(who["placement_group"])
        self._end_lane(lane)
        if who.get("unfit"):
            self._given_up[lane] = who["unfit"]
        elif self._barren.get(lane, 0) >= BARREN_ATTEMPTS:
            self._given_up[lane] = f"the workers of {lane} died {self._barren[lane]} times before they took up any work"
        self._barren[lane] = self._barren.get(lane, 0) + 1
        self._attempts[who["attempt"]] = Attempt(who["attempt"], lane, who["world_size"], self._clock())

    def next_item(
        self, who: Mapping[str, Any], k: int, last: str | None, report: str | Mapping[str, Any] | None
    ) -> dict[str, Any] | str:
        """Return item `k` for a rank: `job` and `token`, or `wait`, `stop` or `restart`; the same for every rank.

        Args:
            who: The rank, as in `begin`, with `node`, `pid` and `started` of its process.
            last: The job it did as item `k - 1`.
            report: What came of that: `finished`, `interrupted`, or a `Failure` as `to_json` writes it.
        """
        attempt = self._attempts.get(who["attempt"]) or self._take_over(who, k, last)
        if attempt is None:
            return RESTART if self._is_planned else WAIT
        attempt.heard(who, self._clock())
        if report is not None:
            self._report(attempt, k - 1, who["rank"], report if isinstance(report, str) else Failure(**report))
        if attempt.ended:
            return attempt.answer_after or RESTART
        if k in attempt.items:
            item = attempt.items[k]
            return {"job": self._queue.work.jobs[item.job], "token": item.token}
        if attempt.open_item is not None:
            return self._while_ranks_differ(attempt)
        return attempt.answer_after or self._assign(attempt, k)

    def heartbeat(
        self, who: Mapping[str, Any], progress: int, has_dumped: bool, at: Sequence[Any] | None = None
    ) -> dict[str, bool]:
        """Take a rank's heartbeat; return whether to `stop` at the next checkpoint and to `dump` the stacks.

        Args:
            progress: Grows whenever the rank makes progress.
            has_dumped: Whether the stacks that were asked for are written.
            at: `k` and `last` of the current item, by which a restarted conductor watches it too.
        """
        attempt = self._attempts.get(who["attempt"]) or (self._take_over(who, *at) if at else None)
        self._barren.setdefault(who["lane"], 0)  # its workers had started, under an earlier conductor
        if attempt is not None:
            attempt.heard(who, self._clock(), progress, has_dumped)
        hung = attempt is not None and attempt.hung is not None
        stop = self.is_stopping() or (attempt is not None and self._must_move(attempt))
        return {"stop": stop, "dump": hung and not has_dumped}

    # What the driver calls -------------------------------------------------------------------------------------

    def set_work(
        self, jobs: Sequence[Mapping[str, Any]] | None, closed: bool, known: Mapping[str, Any] | None = None
    ) -> None:
        """Take the newest complete plan.

        Args:
            jobs: As `job_to_json` writes them, parents before children; None: those it has, which are not looked up in
                the storage again.
            closed: Whether no further plan will come.
            known: For a restarted conductor: what the driver heard before (`RunState.known`).
        """
        if jobs is None and not self._is_planned:
            return  # it has just been started again: the driver sends the plan when it hears of that
        self._is_closed = closed
        if jobs is None:
            return
        self._queue.plan(jobs, known)
        if self._is_planned:
            return
        self._is_planned = True
        self._reserved = self._queue.reserved()
        for lane in {attempt.lane for attempt in self._attempts.values()}:
            self._give_back_reserved(lane)  # a new group began before the plan came

    def interrupt(self) -> None:
        """Assign no further item; running jobs write a checkpoint and stop."""
        self._is_interrupted = True

    def nodes_leave(self, nodes: Sequence[str]) -> None:
        """Take note of all nodes that are about to be taken away: the lanes that have a worker there stop at a
        checkpoint and start anew on others.
        """
        self._leaving = frozenset(nodes)

    def is_stopping(self) -> bool:
        """Return whether a stop was asked for, or the first failure ended the run."""
        return self._is_interrupted or (self._rules.fail_fast and "failed" in self._queue.work.status.values())

    def lane_ended(self, lane: str) -> bool:
        """Queue the job of a lane whose Train run is over again; True if its workers had started."""
        self._end_lane(lane)
        return lane in self._barren

    def poll(self, epoch: str, seen: int) -> dict[str, Any]:
        """Return what is new for the driver.

        Args:
            epoch: Which life of the conductor the driver heard last.
            seen: How many of its events.

        Returns:
            `epoch`, `events`, `hung` (processes to be killed), `given_up` (lane to why it cannot work).
        """
        now, stall = self._clock(), self._rules.stall_seconds
        if self._is_planned and not self.is_stopping():
            self._queue.recheck()
        hung: list[dict[str, Any]] = []
        for attempt in self._attempts.values():
            if stall is not None and not attempt.ended:
                attempt.look(now, stall)
                hung += attempt.to_kill(now, stall)
        events = self._queue.events[seen if epoch == self._epoch else 0 :]
        return {"epoch": self._epoch, "events": events, "hung": hung, "given_up": dict(self._given_up)}

    def wait_for_news(self, epoch: str, seen: int) -> None:
        """Return once `poll` has an event for a driver that heard `seen` of them, or after 2 seconds.

        Called beside the other calls, in a thread of its own: it only looks how many events there are.
        """
        end = time.monotonic() + _NEWS_SECONDS
        while epoch == self._epoch and len(self._queue.events) <= seen and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)

    def placement_groups(self, lane: str) -> list[str]:
        """Return the ids of the placement groups that worker groups of a lane have held."""
        return list(self._groups.get(lane, ()))

    def leave(self) -> None:
        """End the run: release the leases."""
        self._queue.close()

    # Inside ----------------------------------------------------------------------------------------------------

    def _take_over(self, who: Mapping[str, Any], k: int, last: str | None) -> Attempt | None:
        """Continue an attempt that began under an earlier conductor."""
        lane = who["lane"]
        if not self._is_planned or any(a.lane == lane and not a.ended for a in self._attempts.values()):
            return None
        attempt = Attempt(who["attempt"], lane, who["world_size"], self._clock(), last=k - 1, holds=last)
        self._attempts[attempt.id] = attempt
        for job in self._reserved.pop(lane, ()):
            token = self._queue.token(job, lane)
            # The others may still be at what this rank has done already; anything else it is to do now.
            attempt.assign(k - 1 if job == last else k, Item(job, -1 if token is None else token))
        return attempt

    def _must_move(self, attempt: Attempt) -> bool:
        return not self._leaving.isdisjoint(attempt.nodes)

    def _assign(self, attempt: Attempt, k: int) -> dict[str, Any] | str:
        if self.is_stopping() or attempt.lane in self._given_up:
            attempt.answer_after = STOP
            return STOP
        if self._must_move(attempt):
            attempt.ended = True
            return RESTART
        given = self._queue.assign(attempt.lane, attempt.holds, self._others(attempt))
        if given is None:
            attempt.answer_after = STOP if self._is_over() else None
            return attempt.answer_after or WAIT
        name, token = given
        attempt.moved = self._clock()
        self._barren[attempt.lane] = 0
        attempt.assign(k, Item(name, token))
        return {"job": self._queue.work.jobs[name], "token": token}

    def _is_over(self) -> bool:
        return self.is_stopping() or (self._is_closed and self._queue.work.is_done)

    def _others(self, mine: Attempt) -> set[str]:
        """Return the jobs and states that the other lanes are at."""
        others = [a for a in self._attempts.values() if a is not mine and not a.ended and a.lane != mine.lane]
        found = {item.job for a in others if (item := a.open_item) is not None}
        found |= {name for names in self._reserved.values() for name in names}
        return found | {a.holds for a in others if a.holds is not None}

    def _while_ranks_differ(self, attempt: Attempt) -> str:
        item = attempt.items[attempt.last]
        late = self._clock() - (item.first_failure[0] if item.first_failure else self._clock())
        if late > self._rules.patience_seconds:
            self._end(attempt)
            return RESTART
        return WAIT

    def _report(self, attempt: Attempt, k: int, rank: int, report: str | Failure) -> None:
        item = attempt.items.get(k)
        if attempt.ended or item is None or item.closed or rank in item.reports:
            return  # repeated, or a late report from a group that was given up
        attempt.moved = self._clock()
        item.reports[rank] = report
        if isinstance(report, Failure) and item.first_failure is None:
            item.first_failure = (self._clock(), report)
        if len(item.reports) == attempt.world_size:
            self._close(attempt, item)

    def _close(self, attempt: Attempt, item: Item) -> None:
        item.closed = True
        attempt.items = {attempt.last: item}
        failures = item.failures
        if not failures:
            if "interrupted" in item.reports.values():
                attempt.holds = None
                self._queue.interrupt(item.job, attempt.lane)
            else:
                job = self._queue.work.jobs[item.job]
                if job["type"] != "evaluation":
                    attempt.holds = item.job
                elif job["state"] != attempt.holds:
                    attempt.holds = None  # the model it tested took the place of what was there
                self._queue.finish(item.job, attempt.lane)
            return
        attempt.holds = None
        self._record_failure(item.job, item.cause(), attempt.lane)
        # Ranks that all failed alike before or after the same collective can continue together. Others may be out of
        # step, and after a transient error a fresh process is the better second try.
        alike = len({failure.kind for failure in failures}) == 1 and len(failures) == attempt.world_size
        if not alike or failures[0].retry:
            attempt.ended = True
            attempt.answer_after = STOP if self._is_over() else RESTART

    def _end_lane(self, lane: str) -> None:
        for attempt in self._attempts.values():
            if attempt.lane == lane and not attempt.ended:
                self._end(attempt)
        self._give_back_reserved(lane)

    def _give_back_reserved(self, lane: str) -> None:
        for name in self._reserved.pop(lane, ()):
            self._record_failure(name, _lost(""), lane)

    def _end(self, attempt: Attempt) -> None:
        attempt.ended = True
        item = attempt.open_item
        if item is None:
            return
        item.closed = True
        cause = item.cause() if item.failures else None
        if attempt.hung is not None:
            where = "the stacks of its processes are at the end of its log files (log.txt, log_rankN.txt)"
            cause = Failure(LOST_WORKER, f"hung: {attempt.hung[1]} and it was killed; {where}", True)
        elif cause is None or cause.retry:
            # What the survivors met (a connection closed by its peer) is seldom the cause.
            cause = _lost("" if cause is None else f"; another worker met {cause.message}")
        self._record_failure(item.job, cause, attempt.lane)

    def _record_failure(self, job: str, failure: Failure, lane: str) -> None:
        self._queue.record_failure(job, failure, lane, self.is_stopping())
        if failure.damaged is not None:  # reading a large state takes time: no heartbeat was taken meanwhile
            for attempt in self._attempts.values():
                attempt.reset_timers(self._clock())


def _lost(met: str) -> Failure:
    return Failure(LOST_WORKER, f"a worker process died or hung (killed, out of memory, machine lost){met}", True)

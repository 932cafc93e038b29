"""The jobs of one driver: their order and status, leases, retries, failures, damage, and the events about them."""

from __future__ import annotations

import bisect
import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from orchestrator.dispatch.failures import LOST_WORKER, TAKEN_OVER, Failure
from orchestrator.errors import DamagedStateError, StorageError
from orchestrator.plan.jobs import needs_of
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.files import log_path
from orchestrator.plan.ledger.leases import Leases

ASK_AGAIN_SECONDS = 2.0


class JobQueue:
    """Assigns the jobs of one driver, and decides after a failure what becomes of each.

    Args:
        ledger: Where results, failures and leases are.
        leases: The driver's.
        max_failures: Further attempts a job gets after a failure that may pass.
        plans_again: Whether a new plan comes after damage was found; without one the job that met it fails.
        clock: Monotonic seconds.

    Attributes:
        work: The jobs and their status.
        events: What happened: `event`, `id`, `type`, `attempt`, `lane`, and `error`, `kind`, `state` or `elsewhere`
            where there is one.
    """

    def __init__(
        self,
        ledger: Ledger,
        leases: Leases,
        max_failures: int,
        plans_again: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._leases = leases
        self._max_failures = max_failures
        self._plans_again = plans_again
        self._clock = clock
        self._attempts: dict[str, int] = {}
        self._damages: dict[str, int] = {}
        self._failures_seen: dict[str, dict[str, Any] | None] = {}
        self._asked = clock()
        self.work = JobGraph()
        self.events: list[dict[str, Any]] = []

    def plan(self, jobs: Sequence[Mapping[str, Any]], known: Mapping[str, Any] | None = None) -> None:
        """Take the newest complete plan.

        Args:
            known: What the driver knows of an earlier life of the conductor (`RunState.known`).
        """
        known = known or {}
        endings = known.get("endings", {})
        self._attempts = known.get("attempts", {}) | self._attempts  # attempts lost to other causes are not in it
        skipped = self.work.replace(jobs, self._is_stored)
        for name in list(self.work.status):
            if endings.get(name) == "failed":
                skipped += self.work.fail(name)
            elif endings.get(name) == "finished":
                self.work.set(name, "finished")
        self._emit_skipped(skipped, "")

    def reserved(self) -> dict[str, list[str]]:
        """Return lane to the jobs assigned to it before this conductor started; they count as running."""
        found: dict[str, list[str]] = {}
        for name, lane in self._leases.held().items():
            if self.work.status.get(name) == "pending":
                self.work.set(name, "running")
                self._attempts.setdefault(name, 1)  # the driver may have missed its start
                found.setdefault(lane, []).append(name)
            else:
                self._release(name)
        return found

    def token(self, name: str, lane: str) -> int | None:
        """Return the fencing token of a running job of this driver; None if another driver took it over."""
        with contextlib.suppress(StorageError):
            return self._leases.acquire(name, lane)
        return None

    def assign(self, lane: str, mine: str | None, others: Collection[str]) -> tuple[str, int] | None:
        """Return the next job for a lane and its fencing token; None if there is none for it now."""
        others = {*others, *self.work.with_status("elsewhere")}
        for name in self.work.candidates(mine, others):
            if self.work.status[name] != "pending":
                continue  # skipped meanwhile: an earlier candidate could not be leased
            try:
                self._leases.release(name)  # where that failed before: no group gets the token of an earlier one
                token = self._leases.acquire(name, lane)
                job = self.work.jobs[name]
                is_stored = token is not None and (self._is_stored(job) or self._is_recovered(job))
            except StorageError as error:
                self._fail(name, Failure(StorageError.__name__, str(error), False), lane)
                continue
            if token is None:
                self._set_elsewhere(name)
            elif is_stored:
                self.finish(name, lane, elsewhere=True)
            elif not self._has_failed_elsewhere(name):
                self.work.set(name, "running")
                self._attempts[name] = self._attempts.get(name, 0) + 1
                self._emit("started", name, lane)
                return name, token
        return None

    def recheck(self) -> None:
        """Check every few seconds whether jobs of other drivers are done, failed, or free."""
        if self._clock() - self._asked < ASK_AGAIN_SECONDS:
            return
        self._asked = self._clock()
        for name in self.work.with_status("elsewhere"):
            if self.work.status[name] != "elsewhere":
                continue  # skipped: what it starts from failed elsewhere
            with contextlib.suppress(StorageError):
                if self._is_stored(self.work.jobs[name]):
                    self.finish(name, "", elsewhere=True)
                elif not self._has_failed_elsewhere(name):
                    self.work.set(name, "pending")

    def finish(self, name: str, lane: str, elsewhere: bool = False) -> None:
        """Record that a job is done."""
        self.work.set(name, "finished")
        with contextlib.suppress(StorageError):
            self._ledger.clear_failure(name)
            self._leases.forget(name)
        self._emit("finished", name, lane, **({"elsewhere": True} if elsewhere else {}))

    def interrupt(self, name: str, lane: str) -> None:
        """Record that a job stopped at a checkpoint because it was asked to; that is no failed attempt."""
        self._give_back(name)
        self._emit("interrupted", name, lane)
        self._attempts[name] -= 1

    def record_failure(self, name: str, failure: Failure, lane: str, stopping: bool) -> None:
        """Record that a job failed: it is retried, waits for a new plan, or has failed for good."""
        if stopping and failure.kind == LOST_WORKER:
            self.interrupt(name, lane)
        elif failure.kind == TAKEN_OVER:
            self._attempts[name] -= 1
            self._release(name)
            self._set_elsewhere(name)
            self._emit("retried", name, lane, error=failure.message, kind=failure.kind)
        elif failure.damaged is not None and self._is_lost(failure.damaged):
            self._record_damage(name, failure, failure.damaged, lane)
        elif (failure.retry or failure.damaged) and self._attempts[name] <= self._max_failures:
            self._give_back(name)
            self._emit("retried", name, lane, error=failure.message, kind=failure.kind)
        else:
            self._fail(name, failure, lane)

    def close(self) -> None:
        """Release all leases."""
        with contextlib.suppress(StorageError):
            self._leases.close()

    # Inside ----------------------------------------------------------------------------------------------------

    def _is_stored(self, job: Mapping[str, Any]) -> bool:
        """Return whether the ledger has a job's result with everything that is to be kept of it."""
        name = str(job["id"])
        if job["type"] == "evaluation":
            return self._ledger.evaluation(name) is not None
        return job["type"] in ("root", "start", "stage") and self._ledger.is_stored(name, job.get("keep", "weights"))

    def _is_recovered(self, job: Mapping[str, Any]) -> bool:
        """Return whether a state that an interrupted gc had set aside is stored again."""
        return job["type"] != "evaluation" and self._ledger.recover(str(job["id"])) and self._is_stored(job)

    def _set_elsewhere(self, name: str) -> None:
        self.work.set(name, "elsewhere")
        with contextlib.suppress(StorageError):  # not seen: then it is retried here, once it is free
            self._failures_seen.setdefault(name, self._ledger.failure(name))

    def _has_failed_elsewhere(self, name: str) -> bool:
        """Return whether the other driver that ran a job has recorded its failure."""
        if name not in self._failures_seen:
            return False
        failure = self._ledger.failure(name)
        if failure is None or failure == self._failures_seen[name]:
            return False
        self._release(name)
        skipped = self.work.fail(name)
        self._emit("failed", name, "", error=str(failure.get("error")), kind="Elsewhere", elsewhere=True)
        self._emit_skipped(skipped, name)
        return True

    def _record_damage(self, name: str, failure: Failure, state: str, lane: str) -> None:
        self._damages[name] = self._damages.get(name, 0) + 1
        # A disk that damages everything written to it would cause endless retries.
        if not self._plans_again or self._damages[name] > self._max_failures + 1:
            self._fail(name, failure, lane)
            return
        self._attempts[name] -= 1
        self._release(name)
        self.work.set(name, "parked")
        self._emit("damaged", name, lane, error=failure.message, kind=failure.kind, state=state)

    def _is_lost(self, state: str) -> bool:
        """Check a state that a worker found damaged; one that is, is removed from the ledger."""
        try:
            ledger = Ledger(self._ledger.url)  # one that has not verified it before: files may have gone since
            if ledger.is_done(state):
                for part in ("weights", "checkpoint"):
                    if ledger.has(state, part):
                        ledger.fetch(state, part)
                return False
        except DamagedStateError:
            with contextlib.suppress(StorageError):
                self._ledger.discard(state)
        except StorageError:
            return False
        return True

    def _give_back(self, name: str) -> None:
        # A new lease has a new token, which fences off whatever the old worker group still writes.
        self._release(name)
        self.work.set(name, "pending")

    def _release(self, name: str) -> None:
        with contextlib.suppress(StorageError):
            self._leases.release(name)

    def _fail(self, name: str, failure: Failure, lane: str) -> None:
        tries = self._attempts.get(name, 0)
        again = f" (attempt {tries} of {self._max_failures + 1})" if failure.retry else ""
        error = failure.message + again
        # A full or broken disk is not the cell's failure: once it is repaired, the same command resumes.
        if failure.kind != StorageError.__name__:
            log = str(log_path(self._ledger.work_folder(name)))
            kind = self.work.jobs[name]["type"]
            note = {"id": name, "type": kind, "error": error, "attempts": tries, "log": log}
            with contextlib.suppress(StorageError):
                self._ledger.write_failure(name, note)
        self._release(name)
        skipped = self.work.fail(name)
        self._emit("failed", name, lane, error=error, kind=failure.kind)
        self._emit_skipped(skipped, name)

    def _emit_skipped(self, names: Sequence[str], failed: str) -> None:
        why = f"{failed[:12]}, which it starts from, failed" if failed else "what it starts from failed"
        for name in names:
            self._emit("skipped", name, "", error=f"not run: {why}", kind="Skipped")

    def _emit(self, event: str, name: str, lane: str, **more: Any) -> None:
        kind, attempt = self.work.jobs[name]["type"], self._attempts.get(name, 0)
        about = {"event": event, "id": name, "type": kind, "attempt": attempt}
        self.events.append(about | ({"lane": lane} if lane else {}) | more)


JobStatus = Literal["pending", "running", "elsewhere", "parked", "finished", "failed", "skipped"]
"""`elsewhere`: another driver works on it. `parked`: what it starts from is damaged; it waits for a new plan."""
OPEN = ("pending", "running", "elsewhere", "parked")
# Candidates that are compared; beyond them the order of the plan is good enough.
_WINDOW = 200


class JobGraph:
    """Jobs as `job_to_json` writes them, parents before children; a parent that is not listed is finished already.

    Attributes:
        jobs: Every job that was listed, by id.
        status: How each stands.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.status: dict[str, JobStatus] = {}
        self._place: dict[str, int] = {}
        self._children: dict[str, list[str]] = {}
        self._ready: list[tuple[int, str]] = []
        self._num_open = 0

    @property
    def is_done(self) -> bool:
        """Nothing is left to do, and nothing is running."""
        return self._num_open == 0

    def replace(self, jobs: Sequence[Mapping[str, Any]], is_stored: Callable[[Mapping[str, Any]], bool]) -> list[str]:
        """Take a new complete plan: jobs that have not begun are replaced, running and ended ones stay.

        Args:
            is_stored: Whether the ledger has a job's result: a finished one that it lost is done again.

        Returns:
            Jobs that are skipped from now on: what they start from failed.
        """
        old, skipped_before = self.status, {n for n, s in self.status.items() if s == "skipped"}
        kept = {name: self.jobs[name] for name, s in old.items() if s in ("running", "finished", "failed")}
        listed = {str(job["id"]): dict(job) for job in jobs}
        # All ranks of a lane get the same job, also those that ask after a new plan arrived.
        self.jobs = listed | {name: job for name, job in kept.items() if name not in listed or old[name] == "running"}
        self.status = {name: old[name] for name in kept}
        for name, job in listed.items():
            before = old.get(name)
            redo = before not in ("running", "failed") and not (before == "finished" and is_stored(job))
            if redo:
                self.status[name] = "pending"
        # What runs but is not listed any more stands first: its children may be listed.
        order = [name for name in kept if name not in listed] + list(listed)
        self._place = {name: place for place, name in enumerate(order)}
        self._children = {}
        for name in order:
            for need in self._needs(name):
                self._children.setdefault(need, []).append(name)
        gone = [name for name in order if self.status[name] == "failed"]
        skipped = [name for failed in gone for name in self._skip_below(failed)]
        self._ready = [(self._place[name], name) for name in order if self._is_ready(name)]
        self._num_open = sum(status in OPEN for status in self.status.values())
        return [name for name in skipped if name not in skipped_before]

    def set(self, name: str, status: JobStatus) -> None:
        """Set the status of a job."""
        before, self.status[name] = self.status[name], status
        self._num_open += (status in OPEN) - (before in OPEN)
        entry = (self._place[name], name)
        at = bisect.bisect_left(self._ready, entry)
        is_listed = at < len(self._ready) and self._ready[at] == entry
        if is_listed and status != "pending":
            del self._ready[at]
        elif not is_listed and self._is_ready(name):
            self._ready.insert(at, entry)
        if status == "finished":
            for child in self._children.get(name, ()):
                if self._is_ready(child):
                    bisect.insort(self._ready, (self._place[child], child))

    def fail(self, name: str) -> list[str]:
        """Mark a job failed; return the jobs below it, which are skipped."""
        self.set(name, "failed")
        skipped = self._skip_below(name)
        self._num_open -= len(skipped)
        return skipped

    def with_status(self, status: JobStatus) -> list[str]:
        """Return the ids of the jobs with this status, in order."""
        return sorted((n for n, s in self.status.items() if s == status), key=self._place.__getitem__)

    def candidates(self, mine: str | None, others: Collection[str]) -> list[str]:
        """Return the jobs that can be begun, the best for a lane first.

        A job that starts from the state in the lane's memory comes first. Then the plan's order, which is depth first,
        but away from where others work, so that each lane keeps its subtree and the state in its memory.

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
        return self.status[name] == "pending" and all(self.status[n] == "finished" for n in self._needs(name))

    def _skip_below(self, name: str) -> list[str]:
        skipped: list[str] = []
        parents = [name]
        while parents:
            for child in self._children.get(parents.pop(), ()):
                if self.status[child] in ("pending", "parked", "elsewhere"):
                    self.status[child] = "skipped"
                    skipped.append(child)
                    parents.append(child)
        return sorted(skipped, key=self._place.__getitem__)


def parallel_width(jobs: Sequence[Mapping[str, Any]]) -> int:
    """Return the largest number of these jobs that can run at the same time."""
    needed = {need for job in jobs for need in needs_of(job)}
    return sum(job["id"] not in needed for job in jobs)

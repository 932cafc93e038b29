"""Book: what becomes of each job: leases, tries, failures, damage, and the events that tell of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from orchestrator.dispatch.failures import LOST_WORKER, TAKEN_OVER, Failure
from orchestrator.dispatch.work_list import WorkList
from orchestrator.dispatch.worker_log import LOG_FILE
from orchestrator.errors import DamagedStateError, StorageError
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.leases import Leases

ASK_AGAIN_SECONDS = 2.0


class Book:
    """Keeps the jobs of one driver.

    Args:
        ledger: Where results, failures and leases are.
        leases: The driver's.
        max_failures: Further attempts a job gets after a failure that may pass.
        plans_again: Whether a new plan comes after damage was found; without one the job that met it fails.
        clock: Monotonic seconds.

    Attributes:
        work: The jobs.
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
        self._tries: dict[str, int] = {}
        self._damages: dict[str, int] = {}
        self._failures_seen: dict[str, dict[str, Any] | None] = {}
        self._asked = clock()
        self.work = WorkList()
        self.events: list[dict[str, Any]] = []

    def plan(self, jobs: Sequence[Mapping[str, Any]], known: Mapping[str, Any] | None = None) -> None:
        """Take the newest complete plan.

        Args:
            known: What the driver knows that an earlier life of the conductor told it (`Account.known`).
        """
        endings = (known or {}).get("endings", {})
        self._tries = (known or {}).get("tries", {}) | self._tries  # what was not its fault is not counted here
        skipped = self.work.replace(jobs, self._is_stored)
        for name in list(self.work.standing):
            if endings.get(name) == "failed":
                skipped += self.work.fail(name)
            elif endings.get(name) == "finished":
                self.work.set(name, "finished")
        self._tell_skipped(skipped, "")

    def reserved(self) -> dict[str, list[str]]:
        """Return the lane to jobs it has in hand from before this conductor; they count as under way."""
        found: dict[str, list[str]] = {}
        for name, lane in self._leases.held().items():
            if self.work.standing.get(name) == "pending":
                self.work.set(name, "running")
                self._tries.setdefault(name, 1)  # the driver may not have heard that it was begun
                found.setdefault(lane, []).append(name)
            else:
                self._let_go(name)
        return found

    def token(self, name: str, lane: str) -> int | None:
        """Return the token of a job this driver has in hand; None where another driver took it over."""
        with contextlib.suppress(StorageError):
            return self._leases.acquire(name, lane)
        return None

    def hand_out(self, lane: str, mine: str | None, others: Collection[str]) -> tuple[str, int] | None:
        """Return the next job for a lane and the token to write it under; None where there is none for it now."""
        others = {*others, *self.work.that_are("elsewhere")}
        for name in self.work.candidates(mine, others):
            if self.work.standing[name] != "pending":
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
                self._tries[name] = self._tries.get(name, 0) + 1
                self._tell("started", name, lane)
                return name, token
        return None

    def look_again(self) -> None:
        """Return every few seconds: what other drivers had in hand may be done, failed, or free."""
        if self._clock() - self._asked < ASK_AGAIN_SECONDS:
            return
        self._asked = self._clock()
        for name in self.work.that_are("elsewhere"):
            if self.work.standing[name] != "elsewhere":
                continue  # skipped: what it starts from failed elsewhere
            with contextlib.suppress(StorageError):
                if self._is_stored(self.work.jobs[name]):
                    self.finish(name, "", elsewhere=True)
                elif not self._has_failed_elsewhere(name):
                    self.work.set(name, "pending")

    def finish(self, name: str, lane: str, elsewhere: bool = False) -> None:
        """Return a job is done."""
        self.work.set(name, "finished")
        with contextlib.suppress(StorageError):
            self._ledger.clear_failure(name)
            self._leases.forget(name)
        self._tell("finished", name, lane, **({"elsewhere": True} if elsewhere else {}))

    def interrupt(self, name: str, lane: str) -> None:
        """Return a job was left at a checkpoint because a stop was asked for."""
        self._give_back(name)
        self._tell("interrupted", name, lane)

    def charge(self, name: str, failure: Failure, lane: str, stopping: bool) -> None:
        """Return a job failed: it is tried again, waits for a new plan, or has failed for good."""
        if stopping and failure.kind == LOST_WORKER:
            self.interrupt(name, lane)
        elif failure.kind == TAKEN_OVER:
            self._tries[name] -= 1
            self._let_go(name)
            self._set_elsewhere(name)
            self._tell("retried", name, lane, error=failure.message, kind=failure.kind)
        elif failure.damaged is not None and self._is_lost(failure.damaged):
            self._meet_damage(name, failure, failure.damaged, lane)
        elif (failure.retry or failure.damaged) and self._tries[name] <= self._max_failures:
            self._give_back(name)
            self._tell("retried", name, lane, error=failure.message, kind=failure.kind)
        else:
            self._fail(name, failure, lane)

    def close(self) -> None:
        """Let go of all leases."""
        with contextlib.suppress(StorageError):
            self._leases.close()

    # Inside ----------------------------------------------------------------------------------------------------

    def _is_stored(self, job: Mapping[str, Any]) -> bool:
        """Return whether the ledger has a job's result with all that is to stay of it."""
        name = str(job["id"])
        if job["type"] == "evaluation":
            return self._ledger.evaluation(name) is not None
        return job["type"] in ("root", "start", "stage") and self._ledger.is_stored(name, job.get("keep", "weights"))

    def _is_recovered(self, job: Mapping[str, Any]) -> bool:
        """Return whether a state is stored again that a gc, killed amid it, had taken aside."""
        return job["type"] != "evaluation" and self._ledger.recover(str(job["id"])) and self._is_stored(job)

    def _set_elsewhere(self, name: str) -> None:
        self.work.set(name, "elsewhere")
        with contextlib.suppress(StorageError):  # not seen: then it is tried here, once it is free
            self._failures_seen.setdefault(name, self._ledger.failure(name))

    def _has_failed_elsewhere(self, name: str) -> bool:
        """Return whether another driver, who had a job in hand, has written that it failed."""
        if name not in self._failures_seen:
            return False
        failure = self._ledger.failure(name)
        if failure is None or failure == self._failures_seen[name]:
            return False
        self._let_go(name)
        skipped = self.work.fail(name)
        self._tell("failed", name, "", error=str(failure.get("error")), kind="Elsewhere", elsewhere=True)
        self._tell_skipped(skipped, name)
        return True

    def _meet_damage(self, name: str, failure: Failure, state: str, lane: str) -> None:
        self._damages[name] = self._damages.get(name, 0) + 1
        # A disk that damages whatever is written would have it done for ever.
        if not self._plans_again or self._damages[name] > self._max_failures + 1:
            self._fail(name, failure, lane)
            return
        self._tries[name] -= 1
        self._let_go(name)
        self.work.set(name, "parked")
        self._tell("damaged", name, lane, error=failure.message, kind=failure.kind, state=state)

    def _is_lost(self, state: str) -> bool:
        """Look at a state that a worker found damaged; one that is, is taken out of the ledger."""
        try:
            ledger = Ledger(self._ledger.url)  # one that has not seen it whole before: files may have gone since
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
        # With a new lease comes a new token: whatever of the old group still writes is too late.
        self._let_go(name)
        self.work.set(name, "pending")

    def _let_go(self, name: str) -> None:
        with contextlib.suppress(StorageError):
            self._leases.release(name)

    def _fail(self, name: str, failure: Failure, lane: str) -> None:
        tries = self._tries.get(name, 0)
        again = f" (attempt {tries} of {self._max_failures + 1})" if failure.retry else ""
        error = failure.message + again
        # A full or broken disk is no fault of the cell: once it is mended, the same command goes on.
        if failure.kind != StorageError.__name__:
            log = str(self._ledger.work_folder(name) / LOG_FILE)
            kind = self.work.jobs[name]["type"]
            note = {"id": name, "type": kind, "error": error, "attempts": tries, "log": log}
            with contextlib.suppress(StorageError):
                self._ledger.write_failure(name, note)
        self._let_go(name)
        skipped = self.work.fail(name)
        self._tell("failed", name, lane, error=error, kind=failure.kind)
        self._tell_skipped(skipped, name)

    def _tell_skipped(self, names: Sequence[str], failed: str) -> None:
        why = f"{failed[:12]}, which it starts from, failed" if failed else "what it starts from failed"
        for name in names:
            self._tell("skipped", name, "", error=f"not run: {why}", kind="Skipped")

    def _tell(self, event: str, name: str, lane: str, **more: Any) -> None:
        told = {"event": event, "id": name, "type": self.work.jobs[name]["type"], "attempt": self._tries.get(name, 0)}
        self.events.append(told | ({"lane": lane} if lane else {}) | more)

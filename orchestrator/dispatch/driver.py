"""The driver's side of a run, however it is dispatched: its hooks, what it knows of the jobs, and the outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.plan.jobs import Job, job_to_json

_ENDINGS = ("finished", "failed", "skipped")


class Hooks:
    """What a dispatcher calls in the driver's thread; a driver overrides what it needs.

    Attributes:
        replans: Whether `newer_work` brings a new plan after a stored state turned out to be damaged.
    """

    replans = False

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Take an event.

        `event` holds `event` (started, finished, failed, retried, interrupted, skipped, damaged), `id`, `type`,
        `attempt`, and where there is one `lane`, `error`, `kind` (of the error), `elsewhere` (another driver did it)
        and `state` (the damaged state, which the ledger has let go of).
        """

    def on_tick(self) -> None:
        """Do what is due; called about ten times a second, in a local run between steps too. Must return at once."""

    def stop_asked(self) -> int:
        """Return 0 to continue, 1 to checkpoint and end the lanes, 2 to stop at once; asked after each tick."""
        return 0

    def newer_work(self) -> Sequence[Job] | None:
        """Return the newest complete plan, parents before children; None if nothing changed.

        A job that has not begun and is not in it is dropped.
        """
        return None

    def is_closed(self) -> bool:
        """Return whether no newer work will come: the run ends when the work is done."""
        return True


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


class RunState:
    """The newest plan and how its jobs ended; it outlives a conductor that dies.

    Each event is passed on once and in order.

    Args:
        work: The first plan.
        hooks: The driver's.

    Attributes:
        jobs: The newest plan, as `job_to_json` writes it.
        is_closed: Whether no newer plan will come.
        epoch: Which life of the conductor the latest events came from.
        seen: How many of that life's events were taken.
    """

    def __init__(self, work: Sequence[Job], hooks: Hooks) -> None:
        self._hooks = hooks
        self._endings: dict[str, str] = {}
        self._errors: dict[str, str] = {}
        self._attempts: dict[str, int] = {}
        self.jobs: list[Mapping[str, Any]] = [job_to_json(job) for job in work]
        self.is_closed = hooks.is_closed()
        self.epoch = ""
        self.seen = 0

    def refresh(self) -> bool:
        """Ask for newer work; True if something is new."""
        # In this order: what came with the end is in the plan asked for after it.
        before, self.is_closed = self.is_closed, self._hooks.is_closed()
        work = self._hooks.newer_work()
        if work is not None:
            self.jobs = [job_to_json(job) for job in work]
        return work is not None or self.is_closed != before

    def take(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Take the events since `seen`."""
        for event in events:
            self.seen += 1
            if self._is_new(event):
                self._hooks.on_event(event)

    def _is_new(self, event: Mapping[str, Any]) -> bool:
        name, kind = event["id"], event["event"]
        if kind == "damaged":
            # What it was is gone: it will finish a second time.
            self._endings.pop(event["state"], None)
            return True
        if kind == "started":
            self._attempts[name] = event["attempt"]
            self._endings.pop(name, None)
        if kind not in _ENDINGS:
            return True
        if self._endings.get(name) == kind:
            return False
        self._endings[name] = kind
        if kind == "failed":
            self._errors[name] = event["error"]
        return True

    def known(self) -> dict[str, Any]:
        """Return what a restarted conductor has to be told: `endings` and `attempts` by job."""
        return {"endings": dict(self._endings), "attempts": dict(self._attempts)}

    def outcome(self, interrupted: bool) -> Outcome:
        """Return what became of the work."""
        ended: dict[str, list[str]] = {kind: [] for kind in _ENDINGS}
        for name, kind in self._endings.items():
            ended[kind].append(name)
        return Outcome(
            finished=tuple(ended["finished"]),
            failed={name: self._errors[name] for name in ended["failed"]},
            skipped=tuple(ended["skipped"]),
            left=tuple(str(job["id"]) for job in self.jobs if job["id"] not in self._endings),
            interrupted=interrupted,
        )

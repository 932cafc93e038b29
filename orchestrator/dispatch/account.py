"""Account: what the driver knows of a run from its events; it outlives the conductor and tells each ending once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orchestrator.dispatch.outcome import Outcome

_ENDINGS = ("finished", "failed", "skipped")


class Account:
    """Passes events on, each once and in order, and remembers how jobs ended.

    Args:
        on_event: Who wants to hear them.

    Attributes:
        epoch: Which life of the conductor the events heard last came from.
        seen: How many of that life's events were heard.
    """

    def __init__(self, on_event: Callable[[Mapping[str, Any]], None]) -> None:
        self._on_event = on_event
        self._endings: dict[str, str] = {}
        self._errors: dict[str, str] = {}
        self._tries: dict[str, int] = {}
        self.epoch = ""
        self.seen = 0

    def take(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Hear what is new since `seen`."""
        for event in events:
            self.seen += 1
            if self._is_new(event):
                self._on_event(event)

    def _is_new(self, event: Mapping[str, Any]) -> bool:
        name, kind = event["id"], event["event"]
        if kind == "damaged":
            # What it was is gone: it will finish a second time.
            self._endings.pop(event["state"], None)
            return True
        if kind == "started":
            self._tries[name] = event["attempt"]
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
        """Return what a conductor that was started again has to be told: `endings` and `tries` by job."""
        return {"endings": dict(self._endings), "tries": dict(self._tries)}

    def outcome(self, planned: Sequence[Mapping[str, Any]], interrupted: bool) -> Outcome:
        """Return what became of the work.

        Args:
            planned: The newest plan's jobs.
        """
        ended: dict[str, list[str]] = {kind: [] for kind in _ENDINGS}
        for name, kind in self._endings.items():
            ended[kind].append(name)
        return Outcome(
            finished=tuple(ended["finished"]),
            failed={name: self._errors[name] for name in ended["failed"]},
            skipped=tuple(ended["skipped"]),
            left=tuple(str(job["id"]) for job in planned if job["id"] not in self._endings),
            interrupted=interrupted,
        )

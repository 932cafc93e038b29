"""Drives a conductor without Ray: a group of ranks that ask and report like a lane's, on a real ledger."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from orchestrator.dispatch.conductor import Conductor, Rules
from orchestrator.dispatch.failures import Failure

WILL_PASS = Failure("OSError", "the file server went away", True).to_json()
WILL_NOT = Failure("DataError", "row 7 is broken", False).to_json()


def job(name: str, parent: str | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "stage", "id": name, "parent": parent or "done-before", "keep": "full", **more}


def evaluation(name: str, state: str) -> dict[str, Any]:
    return {"type": "evaluation", "id": name, "state": state}


def unplanned(storage: Path, driver: str = "me", clock: Any = None, **rules: Any) -> Conductor:
    return Conductor(str(storage), driver, Rules(**rules), **({"clock": clock} if clock else {}))


def conductor(storage: Path, *jobs: dict[str, Any], closed: bool = True, **settings: Any) -> Conductor:
    made = unplanned(storage, **settings)
    made.set_work(jobs, closed)
    return made


def told(made: Conductor) -> list[tuple[str, str]]:
    return [(event["event"], event["id"]) for event in made.poll("", 0)["events"]]


def settled(made: Conductor, *kinds: str) -> list[str]:
    """Ids of what finished (or failed, or was skipped), in order."""
    return [name for event, name in told(made) if event in (kinds or ("finished",))]


def error_of(made: Conductor, name: str) -> str:
    return next(e["error"] for e in reversed(made.poll("", 0)["events"]) if e["id"] == name and "error" in e)


class Group:
    """One worker group: its ranks' numbers, what each did last, and what it is to say of it."""

    def __init__(
        self, made: Conductor, lane: str = "lane", world_size: int = 1, begin: bool = True, nodes: str = "alpha beta"
    ) -> None:
        self.nodes = nodes.split()
        self.made, self.lane, self.world_size = made, lane, world_size
        self.attempt = uuid.uuid4().hex
        self.k = [0] * world_size
        self.last: list[str | None] = [None] * world_size
        self.said: list[Any] = [None] * world_size
        self.tokens: dict[str, int] = {}
        if begin:
            made.begin(self.who(0))

    def who(self, rank: int) -> dict[str, Any]:
        place = {"node": self.nodes[rank % len(self.nodes)], "pid": 1000 + rank, "started": 0.0}
        return {"lane": self.lane, "attempt": self.attempt, "world_size": self.world_size, "rank": rank, **place}

    def ask(self, rank: int = 0) -> str:
        """What a rank is told: a job's id, or `wait`, `stop`, `restart`."""
        answer = self.made.next_item(self.who(rank), self.k[rank], self.last[rank], self.said[rank])
        if isinstance(answer, str):
            return answer
        self.k[rank] += 1
        self.last[rank], self.said[rank] = answer["job"]["id"], None
        self.tokens[answer["job"]["id"]] = answer["token"]
        return self.last[rank]

    def say(self, report: Any = "finished", rank: int = 0) -> str:
        """A rank ends its item like this and asks for the next."""
        self.said[rank] = report
        return self.ask(rank)

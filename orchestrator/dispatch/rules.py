"""Rules: how a conductor treats failures, damage and groups that hang; and the name a driver goes by."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from orchestrator.spec.infrastructure import ClusterSpec


@dataclass(frozen=True)
class Rules:
    """How a conductor works.

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
        """Return the rules of a run."""
        stall = None if cluster.stall_minutes is None else 60 * float(cluster.stall_minutes)
        return cls(cluster.max_failures, fail_fast, plans_again, stall)


def new_driver() -> str:
    """Return an id for a driver: the owner of its leases."""
    return f"driver-{uuid.uuid4().hex[:12]}"

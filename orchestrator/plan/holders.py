"""Who works on what in a storage: jobs that a living driver holds a lease of."""

from __future__ import annotations

import functools

from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.leases import Holder, Leases
from orchestrator.plan.tree import StageTree


def living_holders(ledger: Ledger) -> dict[str, Holder]:
    """Return the jobs under way to who works on them; what a driver left behind that was killed does not count."""
    return _onlooker(ledger).holders()


@functools.lru_cache(maxsize=4)
def _onlooker(ledger: Ledger) -> Leases:
    """Kept, so that of an owner on another machine that was waited for once the answer is known."""
    return Leases(ledger.store, "onlooker")


def is_worked_on(tree: StageTree, ledger: Ledger) -> bool:
    """Return True while a living driver holds any job of a tree."""
    held = living_holders(ledger)
    return any(job in held for job in (*tree.order, *tree.evaluations)) if held else False

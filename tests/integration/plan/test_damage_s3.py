"""A state damaged in a bucket is found and discarded."""

from __future__ import annotations

from stored import finish

from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.inventory import damage, discard_damage


def test_damage_in_a_bucket(bucket: str) -> None:
    ledger = Ledger(f"{bucket}/damage")
    finish(ledger, "a")
    finish(ledger, "b")
    (key,) = [key for key, size in ledger.store.sizes("objects/a").items() if size == 1000]
    ledger.store.write(key, b"x" * 999 + b"y")
    (found,) = damage(Ledger(ledger.url))
    assert (found["id"], found["files"]) == ("a", ["weights/model.safetensors"])
    discard_damage(ledger, [found])
    assert damage(Ledger(ledger.url)) == [] and not Ledger(ledger.url).is_done("a")

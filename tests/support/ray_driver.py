"""A driver of one trivial job: `python ray_driver.py CLUSTER STORAGE EXECUTOR`, the cluster as JSON."""

from __future__ import annotations

import json
import sys

from orchestrator.dispatch.driver import Hooks
from orchestrator.dispatch.ray.session import run_on_ray
from orchestrator.plan.jobs import RootJob
from orchestrator.plan.ledger import Ledger
from orchestrator.spec.infrastructure import ClusterSpec

if __name__ == "__main__":
    given, storage, executor = sys.argv[1:]
    cluster = ClusterSpec.model_validate(json.loads(given))
    outcome = run_on_ray([RootJob("job0", {"do": ""}, 0)], Ledger(storage), cluster, Hooks(), executor=executor)
    print(outcome.finished)

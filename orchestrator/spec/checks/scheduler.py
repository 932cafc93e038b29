"""`search.scheduler`: trials can be compared at its rungs, by one objective that an evaluation measures there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

from orchestrator.errors import ErrorDetail
from orchestrator.spec.base import parse_share
from orchestrator.spec.components import FINAL, FULL
from orchestrator.spec.search import measured_by
from orchestrator.spec.yaml.node import Node
from orchestrator.spec.yaml.validation_errors import error_at, unknown_name

_PATH = ("search", "scheduler")


def check_scheduler(root: Node) -> Iterator[ErrorDetail]:
    """Check that trials have one objective that is known on the way, and rungs and a variant to be compared at."""
    node = root.at(_PATH)
    if node is None or not node.is_mapping or not node.value:
        return
    objectives = list(root.entries("search", "objectives"))
    if len(objectives) > 1:
        message = f"trials are stopped by one objective, and there are {len(objectives)}: {', '.join(objectives)}"
        hint = "leave one of them (cost may be a constraint), or take the scheduler out"
        yield error_at(root, _PATH, message, "a single objective of an evaluation", hint)
    elif objectives and measured_by(objectives[0]) is None:
        message = f"at a rung trials are tested, and no evaluation measures the objective {objectives[0]}"
        yield error_at(root, _PATH, message, "a single objective of an evaluation: eval/ENTRY/METRIC")
    if not root.entries("phases"):
        yield error_at(root, _PATH, "nothing is trained, so there is nothing to stop", hint="take it out")
    yield from _rungs(root)
    known = [FINAL, FULL, *root.entries("compressors")]
    under = node.get("under")
    if under is not None and isinstance(under.value, str) and under.value not in known:
        message = f"there is no variant `{under.value}` to compare trials under"
        yield error_at(root, (*_PATH, "under"), message, *unknown_name(under.value, known))


def _rungs(root: Node) -> Iterator[ErrorDetail]:
    node = root.at((*_PATH, "rungs"))
    shares: list[Fraction] = []
    with contextlib.suppress(ValueError):  # reported where it stands
        shares = [parse_share(item) for item in node.plain()] if node is not None and node.is_list else []
    if any(later <= earlier for earlier, later in pairwise(shares)):
        yield error_at(root, (*_PATH, "rungs"), "each rung comes after the one before it", "rising shares below 1")
    elif any(share >= 1 for share in shares):
        message = "at the end of its steps a trial is finished; a rung lies before it"
        yield error_at(root, (*_PATH, "rungs"), message, "rising shares below 1")

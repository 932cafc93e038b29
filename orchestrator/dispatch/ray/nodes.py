"""The nodes that lanes may use: whether there is room on them, and whether each has what the driver has."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.dispatch.failures import one_line
from orchestrator.dispatch.node_needs import Needs, lacks
from orchestrator.dispatch.ray import compat
from orchestrator.dispatch.ray.placement import FREE_SECONDS, Room, room_for, workers_for
from orchestrator.errors import UsageError, first_line
from orchestrator.spec.infrastructure import ClusterSpec

# A task is a new process there, which on a node that is busy with others' work takes its time.
ANSWER_SECONDS = 120.0
_POLL_SECONDS = 0.1
_LOOK_SECONDS = 1.0


def wait_for_room(
    cluster: ClusterSpec, most: int | None, stop_asked: Callable[[], int], say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], Room]:
    """Return the living nodes and what a run may start on them, within `cluster.wait_minutes`.

    An autoscaler is asked for what lacks until it is there; from then on what the workers hold keeps their nodes.

    Args:
        most: More lanes than this have nothing to do; None where that is not known.
        stop_asked: As `Hooks.stop_asked`; a stop ends the wait with room for nothing.
        say: Called with why it waits.

    Raises:
        UsageError: there is no room; the message gives the numbers.
        KeyboardInterrupt: `stop_asked` returned 2.
    """
    deadline = time.monotonic() + 60 * cluster.wait_minutes
    waits = False
    try:
        while not (asked := stop_asked()):
            nodes = [node for node in ray.nodes() if node["Alive"]]
            resources = [node["Resources"] for node in nodes]
            try:
                return nodes, room_for(cluster, resources, compat.free_resources, most, 0 if waits else FREE_SECONDS)
            except UsageError as refusal:
                if cluster.address is None or time.monotonic() >= deadline:
                    raise  # to this machine alone nothing is added
                if not waits:
                    waits = True
                    say(f"{first_line(refusal)}; waiting for up to {cluster.wait_minutes:g} minutes")
                    request_resources(bundles=workers_for(cluster, resources))
            time.sleep(_LOOK_SECONDS)
        if asked > 1:
            raise KeyboardInterrupt
        return [], Room(0, False)
    finally:
        if waits:
            request_resources(bundles=[])


def check_nodes(needs: Needs, nodes: Sequence[Mapping[str, Any]], stop_asked: Callable[[], int]) -> None:
    """Ask nodes whether they have what a run needs; one that has died meanwhile is passed over.

    Args:
        nodes: As `ray.nodes()` names them.
        stop_asked: As `Hooks.stop_asked`.

    Raises:
        UsageError: all that is missing, by node and path.
        KeyboardInterrupt: `stop_asked` returned 2.
    """
    ask = ray.remote(num_cpus=0, max_retries=0)(lacks)
    answers = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(needs)
        for node in nodes
    ]
    deadline = time.monotonic() + ANSWER_SECONDS
    while ray.wait(answers, num_returns=len(answers), timeout=_POLL_SECONDS)[1] and time.monotonic() < deadline:
        if stop_asked() > 1:
            raise KeyboardInterrupt
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    found = [(node, _answer(answer)) for node, answer in zip(nodes, answers, strict=True) if node["NodeID"] in alive]
    lines = [f"    {name_of(node)}: {text}" for node, texts in found for text in texts]
    if lines:
        number = sum(bool(texts) for _, texts in found)
        raise UsageError(
            f"cluster: {number} of {len(found)} nodes cannot do what this run asks of them; nothing was started\n"
            + "\n".join(lines)
            + "\n    hint: every node needs the program, its packages, plug-ins, models and data as the driver has "
            "them, at the same paths, and the one storage"
        )


def name_of(node: Mapping[str, Any]) -> str:
    """Return a node's name and address, for messages."""
    name, address = node["NodeManagerHostname"], node["NodeManagerAddress"]
    return f"node {address}" if name == address else f"node {name} ({address})"


def _answer(answer: Any) -> list[str]:
    try:
        found: list[str] = ray.get(answer, timeout=0)
        return found
    except ray.exceptions.GetTimeoutError:
        return [f"it has not answered for {ANSWER_SECONDS:g} seconds"]
    except ray.exceptions.RayError as error:
        # A program that is not there, or an older one, cannot even read the question.
        return [f"the program does not run there: {one_line(error, -1)}"]

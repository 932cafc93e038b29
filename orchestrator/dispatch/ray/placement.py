"""Whether lanes fit on the cluster's nodes, and how many: refused with the numbers instead of waiting for ever."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.errors import UsageError
from orchestrator.spec.infrastructure import ClusterSpec

# What another run has just freed takes Ray a moment to count as free.
FREE_SECONDS = 5.0
_POLL_SECONDS = 0.2
_GRAIN = 1e-6  # resources are counted in ten-thousandths

Nodes = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Room:
    """What a run may start.

    Attributes:
        lanes: Number of lanes.
        use_gpu: Whether workers use GPUs.
    """

    lanes: int
    use_gpu: bool


def room_for(
    cluster: ClusterSpec,
    nodes: Nodes,
    free: Callable[[], Nodes],
    most: int | None = None,
    patience_seconds: float = FREE_SECONDS,
) -> Room:
    """Return how many lanes to start.

    Args:
        nodes: Resources of each living node.
        free: What of them nobody holds now.
        most: More lanes than this have nothing to do; None where that is not known.

    Raises:
        UsageError: the lanes asked for (one for `auto`) do not fit; the message gives the numbers.
    """
    wanted, use_gpu = _worker(cluster, nodes)
    workers, least = cluster.least_workers, _least_lanes(cluster)
    if _count(nodes, wanted) < least * workers:
        raise UsageError(_refusal(cluster, workers, least, wanted, nodes, "has"))
    deadline = time.monotonic() + patience_seconds
    now = free()
    while _count(now, wanted) < least * workers:
        if time.monotonic() > deadline:
            raise UsageError(_refusal(cluster, workers, least, wanted, now, "has free now"))
        time.sleep(_POLL_SECONDS)
        now = free()
    lanes = lanes_on(cluster, now)
    return Room(lanes if most is None else max(1, min(lanes, most)), use_gpu)


def lanes_on(cluster: ClusterSpec, nodes: Nodes) -> int:
    """Return how many lanes are wanted: as many as `cluster` says, of `auto` those that fit, at least one."""
    if cluster.lanes != "auto":
        return cluster.lanes
    return max(1, _count(nodes, _worker(cluster, nodes)[0]) // cluster.most_workers)


def workers_for(cluster: ClusterSpec, nodes: Nodes) -> list[dict[str, float]]:
    """Return what each worker holds of the lanes without which nothing starts."""
    return [_worker(cluster, nodes)[0]] * (_least_lanes(cluster) * cluster.least_workers)


def _least_lanes(cluster: ClusterSpec) -> int:
    return 1 if cluster.lanes == "auto" else cluster.lanes


def may_hold(cluster: ClusterSpec, nodes: Nodes) -> list[bool]:
    """Return of each node whether a worker fits on it at all."""
    wanted, _ = _worker(cluster, nodes)
    return [_on_node(node, wanted) > 0 for node in nodes]


def _worker(cluster: ClusterSpec, nodes: Nodes) -> tuple[dict[str, float], bool]:
    """Return what one worker holds, and whether that is a GPU."""
    wanted = {name: float(amount) for name, amount in cluster.resources_per_worker.items() if amount > 0}
    has_gpu = any(node.get("GPU", 0) > 0 for node in nodes)
    use_gpu = has_gpu if cluster.use_gpu == "auto" else cluster.use_gpu
    if use_gpu or wanted.get("GPU", 0) > 0:
        use_gpu = True
        wanted.setdefault("GPU", 1.0)
    return wanted, bool(use_gpu)


def _count(nodes: Nodes, wanted: Mapping[str, float]) -> int:
    """Return how many workers fit, each of them on one node."""
    return sum(_on_node(node, wanted) for node in nodes)


def _on_node(node: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    if not wanted:
        return 1_000_000
    return min(math.floor(node.get(name, 0.0) / amount + _GRAIN) for name, amount in wanted.items())


def _refusal(
    cluster: ClusterSpec, workers: int, lanes: int, wanted: Mapping[str, float], nodes: Nodes, has: str
) -> str:
    number = workers * lanes
    where = "this machine" if cluster.address is None else f"the cluster at {cluster.address}"
    what = "one lane does" if lanes == 1 else f"{lanes} lanes do"
    sums = {name: sum(node.get(name, 0.0) for node in nodes) for name in wanted}
    needs = "; ".join(
        f"{number} x {amount:g} {name} = {number * amount:g} {name}, it {has} {sums[name]:g}"
        for name, amount in wanted.items()
        if number * amount > sums[name] + _GRAIN
    )
    if not needs:
        one = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
        rooms = ", ".join(str(_on_node(node, wanted)) for node in nodes)
        needs = f"{number} workers of {one}, each on one node; its nodes have room for {rooms}"
    advice = "lower cluster.lanes, cluster.num_workers or cluster.resources_per_worker"
    if cluster.address is not None:
        advice += ", or raise cluster.wait_minutes where nodes are added as they are asked for"
    if has != "has":
        advice += ", or wait until others are done (cluster.wait_minutes)"
    return f"cluster: {what} not fit on {where}: it needs {needs}\n    hint: {advice}"

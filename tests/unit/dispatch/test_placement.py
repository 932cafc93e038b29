"""Lanes on nodes: how many fit, and the numbers where they do not."""

from __future__ import annotations

import pytest

from orchestrator.dispatch.ray.placement import Room, room_for
from orchestrator.errors import UsageError
from orchestrator.spec.infrastructure import ClusterSpec

TWO_NODES = [{"CPU": 4.0}, {"CPU": 3.0}]


def room(nodes, most=None, free=None, **cluster) -> Room:
    free = nodes if free is None else free
    return room_for(ClusterSpec.model_validate(cluster), nodes, lambda: free, most, patience_seconds=0.0)


def test_auto_takes_as_many_lanes_as_whole_workers_fit_and_no_more_than_there_is_work() -> None:
    workers = {"num_workers": 1, "resources_per_worker": {"CPU": 2}, "lanes": "auto"}
    assert room(TWO_NODES, **workers).lanes == 3
    assert room(TWO_NODES, most=2, **workers).lanes == 2
    assert room(TWO_NODES, free=[{"CPU": 4.0}, {"CPU": 1.0}], **workers).lanes == 2
    assert room([{"CPU": 2.0}], num_workers=2, resources_per_worker={"CPU": 0.5}, lanes="auto").lanes == 2


def test_a_number_of_lanes_is_kept_to_unless_there_is_less_to_do() -> None:
    assert room(TWO_NODES, lanes=2).lanes == 2
    assert room(TWO_NODES, lanes=7, most=3).lanes == 3
    with pytest.raises(UsageError, match=r"100 lanes do not fit on this machine: .*100 x 1 CPU = 100 CPU, it has 7"):
        room(TWO_NODES, lanes=100, most=3)


def test_lanes_that_may_have_fewer_workers_start_with_those_and_auto_leaves_room_for_all() -> None:
    workers = {"num_workers": {"min": 2, "max": 4}}
    assert room(TWO_NODES, lanes=3, **workers).lanes == 3
    assert room(TWO_NODES, lanes="auto", **workers).lanes == 1
    assert room([{"CPU": 3.0}], lanes="auto", **workers).lanes == 1
    with pytest.raises(UsageError, match="4 lanes do not fit"):
        room(TWO_NODES, lanes=4, **workers)


def test_a_worker_stands_on_one_node() -> None:
    with pytest.raises(UsageError, match=r"1 workers of 5 CPU, each on one node; its nodes have room for 0, 0"):
        room(TWO_NODES, resources_per_worker={"CPU": 5})


def test_what_others_hold_is_told() -> None:
    with pytest.raises(UsageError, match=r"(?s)2 x 1 CPU = 2 CPU, it has free now 1.*wait until others are done"):
        room(TWO_NODES, free=[{"CPU": 1.0}, {}], num_workers=2)


def test_what_is_just_being_freed_is_waited_for() -> None:
    answers = [[{}], [{"CPU": 4.0}]]
    spec = ClusterSpec(num_workers=2)
    assert room_for(spec, [{"CPU": 4.0}], lambda: answers.pop(0), patience_seconds=60.0).lanes == 1


def test_gpus() -> None:
    assert room([{"CPU": 8.0, "GPU": 1.0}]) == Room(1, True)
    assert room([{"CPU": 8.0}]) == Room(1, False)
    assert room([{"CPU": 8.0, "GPU": 4.0}], lanes="auto", num_workers=2) == Room(2, True)
    assert room([{"CPU": 8.0, "GPU": 1.0}], use_gpu=False) == Room(1, False)
    with pytest.raises(UsageError, match="1 x 1 GPU = 1 GPU, it has 0"):
        room([{"CPU": 8.0}], use_gpu=True)

"""Amounts as the mean over decoder layers, solved for what a method can take; controls at every variant's budget."""

from __future__ import annotations

from fractions import Fraction

import pytest
from orchestrator_plugins.compressors.average_pool import AveragePoolSpec
from orchestrator_plugins.compressors.q_former import QFormerSpec
from orchestrator_plugins.compressors.registers import RegistersSpec

from orchestrator.spec.budgets import layer_average, solve_layer_average, tokens_by_layer
from orchestrator.spec.components import BlockCompressorSpec, Grid

GRID = Grid(24, 24)


class Blocks(BlockCompressorSpec):
    """A method that keeps rows and columns."""


def pool(**fields):
    return AveragePoolSpec(kind="average_pool", **fields)


def test_each_point_acts_on_what_the_one_before_left():
    points = [pool(layer=2, stride=4), pool(layer="projector", keep_tokens=400), pool(layer=3, stride=10)]
    assert tokens_by_layer(points, 4, GRID) == [400, 400, 100, 10]
    assert layer_average(points, 4, GRID) == Fraction(910, 4)
    with pytest.raises(ValueError, match="beyond the model's 4 layers"):
        tokens_by_layer([pool(layer=4, stride=2)], 4, GRID)


@pytest.mark.parametrize(
    ("layer", "average"), [(0, 192), (2, 128), (2, 64), (16, 320), ("projector", 64), ("50%", 400)]
)
def test_the_mean_over_layers_is_met(layer, average):
    solved = solve_layer_average(pool(layer=layer, layer_average_tokens=average), 32, GRID)
    assert abs(layer_average([solved], 32, GRID) - average) <= Fraction(1, 2)
    assert solved.stride is None and solved.layer_average_tokens is None


def test_what_cannot_be_reached_is_reported_with_the_range():
    with pytest.raises(ValueError, match=r"between 36\.9 and 576"):
        solve_layer_average(pool(layer=2, layer_average_tokens=30), 32, GRID)


def test_a_method_of_blocks_takes_the_nearest_and_more_than_two_percent_off_is_reported():
    spec = Blocks(kind="blocks", layer=0, layer_average_tokens=145)
    assert solve_layer_average(spec, 32, GRID).keep_tokens == 144
    coarse = Blocks(kind="blocks", layer=0, layer_average_tokens=47)
    with pytest.raises(
        ValueError, match=r"within 2 % of layer_average_tokens 47: the nearest is \d+\.0, with keep_tokens"
    ):
        solve_layer_average(coarse, 32, Grid(7, 7))


def test_a_method_that_adds_tokens_on_the_way_is_solved_with_them():
    spec = RegistersSpec(kind="registers", layer=2, layer_average_tokens=40)
    solved = solve_layer_average(spec, 4, Grid(8, 8))
    assert solved.keep_tokens == 8  # (2 * (64 + 8) + 2 * 8) / 4
    assert tokens_by_layer([solved], 4, Grid(8, 8)) == [72, 72, 8, 8]


def test_the_mean_of_a_resampler_is_solved_within_its_queries():
    spec = QFormerSpec(kind="q_former", layer=2, layer_average_tokens=36, max_queries=16)
    assert solve_layer_average(spec, 4, Grid(8, 8)).keep_tokens == 8

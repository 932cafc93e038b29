"""Control arms stand beside every cell that compresses, at its budget, and are marked."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from orchestrator import registry
from orchestrator.errors import SpecError
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.spec.budgets import tokens_by_layer
from orchestrator.spec.components import Grid
from orchestrator.spec.controls import control_points
from orchestrator.spec.loader import load_experiment

GRID_OF_TINY = Grid(8, 8)
AXIS = "matrix: {phases.finetune.schedule: [full, heavy, two]}\n"


def load(write, small, text):
    return load_experiment(write(small + AXIS + text))


def test_every_cell_that_compresses_gets_each_control_once(small, write):
    loaded = load(write, small, "controls: [random_drop, stride, average_pool]\n")
    names = [cell.name for cell in loaded.cells]
    controls = [f"schedule={base},control={kind}" for base in ("heavy", "two") for kind in ("random_drop", "stride")]
    # average_pool is what these cells do already: it is no control of theirs.
    assert sorted(names) == sorted(["schedule=full", "schedule=heavy", "schedule=two", *controls])
    marked = {cell.name: cell.axes.get("control") for cell in loaded.cells}
    assert marked["schedule=two,control=stride"] == "stride" and marked["schedule=two"] is None


def test_a_control_has_the_budget_of_its_variant_layer_by_layer(small, write):
    loaded = load(write, small, "controls: [random_drop, stride]\n")
    for cell in loaded.cells:
        for name, written in loaded.spec.compressors.items():
            points = cell.spec.compressors[name]
            assert tokens_by_layer(points, 4, GRID_OF_TINY) == tokens_by_layer(written, 4, GRID_OF_TINY)


def test_controls_are_cells_of_their_own_and_share_what_is_equal(small, write):
    small = small.replace(
        "stages: [{share: 1/2, compressor: heavy}, {}]", "stages: [{share: 1/2}, {compressor: heavy}]"
    )
    cells = {cell.name: cell for cell in expand_cells(load(write, small, "controls: [random_drop]\n"))}
    two, control = cells["schedule=two"], cells["schedule=two,control=random_drop"]
    assert two.id != control.id
    half = two.phases[0].total_steps // 2
    assert two.phases[0].state_at(half) == control.phases[0].state_at(half)


def test_a_control_of_a_point_in_the_tower_acts_there_or_at_the_next_place_it_can(small, write):
    small = small.replace("kind: average_pool, layer: 2", "kind: tome, layer: tower:1").replace(
        "stride: 8", "stride: 4"
    )
    path = write(small + "controls: [stride, divprune, fastv]\n")
    config = path.parent / "tiny" / "config.json"
    values = json.loads(config.read_text())
    values["vision_config"]["num_hidden_layers"] = 4
    config.write_text(json.dumps(values))
    with pytest.raises(SpecError, match="fastv cannot be the control of heavy"):
        load_experiment(path)
    path.write_text(path.read_text().replace(", fastv]", "]"))
    layers = {
        cell.name.partition("control=")[2]: cell.spec.compressors["heavy"][0].layer
        for cell in load_experiment(path).cells
    }
    assert layers == {"": "tower:1", "stride": "tower:1", "divprune": "projector"}


def test_what_acts_before_the_decoder_only_meets_the_mean_over_layers(small, write):
    small = small.replace("stride: 8", "stride: 4")
    loaded = load(write, small, "controls: [downsample]\n")
    arm = next(cell for cell in loaded.cells if cell.name == "schedule=heavy,control=downsample")
    (point,) = arm.spec.compressors["heavy"]
    wanted = Fraction(2 * 64 + 2 * 16, 4)
    assert (point.layer, point.layer_average_tokens) == ("projector", wanted)
    (action,) = next(cell for cell in expand_cells(loaded) if cell.name == arm.name).phases[0].table
    assert action.points[0]["keep_tokens"] == wanted


@pytest.mark.parametrize(
    ("kind", "message"),
    [("random_dorp", "there is no method `random_dorp`"), ("fastv", "cannot be the control of heavy")],
)
def test_a_control_that_cannot_be_is_reported_where_it_is_written(kind, message, small, write):
    small = small.replace("kind: average_pool, layer: 2", "kind: average_pool, layer: 0")
    with pytest.raises(SpecError, match=message) as error:
        load(write, small, f"controls: [{kind}]\n")
    assert {each.path for each in error.value.errors} == {"controls.0"}


@pytest.mark.parametrize("own", [{"kind": "evs", "pruning_rate": 0.5}, {"kind": "frame_pool", "frames": 1}])
def test_what_only_the_method_itself_can_be_told_to_leave_has_no_control(own):
    """The control of such a method was the method itself."""
    point = registry.spec_class(registry.COMPRESSORS, own["kind"]).model_validate({**own, "layer": 0})
    for kind in ("stride", "downsample"):
        with pytest.raises(ValueError, match=f"fields of {own['kind']} alone say how many tokens it leaves"):
            control_points(kind, (point,), None)


@pytest.mark.parametrize("place", ["late_injection, layer: 1", "early_exit, layer: 3"])
def test_what_is_no_budget_is_in_the_control_too(place, small, write):
    """Or its cost would be another."""
    heavy, kind = "{kind: average_pool, layer: 2, stride: 8}", place.split(",")[0]
    wanted = ["random_drop", kind] if kind == "early_exit" else [kind, "random_drop"]
    points = [heavy, f"{{kind: {place}}}"] if kind == "early_exit" else [f"{{kind: {place}}}", heavy]
    loaded = load(write, small.replace(heavy, f"[{', '.join(points)}]"), "controls: [random_drop]\n")
    arm = next(cell for cell in loaded.cells if cell.name == "schedule=heavy,control=random_drop")
    assert [point.kind for point in arm.spec.compressors["heavy"]] == wanted


def test_a_control_is_named_once(small, write):
    with pytest.raises(SpecError, match="`stride` is named twice") as error:
        load(write, small, "controls: [stride, stride]\n")
    assert [each.path for each in error.value.errors] == ["controls.1"]


def test_a_ramp_has_no_control_at_another_place(small, write):
    small = small.replace("stride: 8", "stride: 4")
    ramp = "schedule: {kind: ramp, compressor: heavy, key: %s, start: 2, end: 3}"
    for key in ("layer", "stride"):
        text = small.replace("schedule: two", ramp % key)
        with pytest.raises(SpecError, match="a schedule moves heavy step by step") as error:
            load_experiment(write(text + "controls: [random_drop, downsample]\n"))
        assert [each.path for each in error.value.errors] == ["controls.1"]
        assert len(load_experiment(write(text + "controls: [random_drop]\n")).cells) == 2

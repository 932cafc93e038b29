"""Policies that mix variants step by step: one stage run each, shared where equal, with a state after every step."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import UsageError
from orchestrator.plan.cell_costs import Costs
from orchestrator.plan.cells.compiled_schedule import CHAINED, next_state
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.plan.cost import Sample, forward_tflops, train_tflops_per_sample, visual_layer_tokens
from orchestrator.plan.documents import plan_document
from orchestrator.plan.identity import digest
from orchestrator.plan.jobs import StageJob, job_from_json, job_to_json
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.tree import StageTree, build_stage_tree

INTERLEAVED = {"kind": "interleaved", "compressor": "heavy", "full_share": "1/10"}
TAUGHT = INTERLEAVED | {"distill": {"weight": 0.5, "temperature": 2.0}}
SCALE = {"kind": "random_scale", "compressors": ["heavy", "wide", "full"]}
SANDWICH = {"kind": "sandwich", "heaviest": "heavy", "compressors": ["wide", "light"], "temperature": 2.0}
RAMP = {"kind": "ramp", "compressor": "heavy", "key": "keep_ratio", "start": 1, "end": "1/4", "moves": 5}


def cells_of(lab: Any, *schedules: Any, steps: int = 100, **changes: Any) -> tuple[Any, ...]:
    """A cell for each schedule, without pretraining."""
    changes = {"phases__pretrain": ..., "phases__finetune__max_steps": steps, **changes}
    trees = [lab.tree(**changes, phases__finetune__schedule=schedule) for schedule in schedules]
    return expand_cells(lab.loaded(*trees))


def runs(tree: StageTree) -> list[tuple[int, int]]:
    return [(job.first_step, job.last_step) for job in tree.stage_runs.values()]


@pytest.mark.parametrize("policy", [INTERLEAVED, TAUGHT, SCALE, RAMP, SANDWICH])
def test_a_policy_is_one_stage_run_with_all_its_actions(lab: Any, policy: dict[str, Any]) -> None:
    (cell,) = cells_of(lab, policy, steps=5000)
    tree = build_stage_tree((cell,))
    assert runs(tree) == [(0, 5000)]
    (job,) = tree.stage_runs.values()
    assert isinstance(job, StageJob) and job.id == cell.state and job.table == cell.phases[0].table
    assert job_from_json(json.loads(json.dumps(job_to_json(job)))) == job
    if policy is not RAMP:
        assert len(job.table) > 900
    for step in (0, 1, 2500, 4999):
        action = job.action_at(step)
        assert action.first_step <= step < action.last_step


def test_equal_policies_share_their_stage_run_whatever_their_names(lab: Any) -> None:
    renamed = lab.base["compressors"] | {"squeezed": lab.base["compressors"]["heavy"]}
    other = TAUGHT | {"compressor": "squeezed"}
    cells = cells_of(lab, TAUGHT, other, INTERLEAVED, SCALE, compressors=renamed)
    tree = build_stage_tree(cells)
    assert cells[0].id == cells[1].id
    assert len({cell.id for cell in cells}) == 3 == len(tree.stage_runs)
    # Adam knows no difference between 0.5 and 0.7, a state does.
    weights = [INTERLEAVED | {"distill": {"weight": weight}} for weight in (0.5, 0.7)]
    temperatures = [INTERLEAVED | {"distill": {"temperature": value}} for value in (1.0, 2.0)]
    light = INTERLEAVED | {"distill": {"teacher": "light"}}
    assert len({cell.id for cell in cells_of(lab, INTERLEAVED, light, *weights, *temperatures)}) == 5


def test_what_a_variant_learns_from_is_what_no_other_name_of_it_does(lab: Any) -> None:
    """A teacher of the same points as the student teaches nothing."""
    renamed = lab.base["compressors"] | {"same": lab.base["compressors"]["heavy"]}
    itself = INTERLEAVED | {"distill": {"teacher": "same"}}
    (cell,) = cells_of(lab, itself, compressors=renamed)
    by_name = {action.variant: action.distill for action in cell.phases[0].table}
    assert by_name["heavy"] is None
    assert by_name["full"] is not None and by_name["full"].points == cell.phases[0].table[0].points


def test_tables_hold_teachers_and_derived_points(lab: Any) -> None:
    taught, ramp = cells_of(lab, TAUGHT, RAMP)
    first, second = taught.phases[0].table[:2]
    assert first.distill is not None and second.distill is None
    assert (first.distill.teacher, first.distill.points, first.distill.weight) == ("full", (), 0.5)
    assert first.all_points == first.points and (first.variant, second.variant) == ("heavy", "full")
    ratios = [action.points[0]["keep_ratio"] for action in ramp.phases[0].table]
    assert ratios == ["1", "13/16", "5/8", "7/16", "1/4"]
    assert {action.points[0]["stride"] for action in ramp.phases[0].table} == {None}
    final = next(job for job in ramp.evaluations if job.under == "final")
    assert final.points[0]["keep_ratio"] == "1/4" and final.points == ramp.phases[0].schedule.final.points
    assert [job.points for job in taught.evaluations if job.under == "final"] == [()]


def test_ids_of_plain_stages_are_the_chain_they_always_were(lab: Any) -> None:
    (cell,) = lab.schedules(["heavy", "wide", "full"], phases__finetune__max_steps=30)
    plan, expected = cell.phases[1], []
    state = plan.lineage
    for action, points in zip(plan.table, plan.schedule.ids, strict=True):
        state = next_state(state, action.first_step, action.last_step, points)
        expected.append(state)
    assert [plan.state_at(step) for step in (10, 20, 30)] == expected and plan.end == cell.state == expected[-1]
    assert plan.schedule.ids[-1] == digest([])
    job = build_stage_tree((cell,)).stage_runs[cell.state]
    assert {tuple(action) for action in job_to_json(job)["table"]} == {("first_step", "last_step", "variant", "points")}
    assert plan.schedule.stage_ends == (10, 20, 30)


def test_a_state_depends_on_the_steps_before_it_alone(lab: Any) -> None:
    steps = 4 * CHAINED
    variants = ["heavy" if step % 2 else "wide" for step in range(steps)]

    def plan_of(names: list[str]) -> Any:
        stages = [{"steps": 1, "compressor": name} for name in names]
        (cell,) = cells_of(lab, {"kind": "stages", "stages": stages}, steps=steps)
        return cell.phases[0]

    plain = plan_of(variants)
    states = [plain.state_at(step) for step in range(1, steps + 1)]
    assert len(set(states)) == steps and states[-1] == plain.end
    for changed in (3, CHAINED - 1, CHAINED, CHAINED + 1, steps - 1):
        other = plan_of([name if step != changed else "light" for step, name in enumerate(variants)])
        found = [other.state_at(step) for step in range(1, steps + 1)]
        assert found[:changed] == states[:changed]
        assert not set(found[changed:]) & set(states)


TABLES = st.lists(
    st.tuples(st.lists(st.sampled_from(["full", "heavy", "wide"]), min_size=12, max_size=12), st.booleans()),
    min_size=1, max_size=6,
)  # fmt: skip


@given(tables=TABLES, ends=st.lists(st.integers(1, 11), max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_state_is_reached_on_two_ways(lab: Any, tables: list[tuple[list[str], bool]], ends: list[int]) -> None:
    """Stages and policies of one beginning, cut wherever: each path is its cell's own table, each state has one run."""
    schedules = [{"kind": "stages", "stages": [{"steps": 1, "compressor": n} for n in names]} for names, _ in tables]
    cells = list(cells_of(lab, *schedules, steps=12))
    for number, (_, is_policy) in enumerate(tables):
        if is_policy:
            plan = cells[number].phases[0]
            mixed = replace(plan.schedule, stage_ends=tuple(sorted({*ends, 12})), kind="mixed")
            plan = replace(plan, schedule=mixed)
            cells[number] = replace(cells[number], phases=(plan,))
    tree = build_stage_tree(cells)
    assert len(tree.order) == len(set(tree.order)) == 1 + len(tree.stage_runs)
    seen = set(tree.roots)
    for state in tree.order[1:]:
        assert tree.stage_runs[state].parent in seen
        seen.add(state)
    for cell in cells:
        path = [tree.stage_runs[state] for state in tree.path_of[cell.id]]
        assert [job.first_step for job in path] == [0, *(job.last_step for job in path[:-1])]
        assert [job.id for job in path] == [cell.phases[0].state_at(job.last_step) for job in path]
        for job, before in zip(path[1:], path[:-1], strict=True):
            assert job.parent == before.id
        plan = cell.phases[0]
        wanted = [next(a for a in plan.table if a.first_step <= s < a.last_step).points for s in range(12)]
        assert [path[-1].action_at(step).points for step in range(12)] == wanted


def test_a_policy_starts_from_a_stored_state_inside_it(lab: Any, tmp_path: Any) -> None:
    ledger = Ledger(tmp_path / "runs")
    (cell,) = cells_of(lab, RAMP)
    plan = cell.phases[0]
    stages = [{"steps": 20, "compressor": "first"}, {}]
    first = lab.base["compressors"] | {"first": {"kind": "average_pool", "layer": 2, "keep_ratio": 1}}
    (other,) = cells_of(lab, {"kind": "stages", "stages": stages}, compressors=first)
    assert other.phases[0].state_at(20) == plan.state_at(20)
    for job in build_stage_tree((other,)).work(ledger)[:2]:
        work = ledger.writing_folder(job.id)
        (work / "checkpoint").mkdir(parents=True)
        (work / "checkpoint" / "state.pt").write_bytes(b"state")
        (work / "weights").mkdir()
        (work / "weights" / "model.safetensors").write_bytes(b"weights")
        (work / "job.json").write_text(json.dumps(job_to_json(job)))
        (work / "result.json").write_text("{}")
        ledger.commit(job.id)
    tree = build_stage_tree((cell,), ledger)
    assert runs(tree) == [(0, 20), (20, 100)]
    (left,) = [job for job in tree.work(ledger) if isinstance(job, StageJob)]
    assert left.id == cell.state and left.parent == plan.state_at(20)


def test_a_teachers_pass_is_counted_as_one_forward(lab: Any) -> None:
    taught, plain = cells_of(lab, TAUGHT, INTERLEAVED)
    facts, recipe = taught.facts, plain.phases[0].recipe.model_dump()
    costs, sample = Costs(text_tokens=10), Sample(10, 10)
    heavy = plain.phases[0].table[0].points
    each = train_tflops_per_sample(facts, heavy, sample, recipe)
    full = train_tflops_per_sample(facts, (), sample, recipe)
    batch = recipe["global_batch_size"]
    expected = batch * (90 * each + 10 * full)
    assert costs.cell(plain)["train_tflops"] == pytest.approx(expected, rel=1e-9)
    lora = lab.cell(phases__finetune__lora={}).phases[1].recipe.lora
    assert lora is not None
    teacher = sum(forward_tflops(facts, (), sample).values())
    more = costs.cell(taught)["train_tflops"] - expected
    assert more / (batch * 90) >= teacher
    (bare,) = cells_of(lab, TAUGHT, phases__finetune__lora=None)
    (none,) = cells_of(lab, INTERLEAVED, phases__finetune__lora=None)
    more = costs.cell(bare)["train_tflops"] - costs.cell(none)["train_tflops"]
    assert more == pytest.approx(batch * 90 * teacher, rel=1e-9)
    assert costs.cell(taught)["visual_layer_tokens"] == costs.cell(plain)["visual_layer_tokens"]


def test_each_pass_of_a_sandwich_is_counted_as_training(lab: Any) -> None:
    (cell,) = cells_of(lab, SANDWICH, steps=10)
    plan, sample = cell.phases[0], Sample(10, 10)
    recipe, points = plan.recipe.model_dump(), {name: lab.base["compressors"][name] for name in ("wide", "light")}
    drawn = [action.students.variants[1] for a in plan.table for action in [a] * (a.last_step - a.first_step)]
    assert set(drawn) == set(points) and len(drawn) == 10
    each = {
        name: train_tflops_per_sample(cell.facts, [points], sample, recipe)
        for name, points in (lab.base["compressors"] | {}).items()
        if name in ("heavy", "wide", "light")
    }
    full = train_tflops_per_sample(cell.facts, (), sample, recipe)
    wanted = sum(full + each["heavy"] + each[name] for name in drawn) * recipe["global_batch_size"]
    found = Costs(text_tokens=10).cell(cell)
    assert found["train_tflops"] == pytest.approx(wanted, rel=1e-9)
    layers, grid = cell.facts.num_layers, cell.facts.image_grid
    tokens = {
        name: visual_layer_tokens(grid, [points] if points else [], layers)
        for name, points in (lab.base["compressors"] | {"full": None}).items()
        if name in ("heavy", "wide", "light", "full")
    }
    mean = sum((tokens["full"] + tokens["heavy"] + tokens[name]) / 3 for name in drawn) / 10
    assert found["visual_layer_tokens"] == pytest.approx(mean, rel=1e-9)


def test_an_annealed_stage_is_one_stage_run(lab: Any) -> None:
    anneal = {"key": "keep_ratio", "start": 1, "end": "1/4", "moves": 5}
    first = {"share": "1/2", "compressor": "heavy", "anneal": anneal}
    schedules = [{"kind": "stages", "stages": [first, {"compressor": last}]} for last in ("heavy", "full")]
    cell, other = cells_of(lab, *schedules)
    assert runs(build_stage_tree((cell,))) == [(0, 50), (50, 100)]
    assert sorted(runs(build_stage_tree((cell, other)))) == [(0, 50), (50, 100), (50, 100)]
    ratios = [action.points[0]["keep_ratio"] for action in cell.phases[0].table]
    assert ratios == ["1", "13/16", "5/8", "7/16", "1/4", None]


def test_students_are_part_of_what_a_sandwich_is(lab: Any) -> None:
    others = [
        {"temperature": 1.0},
        {"weight": 0.5},
        {"seed": 1},
        {"heaviest": "light", "compressors": ["wide", "heavy"]},
    ]
    cells = cells_of(lab, SANDWICH, "full", *(SANDWICH | other for other in others))
    assert len({cell.id for cell in cells}) == 6
    action = cells[0].phases[0].table[0]
    assert action.points == () and len(action.students.points) == 2 and action.students.temperature == 2.0
    assert action.all_points == tuple(point for points in action.students.points for point in points)
    assert [job.points for job in cells[0].evaluations if job.under == "final"] == [()]
    renamed = lab.base["compressors"] | {"squeezed": lab.base["compressors"]["heavy"]}
    (same,) = cells_of(lab, SANDWICH | {"heaviest": "squeezed"}, compressors=renamed)
    assert same.id == cells[0].id


@pytest.mark.timeout(60)
def test_a_policy_is_as_long_as_its_budget(lab: Any) -> None:
    (known,) = cells_of(lab, TAUGHT, steps=5000)
    budget = Costs().cell(known)["train_tflops"]
    (cell,) = cells_of(lab, TAUGHT, phases__finetune__max_steps=..., phases__finetune__max_train_tflops=budget)
    assert abs(cell.phases[0].total_steps - 5000) <= 2
    matched = TAUGHT | {"full_share": "1/2"}
    changes = {"phases__finetune__max_train_tflops": budget}
    (other,) = cells_of(lab, matched, phases__finetune__max_steps=..., **changes)
    assert other.phases[0].total_steps != cell.phases[0].total_steps
    assert Costs().cell(other)["train_tflops"] == pytest.approx(budget, rel=1e-3)


def test_the_document_lists_a_policys_actions_under_its_kind(lab: Any, tmp_path: Any) -> None:
    trees = [lab.tree(phases__pretrain=..., phases__finetune__schedule=each) for each in (INTERLEAVED, "heavy", "two")]
    loaded = lab.loaded(*trees)
    cells = expand_cells(loaded)
    document = plan_document(loaded, cells, build_stage_tree(cells), Ledger(tmp_path / "runs"), text_tokens=10)
    mixed = next(run for run in document["stage_runs"] if run["variant"] == "interleaved")
    assert mixed["actions"] == [
        [0, 5, "heavy"], [5, 6, "full"], [6, 15, "heavy"], [15, 16, "full"], [16, 20, "heavy"],
    ]  # fmt: skip
    assert sorted(run["variant"] for run in document["stage_runs"]) == ["full", "heavy", "heavy", "interleaved"]
    assert document["cells"][0]["phases"][0]["schedule"] == mixed["actions"]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (INTERLEAVED | {"full_share": "1/1000"}, "leaves no step of 100 for full"),
        (RAMP | {"compressor": "nobody"}, "no variant is called 'nobody'"),
        (RAMP | {"key": "stride", "start": 1, "end": 8, "moves": 3, "compressor": "two"}, "this one has 2"),
        (INTERLEAVED | {"distill": {"teacher": "nobody"}}, "no variant is called 'nobody'"),
    ],
)
def test_what_does_not_fit_is_a_fault_of_the_phase(lab: Any, policy: dict[str, Any], message: str) -> None:
    two = [{"kind": "average_pool", "layer": layer, "stride": 2} for layer in (0, 2)]
    with pytest.raises(UsageError) as caught:
        cells_of(lab, policy, compressors=lab.base["compressors"] | {"two": two}, schedules={})
    assert message in str(caught.value)


def test_thousands_of_policies(lab: Any, tmp_path: Any) -> None:
    """Interleaved steps of 5,000: 1,001 actions in each of 10,000 cells, each of a lineage of its own."""
    loaded = lab.loaded(lab.tree(phases__pretrain=..., evaluate={}))
    base = loaded.cells[0].spec
    phases = []
    for policy in (TAUGHT, SCALE):
        values = {**lab.base["phases"]["finetune"], "schedule": policy, "max_steps": 5000}
        finetune = type(base.phases.finetune).model_validate(values)
        phases.append(base.phases.model_copy(update={"finetune": finetune}))
    named = [
        type(loaded.cells[0])(f"c{seed}-{n}", {}, base.model_copy(update={"phases": each, "seed": seed}))
        for seed, (n, each) in itertools.product(range(5000), enumerate(phases))
    ]
    cells = expand_cells(type(loaded)(tuple(named)))
    work = build_stage_tree(cells).work(Ledger(tmp_path / "runs"))
    assert len({cell.id for cell in cells}) == 10_000
    assert sum(isinstance(job, StageJob) for job in work) == 10_000

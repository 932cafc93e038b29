"""The stage tree: what is shared, where it is cut, in which order, and what is left to do."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.plan.cells.compiled_schedule import next_state
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.plan.jobs import EvaluationJob, Job, RootJob, StageJob, job_from_json, job_to_json
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.tree import StageTree, build_stage_tree

VARIANTS = ("full", "heavy", "wide", "light")


def finish(ledger: Ledger, job: Job, keep: str | None = None) -> None:
    """Puts what a worker would into the ledger."""
    if isinstance(job, EvaluationJob):
        ledger.write_evaluation(job.id, {"id": job.id, "metrics": {"accuracy": 0.5}})
        return
    work = ledger.writing_folder(job.id)
    (work / "job.json").write_text(json.dumps(job_to_json(job)))
    kept = "weights" if isinstance(job, RootJob) else keep or job.keep
    if kept != "none":
        (work / "weights").mkdir()
        (work / "weights" / "model.safetensors").write_bytes(b"weights of " + job.id.encode())
    if kept == "full":
        (work / "checkpoint").mkdir()
        (work / "checkpoint" / "state.pt").write_bytes(b"optimizer of " + job.id.encode())
    if isinstance(job, StageJob):
        (work / "result.json").write_text(json.dumps({"id": job.id, "steps": job.last_step - job.first_step}))
    ledger.commit(job.id)


def stages(tree: StageTree) -> list[tuple[str, int, int, str]]:
    return [(j.phase, j.first_step, j.last_step, j.table[-1].variant) for j in tree.stage_runs.values()]


def test_27_schedules_of_three_stages_are_39_stage_runs(lab: Any) -> None:
    combos = list(itertools.product(("heavy", "wide", "light"), repeat=3))
    cells = lab.schedules(*combos, phases__pretrain=..., phases__finetune__max_steps=30)
    tree = build_stage_tree(cells)
    assert len(tree.stage_runs) == 39
    assert sum(len(combo) for combo in combos) == 81
    steps = sum(job.last_step - job.first_step for job in tree.stage_runs.values())
    assert steps / (27 * 30) == pytest.approx(39 * 10 / 810)


def test_the_papers_seven_schemes_cost_less_than_5_84_of_7_epochs(lab: Any) -> None:
    variants = {
        f"k{k}_s{s}": {"kind": "average_pool", "layer": k, "stride": s}
        for k, s in ((1, 8), (1, 2), (2, 8), (2, 2), (1, 16), (2, 16), (2, 4))
    }
    schemes = [
        "full", ["k1_s8", "full"], ["k1_s8", "k2_s8", "full"], ["k1_s8", "k1_s2", "full"],
        ["k1_s8", "k1_s2", "k2_s2", "full"], ["k1_s8", "k2_s8", "k2_s2", "full"], ["k1_s16", "k2_s16", "k2_s4"],
    ]  # fmt: skip
    cells = lab.schedules(*schemes, phases__pretrain=..., phases__finetune__max_steps=5196,
                          compressors=variants, evaluate={})  # fmt: skip
    tree = build_stage_tree(cells)
    steps = sum(job.last_step - job.first_step for job in tree.stage_runs.values())
    assert steps / 5196 == pytest.approx(5.84, abs=0.01)


def test_a_stage_is_cut_where_another_cell_leaves_it(lab: Any) -> None:
    tree = build_stage_tree(lab.schedules(["heavy", "full"], ["heavy", "wide", "light", "full"]))
    assert stages(tree) == [
        ("pretrain", 0, 10, "full"),
        ("finetune", 0, 5, "heavy"),
        ("finetune", 5, 10, "heavy"),
        ("finetune", 10, 20, "full"),
        ("finetune", 5, 10, "wide"),
        ("finetune", 10, 15, "light"),
        ("finetune", 15, 20, "full"),
    ]
    pretrain, heavy = list(tree.stage_runs.values())[:2]
    assert len(tree.cells_of[pretrain.id]) == len(tree.cells_of[heavy.id]) == 2
    assert pretrain.parent in tree.roots and heavy.parent == pretrain.id
    assert pretrain.starts_phase and heavy.starts_phase
    assert (pretrain.keep, heavy.keep) == ("weights", "full")
    leaves = [job for job in tree.stage_runs.values() if job.last_step == job.total_steps]
    assert {job.keep for job in leaves} == {"weights"}


def test_a_table_ends_where_its_stage_run_does_and_travels_as_json(lab: Any) -> None:
    tree = build_stage_tree(lab.schedules(["heavy", "full"], ["heavy", "wide", "light", "full"]))
    for job in tree.stage_runs.values():
        assert job.table[0].first_step == 0 and job.table[-1].last_step == job.last_step
        assert job_from_json(json.loads(json.dumps(job_to_json(job)))) == job


SCHEDULES = st.lists(st.lists(st.sampled_from(VARIANTS), min_size=1, max_size=5), min_size=1, max_size=6)


@given(schedules=SCHEDULES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_path_is_its_cells_own_table(lab: Any, schedules: list[list[str]]) -> None:
    cells = lab.schedules(*schedules, phases__finetune__max_steps=60)
    tree = build_stage_tree(cells)
    seen: set[str] = set()
    for state, job in zip(tree.order[1:], tree.stage_runs.values(), strict=True):
        assert state == job.id and (job.parent in seen or job.parent in tree.roots)  # parents come first
        seen.add(state)
    for cell in cells:
        pretrain, *path = [tree.stage_runs[state] for state in tree.path_of[cell.id]]
        assert pretrain.phase == "pretrain"
        assert [job.first_step for job in path] == [0, *(job.last_step for job in path[:-1])]
        assert path[-1].id == cell.state and path[-1].last_step == 60
        wanted = [next(a for a in cell.phases[1].table if a.first_step <= s < a.last_step).points for s in range(60)]
        assert [path[-1].action_at(step).points for step in range(60)] == wanted
        for job in path:
            assert cell.id in tree.cells_of[job.id]
            assert job.id == cell.phases[1].state_at(job.last_step)


@given(schedules=SCHEDULES, more=st.lists(st.sampled_from(VARIANTS), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_further_cell_changes_no_id(lab: Any, schedules: list[list[str]], more: list[str]) -> None:
    before = build_stage_tree(lab.schedules(*schedules, phases__finetune__max_steps=60))
    after = build_stage_tree(lab.schedules(*schedules, more, phases__finetune__max_steps=60))
    assert before.stage_runs.keys() <= after.stage_runs.keys()
    assert before.state_of.items() <= after.state_of.items()


def test_a_state_does_not_know_what_comes_after_it(lab: Any) -> None:
    one, two = lab.schedules(["heavy", "full"], ["heavy", "wide"])
    assert one.phases[1].state_at(10) == two.phases[1].state_at(10)
    assert one.phases[1].state_at(11) != two.phases[1].state_at(11)
    longer = lab.schedules(["heavy", "full"], phases__finetune__max_steps=40)[0]
    assert longer.phases[1].state_at(10) != one.phases[1].state_at(10)  # the learning rate knows the phase's length


def test_work_in_order_evaluations_right_after_their_state(lab: Any, tmp_path: Any) -> None:
    tree = build_stage_tree(lab.schedules(["heavy", "full"], ["heavy", "wide"]))
    work = tree.work(Ledger(tmp_path / "runs"))
    kinds = [type(job).__name__[0] for job in work]
    assert "".join(kinds) == "RSS" + "SEE" + "SEEE"  # final is full in the first cell: one evaluation for both
    for before, job in itertools.pairwise(work):
        if isinstance(job, EvaluationJob):
            assert job.state in (before.id, getattr(before, "state", None))


def test_what_is_done_is_no_work(lab: Any, tmp_path: Any) -> None:
    ledger = Ledger(tmp_path / "runs")
    tree = build_stage_tree(lab.schedules(["heavy", "full"], ["heavy", "wide"]))
    work = tree.work(ledger)
    for number, job in enumerate(work):
        assert [left.id for left in tree.work(ledger)] == [left.id for left in work[number:]]
        finish(ledger, job)
    assert tree.work(ledger) == []
    added = build_stage_tree(lab.schedules(["heavy", "full"], ["heavy", "wide"], ["heavy", "light"]), ledger)
    stage, *tests = added.work(ledger)
    assert isinstance(stage, StageJob) and stage.table[-1].variant == "light" and stage.first_step == 10
    assert all(isinstance(job, EvaluationJob) for job in tests)


def test_a_further_evaluation_runs_alone(lab: Any, tmp_path: Any) -> None:
    ledger = Ledger(tmp_path / "runs")
    for job in build_stage_tree((lab.cell(),)).work(ledger):
        finish(ledger, job)
    more = build_stage_tree((lab.cell(evaluate__score__under=["final", "wide"]),))
    (job,) = more.work(ledger)
    assert isinstance(job, EvaluationJob) and job.under == "wide"


def test_a_branch_off_a_leaf_without_checkpoint_trains_it_again(lab: Any, tmp_path: Any) -> None:
    ledger = Ledger(tmp_path / "runs")
    finished = lab.schedules(["heavy", "wide"], phases__pretrain=...)
    for job in build_stage_tree(finished).work(ledger):
        finish(ledger, job, keep="weights")
    tree = build_stage_tree(lab.schedules(["heavy", "wide"], ["heavy", "light"], phases__pretrain=...), ledger)
    again, new = [job for job in tree.work(ledger) if isinstance(job, StageJob)]
    assert ledger.is_done(again.id) and again.keep == "full" and again.last_step == 10
    assert new.parent == again.id
    finish(ledger, again)
    assert [job.id for job in tree.work(ledger) if isinstance(job, StageJob)] == [new.id]


def test_training_starts_from_the_furthest_stored_state(lab: Any, tmp_path: Any) -> None:
    """A checkpoint left by a schedule that is no longer in the file still serves."""
    ledger = Ledger(tmp_path / "runs")
    first = build_stage_tree(lab.schedules(["heavy", "wide", "full", "full"], phases__pretrain=...), ledger)
    for job in first.work(ledger)[:2]:
        finish(ledger, job)  # root and heavy 0-5
    cells = lab.schedules("heavy", phases__pretrain=...)
    assert stages(build_stage_tree(cells)) == [("finetune", 0, 20, "heavy")]
    tree = build_stage_tree(cells, ledger)
    (left,) = [job for job in tree.work(ledger) if isinstance(job, StageJob)]
    assert (left.first_step, left.last_step, left.starts_phase) == (5, 20, False)
    assert left.id == build_stage_tree(cells).path_of[cells[0].id][-1]


def test_failures_hold_back_what_stands_on_them_until_retried(lab: Any, tmp_path: Any) -> None:
    ledger = Ledger(tmp_path / "runs")
    tree = build_stage_tree(lab.schedules(["heavy", "full"], ["wide", "full"], phases__pretrain=...))
    heavy = next(job for job in tree.stage_runs.values() if job.table[-1].variant == "heavy")
    ledger.write_failure(heavy.id, {"error": "diverged"})
    left = {job.table[0].variant for job in tree.work(ledger) if isinstance(job, StageJob)}
    assert left == {"wide"}
    assert len(tree.work(ledger, retry_failed=True)) == len(tree.work(ledger)) + 2 + 2
    ledger.clear_failure(heavy.id)
    assert tree.work(ledger) == tree.work(ledger, retry_failed=True)


def test_cells_without_phases_evaluate_the_root(lab: Any, tmp_path: Any) -> None:
    cell = lab.cell(phases={})
    tree = build_stage_tree((cell,))
    root, *tests = tree.work(Ledger(tmp_path / "runs"))
    assert isinstance(root, RootJob) and tree.path_of[cell.id] == ()
    assert [job.state for job in tests] == [root.id, root.id]
    quiet = build_stage_tree((lab.cell(phases={}, evaluate={}),))
    assert quiet.work(Ledger(tmp_path / "runs")) == []


@pytest.mark.parametrize(
    ("leaf", "evaluate", "keep"), [("none", True, "weights"), ("none", False, "none"), ("full", True, "full")]
)
def test_keep_of_a_leaf(lab: Any, leaf: str, evaluate: bool, keep: str) -> None:
    changes: dict[str, Any] = {"cluster": {"keep": {"leaf": leaf}}}
    tree = build_stage_tree((lab.cell(**changes, **({} if evaluate else {"evaluate": {}})),))
    assert list(tree.stage_runs.values())[-1].keep == keep
    # pretrain's weights are needed by finetune, whatever is kept of a leaf
    assert next(iter(tree.stage_runs.values())).keep == ("full" if leaf == "full" else "weights")


def test_a_long_policy_does_not_need_a_deep_stack(lab: Any) -> None:
    stages_ = [{"steps": 1, "compressor": VARIANTS[1 + step % 2]} for step in range(3000)]
    schedule = {"kind": "stages", "stages": stages_}
    (cell,) = expand_cells(lab.loaded(lab.tree(phases__finetune__schedule=schedule, phases__finetune__max_steps=3000)))
    assert cell.phases[1].total_steps == 3000
    assert len(build_stage_tree((cell,)).stage_runs) == 3001


def test_thousands_of_cells_in_seconds(lab: Any, tmp_path: Any) -> None:
    loaded = lab.loaded(lab.tree())
    base = loaded.cells[0].spec
    named = []
    for number, combo in enumerate(itertools.product(VARIANTS, repeat=5)):
        stages_ = [{"share": "1/5", "compressor": name} for name in combo]
        schedule = {"kind": "stages", "stages": stages_}
        finetune = type(base.phases.finetune).model_validate(
            {**lab.base["phases"]["finetune"], "schedule": schedule, "max_steps": 1000}
        )
        phases = base.phases.model_copy(update={"finetune": finetune})
        for seed in (0, 1):
            spec = base.model_copy(update={"phases": phases, "seed": seed})
            named.append(type(loaded.cells[0])(f"c{number}-{seed}", {}, spec))
    start = time.perf_counter()
    cells = expand_cells(type(loaded)(tuple(named)))
    work = build_stage_tree(cells).work(Ledger(tmp_path / "runs"))
    seconds = time.perf_counter() - start
    assert len({cell.id for cell in cells}) == 2048
    assert len(work) > 2048
    assert seconds < 10  # about 0.6 s on one free core


def test_state_ids_are_stable() -> None:
    """Another value means that every ledger's work is done again: raise SEMANTICS_VERSION knowingly instead."""
    assert next_state("line", 0, 10, "points") == "a73c009437cf2a2e437c834f60ebbf2a9af5967bd0bd9091192d6a072d98f857"

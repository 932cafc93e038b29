"""`start_from` another experiment: faults told by validate, identity by states, one tree with what it starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import TINY_LLAVA

from orchestrator.errors import SpecError
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.plan.documents import plan_document
from orchestrator.plan.experiment_plan import prepare
from orchestrator.plan.jobs import StageJob, StartJob, job_from_json, job_to_json
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.tree import StageTree, build_stage_tree
from orchestrator.spec.loader import load_experiment

PRETRAIN = {"data": "train", "train": ["projector"], "max_steps": 10, "global_batch_size": 8, "learning_rate": 1e-3}
PRETRAIN |= {"per_device_train_batch_size": 4}
FINETUNE = {**PRETRAIN, "train": ["projector", "language_model"], "max_steps": 20}


class Files:
    """Writes experiment files into one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, phases: dict[str, Any], **rest: Any) -> Path:
        spec = {
            "schema_version": 1,
            "name": name.partition(".")[0].replace("/", "-"),
            "model": {"model_name_or_path": str(TINY_LLAVA), "weights": "random", "dtype": "float32"},
            "data": {"train": {"kind": "easy_vqa", "split": "train", "max_samples": 80}},
            "phases": phases,
            **rest,
        }
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(spec, sort_keys=False))
        return path

    def cells(self, path: Path) -> tuple[Cell, ...]:
        return expand_cells(load_experiment(path))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """An empty folder for experiments, with `first.yaml`: a pretraining under two seeds."""
    made = Files(tmp_path)
    made.write("first.yaml", {"pretrain": PRETRAIN}, matrix={"seed": [0, 1]})
    return made


def from_first(**values: Any) -> dict[str, Any]:
    return {**FINETUNE, "start_from": {"spec": "first.yaml", "cell": "seed=1", **values}}


def faults_of(path: Path) -> list[Any]:
    with pytest.raises(SpecError) as caught:
        load_experiment(path)
    return list(caught.value.errors)


def kinds(tree: StageTree) -> list[str]:
    return [type(tree.job_of(state)).__name__ for state in tree.order]


def test_a_whole_start_is_what_one_file_would_train(files: Files) -> None:
    (split,) = files.cells(files.write("second.yaml", {"finetune": from_first()}, seed=1))
    (one,) = files.cells(files.write("one.yaml", {"pretrain": PRETRAIN, "finetune": FINETUNE}, seed=1))
    assert split.state == one.state
    assert split.phases[0].start == one.phases[0].end
    assert split.id != one.id  # its cost and its record are one phase, not two
    assert not split.starts


def test_the_other_cells_stage_runs_are_part_of_the_tree(files: Files) -> None:
    path = files.write("second.yaml", {"finetune": from_first()}, matrix={"phases.finetune.max_steps": [20, 30]})
    cells = files.cells(path)
    tree = build_stage_tree(cells)
    pretrains = [job for job in tree.stage_runs.values() if job.phase == "pretrain"]
    assert len(tree.stage_runs) == 3 and len(pretrains) == 1  # once for both cells
    assert tree.cells_of[pretrains[0].id] == tuple(cell.id for cell in cells)
    for cell in cells:
        assert pretrains[0].id not in tree.path_of[cell.id]
        assert pretrains[0].id in tree.origins_of[cell.id]
        assert tree.order.index(pretrains[0].id) < tree.order.index(tree.path_of[cell.id][0])
    finetune = tree.stage_runs[tree.path_of[cells[0].id][0]]
    assert (finetune.parent, finetune.starts_phase) == (pretrains[0].id, True)


def test_parts_are_put_together_by_a_job_of_its_own(files: Files, tmp_path: Path) -> None:
    path = files.write("second.yaml", {"pretrain": PRETRAIN, "finetune": from_first(parts=["projector"])})
    (cell,) = files.cells(path)
    (start,) = cell.starts
    own, other = cell.phases[0].end, cell.sources[0].state
    assert (start.base, start.source, start.parts, start.folder) == (own, other, ("projector",), None)
    assert cell.phases[1].start == start.id != own
    tree = build_stage_tree([cell])
    order = tree.order
    assert max(order.index(own), order.index(other)) < order.index(start.id) < order.index(cell.state)
    assert tree.path_of[cell.id] == (own, cell.state)
    assert set(tree.origins_of[cell.id]) >= {start.id, other}
    work = tree.work(Ledger(tmp_path / "runs"))
    assert [type(job).__name__ for job in work] == kinds(tree)
    assert job_from_json(json.loads(json.dumps(job_to_json(start)))) == start


def test_identity_depends_on_states_and_parts_not_on_names_or_paths(files: Files) -> None:
    def start(**values: Any) -> str:
        phases = {"pretrain": PRETRAIN, "finetune": {**FINETUNE, "start_from": values}}
        return files.cells(files.write("second.yaml", phases))[0].state

    known = start(spec="first.yaml", cell="seed=1", parts=["projector", "vision_tower"])
    files.write("there/renamed.yaml", {"pretrain": PRETRAIN, "finetune": FINETUNE}, seed=1, cell_name="mine")
    name = load_experiment(files.folder / "there/renamed.yaml").cells[0].name
    assert start(spec="there/renamed.yaml", cell=name, parts=["vision_tower", "projector"]) == known
    assert start(spec="there/renamed.yaml", cell=name, parts=["projector"]) != known
    assert start(spec="first.yaml", cell="seed=0", parts=["projector", "vision_tower"]) != known
    later = start(spec="there/renamed.yaml", cell=name, phase="finetune", parts=["projector", "vision_tower"])
    assert later != known


def test_a_cell_is_found_by_the_beginning_of_its_id(files: Files) -> None:
    wanted = files.cells(files.folder / "first.yaml")[1]
    (cell,) = files.cells(files.write("second.yaml", {"finetune": from_first(cell=wanted.id[:8])}))
    assert cell.phases[0].start == wanted.state


def test_the_models_settings_count_where_they_differ(files: Files) -> None:
    model = {"model_name_or_path": str(TINY_LLAVA), "weights": "random", "dtype": "bfloat16"}
    same, other = (
        files.cells(files.write("second.yaml", {"finetune": from_first()}, **rest))[0]
        for rest in ({}, {"model": model})
    )
    assert same.phases[0].start == other.phases[0].start
    assert same.phases[0].lineage != other.phases[0].lineage


def test_a_folder_is_read_by_a_job_and_known_by_its_content(files: Files) -> None:
    def cell_of(folder: str) -> Cell:
        return files.cells(files.write("second.yaml", {"finetune": {**FINETUNE, "start_from": folder}}))[0]

    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (files.folder / name).mkdir()
        (files.folder / name / "model.safetensors").write_bytes(content)
    cell = cell_of("a")
    assert [type(job) for job in build_stage_tree([cell]).work(Ledger(files.folder / "runs"))] == [StartJob, StageJob]
    assert cell.starts[0].folder == str(files.folder / "a")
    assert cell_of("b").state == cell.state != cell_of("c").state


def test_what_is_stored_is_not_asked_for_again(files: Files, tmp_path: Path) -> None:
    (cell,) = files.cells(
        files.write("second.yaml", {"pretrain": PRETRAIN, "finetune": from_first(parts=["projector"])})
    )
    ledger, tree = Ledger(tmp_path / "runs"), build_stage_tree([cell])
    writing = ledger.writing_folder(cell.starts[0].id)
    (writing / "weights").mkdir()
    (writing / "weights" / "model.safetensors").write_bytes(b"weights")
    ledger.commit(cell.starts[0].id)
    assert [job.id for job in tree.work(ledger)] == [cell.state]


def test_a_failure_of_the_other_cell_blocks(files: Files, tmp_path: Path) -> None:
    (cell,) = files.cells(
        files.write("second.yaml", {"pretrain": PRETRAIN, "finetune": from_first(parts=["projector"])})
    )
    ledger, tree = Ledger(tmp_path / "runs"), build_stage_tree([cell])
    ledger.write_failure(cell.sources[0].state, {"error": "diverged"})
    blocked = tree.blocked(ledger, tree.needed(ledger))
    assert blocked == {cell.sources[0].state, cell.starts[0].id, cell.state}


FAULTS = {
    "cell": (from_first(cell="seed=7"), "start_from.cell", "fits no cell"),
    "phase": (from_first(phase="finetune"), "start_from", "has no phase `finetune`"),
    "file": (from_first(spec="firts.yaml"), "start_from.spec", "there is no file"),
    "two": (from_first(path="."), "start_from", "give `spec` and `cell`"),
    "alone": ({**FINETUNE, "start_from": {"spec": "first.yaml"}}, "start_from", "belong together"),
    "no parts": (from_first(parts=[]), "start_from", "at least one part"),
    "part": (from_first(parts=["projecter"]), "start_from.parts.0", "not one of the values"),
}


@pytest.mark.parametrize(("finetune", "path", "message"), FAULTS.values(), ids=FAULTS)
def test_faults(files: Files, finetune: dict[str, Any], path: str, message: str) -> None:
    (fault,) = faults_of(files.write("second.yaml", {"finetune": finetune}))
    assert fault.path.startswith(f"phases.finetune.{path}") and message in fault.message, fault
    assert fault.line is not None


def test_a_whole_start_leaves_nothing_of_a_pretraining(files: Files) -> None:
    (fault,) = faults_of(files.write("second.yaml", {"pretrain": PRETRAIN, "finetune": from_first()}))
    assert "nothing of `pretrain` would be used" in fault.message and "parts" in (fault.hint or "")


def test_faults_of_the_other_file_are_faults_of_this_key(files: Files) -> None:
    files.write("first.yaml", {"pretrain": {**PRETRAIN, "learning_rate": -1, "max_steps": 0}})
    faults = faults_of(files.write("second.yaml", {"finetune": from_first()}))
    assert {fault.path for fault in faults} == {"phases.finetune.start_from.spec"}
    assert {fault.message.split(": ")[1] for fault in faults} == {
        "phases.pretrain.learning_rate",
        "phases.pretrain.max_steps",
    }
    assert all("first.yaml:" in fault.message for fault in faults)


def test_circles_are_refused(files: Files) -> None:
    files.write("first.yaml", {"finetune": {**FINETUNE, "start_from": {"spec": "second.yaml", "cell": "second"}}})
    (fault,) = faults_of(files.write("second.yaml", {"finetune": from_first(cell="first")}))
    assert "forms a cycle" in fault.message
    assert fault.message.count("second.yaml") == 2 and "first.yaml" in fault.message


def test_another_models_shape_is_told_unless_the_parts_fit(files: Files) -> None:
    small = files.folder / "small"
    small.mkdir()
    config = json.loads((TINY_LLAVA / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] -= 1
    (small / "config.json").write_text(json.dumps(config))
    model = {"model_name_or_path": str(small), "weights": "random", "dtype": "float32"}
    (fault,) = faults_of(files.write("second.yaml", {"finetune": from_first()}, model=model))
    assert "num_layers 4 instead of 3" in fault.message
    fitting = files.write("second.yaml", {"finetune": from_first(parts=["projector"])}, model=model)
    assert len(load_experiment(fitting).cells) == 1


def test_a_chain_of_three_files(files: Files) -> None:
    files.write("second.yaml", {"finetune": from_first()}, cell_name="second")
    third = {**FINETUNE, "start_from": {"spec": "second.yaml", "cell": "second", "phase": "finetune"}}
    name = load_experiment(files.folder / "second.yaml").cells[0].name
    third["start_from"]["cell"] = name
    (cell,) = files.cells(files.write("third.yaml", {"finetune": third}))
    tree = build_stage_tree([cell])
    assert [job.phase for job in tree.stage_runs.values()] == ["pretrain", "finetune", "finetune"]
    assert tree.path_of[cell.id] == (cell.state,)


def test_an_axis_may_be_the_start(files: Files) -> None:
    path = files.write(
        "second.yaml", {"finetune": from_first()}, matrix={"phases.finetune.start_from.cell": ["seed=0", "seed=1"]}
    )
    cells = files.cells(path)
    first = files.cells(files.folder / "first.yaml")
    assert [cell.phases[0].start for cell in cells] == [cell.state for cell in first]


def test_plan_shows_what_comes_first(files: Files, tmp_path: Path) -> None:
    path = files.write("second.yaml", {"finetune": from_first()})
    walk = prepare(path, [f"cluster.storage_path={tmp_path / 'runs'}"])
    document = plan_document(walk.loaded, walk.cells, walk.tree, walk.ledger)
    (cell,) = document["cells"]
    assert cell["phases"][0]["start_from"] == f"cell seed=1 of {files.folder / 'first.yaml'} after pretrain"
    assert "1 stage run of the cell it starts from first" in cell["reason"]
    first, second = document["stage_runs"]
    assert (first["of"], second["of"]) == ("first", None)
    assert second["parent"] == first["id"] and first["phase"] == "pretrain"
    costs = [run["cost"]["train_tflops"] for run in document["stage_runs"]]
    assert cell["cost"]["train_tflops"] == costs[1]  # the cell's own phase
    assert document["totals"]["train_tflops_alone"] == pytest.approx(sum(costs))

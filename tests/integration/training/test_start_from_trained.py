"""A phase that starts from another experiment's cell or a folder, trained: the same bits, parts from where they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from training_workers import launch, never, write_model

from orchestrator.errors import StageRunError, UsageError
from orchestrator.models.build import build_model
from orchestrator.models.initial_weights import write_start_weights
from orchestrator.models.parts import part_of
from orchestrator.plan.experiment_plan import ExperimentPlan, prepare
from orchestrator.plan.jobs import StartJob
from orchestrator.plan.ledger import Ledger

WEIGHTS = "weights/model.safetensors"
PHASE = {
    "data": "train",
    "train": ["projector"],
    "max_steps": 3,
    "global_batch_size": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 1.0e-2,
    "deepspeed": "zero0",
}
TUNE = {**PHASE, "train": ["projector", "language_model"], "max_steps": 4}


def write_spec(file: Path, phases: dict[str, Any], **rest: Any) -> Path:
    spec = {
        "schema_version": 1,
        "name": file.stem,
        "model": {"model_name_or_path": "model", "weights": "random", "dtype": "float32"},
        "data": {"train": {"kind": "easy_vqa", "split": "train", "max_samples": 64}},
        "phases": phases,
        **rest,
    }
    file.write_text(yaml.safe_dump(spec, sort_keys=False))
    return file


def trained(specs: list[tuple[Any, ...]]) -> list[list[str]]:
    """Trains each file in a storage under `--set` texts, as a lane would; returns what the jobs were that ran."""
    from orchestrator.dispatch.run_job import execute

    memory: dict[str, Any] = {}
    ran = []
    for spec, storage, *overrides in specs:
        walk = prepare(spec, [f"cluster.storage_path={storage}", *overrides])
        ran.append([])
        for job in walk.tree.work(walk.ledger):
            assert execute(job, walk.ledger, memory, never) == "finished"
            ran[-1].append(getattr(job, "phase", type(job).__name__))
    memory["training"].release()
    return ran


def weights(walk: ExperimentPlan, state: str) -> dict[str, torch.Tensor]:
    return load_file(walk.ledger.state_folder(state) / WEIGHTS)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`first` pretrains under two seeds; `one` holds both phases; the others start from `first` or from a folder."""
    folder = tmp_path_factory.mktemp("starts")
    write_model(folder / "model")
    start = {"spec": "first.yaml", "cell": "seed=1"}
    write_spec(folder / "first.yaml", {"pretrain": PHASE}, matrix={"seed": [0, 1]})
    write_spec(folder / "one.yaml", {"pretrain": PHASE, "finetune": TUNE}, seed=1)
    write_spec(folder / "whole.yaml", {"finetune": {**TUNE, "start_from": start}}, seed=1)
    parts = {**TUNE, "start_from": {**start, "parts": ["projector"]}}
    write_spec(folder / "parts.yaml", {"pretrain": PHASE, "finetune": parts}, seed=0)
    write_spec(folder / "folder.yaml", {"finetune": {**TUNE, "start_from": "kept"}}, seed=1)
    return folder


@pytest.fixture(scope="module")
def ran(lab: Path) -> list[list[str]]:
    """What ran where: `one` alone; then in one storage `whole`, `one` again, `parts`; then the folder's."""
    alone, together = str(lab / "alone"), str(lab / "together")
    first = launch(1, trained, [(lab / "one.yaml", alone)])
    walk = prepare(lab / "one.yaml", [f"cluster.storage_path={alone}"])
    kept = lab / "kept"
    kept.mkdir()
    save_file(weights(walk, walk.cells[0].phases[0].end), kept / "model.safetensors")
    names = ("whole.yaml", "one.yaml", "parts.yaml", "folder.yaml")
    return [*first, *launch(1, trained, [(lab / name, together) for name in names])]


def test_what_is_missing_is_trained_once_for_all(ran: list[list[str]]) -> None:
    assert ran[0] == ["RootJob", "pretrain", "finetune"]
    assert ran[1] == ["RootJob", "pretrain", "finetune"]  # whole: the other experiment's phase came first
    assert ran[2] == []  # one file with both phases is the same work
    assert ran[3] == ["RootJob", "pretrain", "StartJob", "finetune"]  # parts: the other cell was there
    assert ran[4] == ["StartJob", "finetune"]


def test_a_whole_start_gives_the_bits_of_one_file(lab: Path, ran: list[list[str]]) -> None:
    one = prepare(lab / "one.yaml", [f"cluster.storage_path={lab / 'alone'}"])
    split = prepare(lab / "whole.yaml", [f"cluster.storage_path={lab / 'together'}"])
    a, b = weights(one, one.cells[0].state), weights(split, split.cells[0].state)
    before = weights(one, one.cells[0].phases[0].end)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], before[name]) for name in a)


def test_a_folder_gives_the_same_bits(lab: Path, ran: list[list[str]]) -> None:
    one = prepare(lab / "one.yaml", [f"cluster.storage_path={lab / 'alone'}"])
    split = prepare(lab / "folder.yaml", [f"cluster.storage_path={lab / 'together'}"])
    a, b = weights(one, one.cells[0].state), weights(split, split.cells[0].state)
    assert one.cells[0].state != split.cells[0].state  # what trained the folder is not known
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_parts_come_from_where_they_are_named(lab: Path, ran: list[list[str]]) -> None:
    walk = prepare(lab / "parts.yaml", [f"cluster.storage_path={lab / 'together'}"])
    (cell,) = walk.cells
    (start,) = cell.starts
    own, other, merged = (weights(walk, state) for state in (start.base, start.source, start.id))
    assert merged.keys() == own.keys()
    for name, tensor in merged.items():
        assert torch.equal(tensor, (other if part_of(name) == "projector" else own)[name]), name
    assert any(not torch.equal(own[name], other[name]) for name in own if part_of(name) == "projector")
    assert any(not torch.equal(own[name], other[name]) for name in own if part_of(name) == "language_model")


def start_job(**values: Any) -> StartJob:
    known = {"id": "start", "model": {}, "base": "base", "source": "other", "folder": None, "parts": ("projector",)}
    return StartJob(**{**known, **values})


def test_a_state_of_another_shape_is_told_by_name(lab: Path, ran: list[list[str]], tmp_path: Path) -> None:
    walk = prepare(lab / "one.yaml", [f"cluster.storage_path={lab / 'alone'}"])
    base = walk.ledger.state_folder(walk.cells[0].state) / WEIGHTS
    other = load_file(base)
    name = next(name for name in other if part_of(name) == "projector")
    save_file({**other, name: torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(StageRunError, match=r"other shapes: .*projector.* \[3\] instead of"):
        write_start_weights(start_job(), base, tmp_path / "other.safetensors", tmp_path)
    with pytest.raises(StageRunError, match="no weights of compressor"):
        write_start_weights(start_job(parts=("compressor",)), base, base, tmp_path)
    assert not (tmp_path / "weights").exists()


def test_llavas_own_projector_file_and_folders_without_weights(lab: Path, ran: list[list[str]], tmp_path: Path) -> None:
    walk = prepare(lab / "one.yaml", [f"cluster.storage_path={lab / 'alone'}"])
    base = walk.ledger.state_folder(walk.cells[0].state) / WEIGHTS
    ours = {name: tensor for name, tensor in load_file(base).items() if part_of(name) == "projector"}
    numbers = {"linear_1": "0", "linear_2": "2"}  # LLaVA's is a Sequential
    theirs = {}
    for name, tensor in ours.items():
        layer, kind = name.split(".")[-2:]
        theirs[f"model.mm_projector.{numbers[layer]}.{kind}"] = tensor
    job = start_job(source=None, folder=str(tmp_path))
    with pytest.raises(UsageError, match="holds no weights"):
        write_start_weights(job, base, None, tmp_path / "out")
    torch.save({name: tensor + 1 for name, tensor in theirs.items()}, tmp_path / "mm_projector.bin")
    write_start_weights(job, base, None, tmp_path / "out")
    merged = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(merged[name], tensor + 1) for name, tensor in ours.items())


def test_a_hugging_face_folder_gives_its_weights(lab: Path, ran: list[list[str]], tmp_path: Path) -> None:
    walk = prepare(lab / "one.yaml", [f"cluster.storage_path={lab / 'alone'}"])
    base = walk.ledger.state_folder(walk.cells[0].state) / WEIGHTS
    spec = walk.cells[0].spec.model
    build_model(spec, base).save_pretrained(tmp_path / "saved")
    job = start_job(model=spec.model_dump(mode="json"), base=None, source=None, parts=())
    write_start_weights(replace(job, folder=str(tmp_path / "saved")), None, None, tmp_path)
    known, found = load_file(base), load_file(tmp_path / WEIGHTS)
    assert known.keys() == found.keys() and all(torch.equal(known[name], found[name]) for name in known)


@pytest.mark.slow
def test_a_dropped_state_is_trained_again_to_the_same_bits(lab: Path, ran: list[list[str]]) -> None:
    storage = str(lab / "alone")
    walk = prepare(lab / "one.yaml", [f"cluster.storage_path={storage}"])
    states = [plan.end for plan in walk.cells[0].phases]
    before = [weights(walk, state) for state in states]
    for state in states:
        walk.ledger.discard(state)
    assert launch(1, trained, [(lab / "one.yaml", storage)]) == [["pretrain", "finetune"]]
    for state, known in zip(states, before, strict=True):
        found = load_file(Ledger(storage).state_folder(state) / WEIGHTS)
        assert all(torch.equal(found[name], known[name]) for name in known)


@pytest.mark.slow
def test_of_a_leaf_stays_what_keep_says(lab: Path, ran: list[list[str]]) -> None:
    storages = {leaf: str(lab / f"leaf-{leaf}") for leaf in ("none", "weights", "full")}
    launch(1, trained, [(lab / "one.yaml", storage, f"cluster.keep.leaf={leaf}") for leaf, storage in storages.items()])
    (cell,) = prepare(lab / "one.yaml").cells
    for leaf, parts in (("none", []), ("weights", ["weights"]), ("full", ["weights", "checkpoint"])):
        ledger = Ledger(storages[leaf])
        assert [part for part in ("weights", "checkpoint") if ledger.has(cell.state, part)] == parts
        assert ledger.has(cell.phases[0].end, "weights") and ledger.result(cell.state) is not None
    # A phase that starts from the leaf wants its weights: it is trained again, to the same bits.
    start = {"spec": "one.yaml", "cell": cell.name, "phase": "finetune"}
    after = write_spec(lab / "after.yaml", {"finetune": {**TUNE, "start_from": start}}, seed=1)
    assert launch(1, trained, [(after, storages["none"], "cluster.keep.leaf=none")]) == [["finetune", "finetune"]]
    again, known = (load_file(Ledger(s).state_folder(cell.state) / WEIGHTS) for s in (storages["none"], lab / "alone"))
    assert all(torch.equal(again[name], known[name]) for name in known)

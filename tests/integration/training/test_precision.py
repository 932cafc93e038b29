"""What is stored, evaluated and gone on from is what was trained, in every compute type under every ZeRO stage.

One table: compute type x ZeRO stage x what trains x {stored weights, evaluation now and later, resume}.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from learned_runs import LEARNED, chain, moments, weights
from training_workers import HEAVY, MIXING, StopAt, launch, make_ledger, model_of, never, weights_digest

from orchestrator.plan.jobs import Action, EvaluationJob, StageJob

# DeepSpeed trains in float16 on those CPUs alone that compute in it.
DTYPES = ("float32", "bfloat16", *(("float16",) if torch.ops.mkldnn._is_mkldnn_fp16_supported() else ()))
KINDS = ("full", "lora", "learned", "frozen")
# How far Adam's steps may turn from the float32 run's: 1 - cosine of the two updates.
TURNED = {"float32": 1e-5, "bfloat16": 0.12, "float16": 0.01}


@dataclass(frozen=True)
class Ran:
    """What a combination left: where, and whether the evaluation now was by the model in memory."""

    folder: Path
    in_memory: bool
    differing: tuple[str, ...]


def deepspeed_of(dtype: str, zero: int) -> dict[str, Any]:
    """A loss scale under which no step of so few overflows, and a window in which it doubles."""
    scale = {"fp16": {"initial_scale_power": 8, "loss_scale_window": 2}} if dtype == "float16" else {}
    return {"zero_optimization": {"stage": zero}, **scale}


def jobs_of(made: tuple[Path, Path], kind: str, dtype: str, zero: int, **values: Any) -> list[StageJob]:
    """Two stage runs of a phase; the second begins from the first one's checkpoint where it is not in memory."""
    recipe = {
        "full": {"train": ("projector", "language_model")},
        "lora": {"train": ("projector", "language_model"), "lora": {"r": 4, "alpha": 8, "dropout": 0.1}},
        "learned": {"train": ("language_model", "compressor")},
        "frozen": {"train": ("compressor",)},
    }[kind]
    points = MIXING if kind in ("learned", "frozen") else HEAVY
    common = {"learning_rate": 1e-3, "max_grad_norm": 0.05, "warmup_ratio": 0.0, "deepspeed": deepspeed_of(dtype, zero)}
    table = (Action(0, 4, "points", points),)
    return chain(made, table, (2, 4), recipe={**common, **recipe, **values}, model=model_of(made[0], dtype=dtype))


def logits_of(job: StageJob, model: Any, file: Path) -> torch.Tensor:
    from orchestrator.evaluation.evaluate import _points, evaluation_mode
    from orchestrator.training.engine import TrainingMemory

    batch = TrainingMemory().data(job).collate(range(4))
    dtype = next(model.parameters()).dtype
    moved = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    with _points(model, job.table[-1].points, file), evaluation_mode(model):
        logits = model(**moved, use_cache=False, label_logits=True).logits  # padding's may be anything, NaN too
    assert bool(logits.isfinite().all())
    return logits


def evaluation_of(job: StageJob) -> EvaluationJob:
    return EvaluationJob("e", job.id, "vqa", "final", job.table[-1].points, {}, {}, job.model)


def run_table(folder: Path, table: dict[str, list[StageJob]]) -> dict[str, Ran]:
    """Each combination trained in memory and evaluated, evaluated again from the ledger, and trained with a stop."""
    from orchestrator.dispatch.run_job import model_for_evaluation
    from orchestrator.evaluation.evaluate import load_model
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    found = {}
    for name, jobs in table.items():
        ledger, memory = make_ledger(folder / name, jobs[0].model), TrainingMemory()
        for job in jobs:
            assert train_stage(job, ledger, memory, never) == "done"
        last = jobs[-1]
        file = ledger.state_folder(last.id) / "weights/model.safetensors"
        rounding = {n: str(p.dtype) for n, p in memory.session.engine.module.named_parameters()}
        model = model_for_evaluation(memory, last.table[-1].points, last.id)
        now = None if model is None else logits_of(last, model, file)
        memory.release()
        reloaded = load_model(evaluation_of(last), file, torch.device("cpu"))
        differing = (
            ["parameters' types"]
            if {*map(str, {p.dtype for p in reloaded.parameters()})} != {*rounding.values()}
            else []
        )
        if now is not None and not torch.equal(now, logits_of(last, reloaded, file)):
            differing.append("evaluation now and later")
        again = make_ledger(folder / f"{name} stopped", jobs[0].model)
        assert train_stage(jobs[0], again, TrainingMemory(), StopAt(0)) == "stopped"
        assert train_stage(jobs[0], again, TrainingMemory(), never) == "done"
        assert train_stage(last, again, TrainingMemory(), never) == "done"
        if weights_digest(again, last.id) != weights_digest(ledger, last.id):
            differing.append("resume")
        found[name] = Ran(folder / name, now is not None, tuple(differing))
    return found


def check(ran: Ran, exact: Ran, kind: str, dtype: str, zero: int) -> None:
    """The combination's weights against the float32 run's, or the root's bits."""
    assert ran.differing == ()
    assert ran.in_memory == (kind != "lora" and zero != 3), "LoRA and ZeRO-3 are evaluated from the ledger"
    root, stored, reference = (
        weights(ran.folder, "root"),
        weights(ran.folder, "state4"),
        weights(exact.folder, "state4"),
    )
    assert stored.keys() == reference.keys()
    moved = {name for name in root if not torch.equal(root[name], reference[name])}
    for name in stored.keys() - moved:
        if name in root:
            assert torch.equal(stored[name], root[name]), f"{name} did not train, and is not the parent's"
    before = weights(exact.folder, "state2")
    start = {name: root.get(name, before[name]) for name in stored}
    update, expected = (
        torch.cat([(one[name] - start[name]).flatten() for name in sorted(stored)]) for one in (stored, reference)
    )
    turned = 1 - float(torch.nn.functional.cosine_similarity(update, expected, dim=0))
    assert turned < TURNED[dtype], f"the update is turned by {turned}"
    assert float(update.norm() / expected.norm()) == pytest.approx(1, abs=0.05)
    for name in moved | {name for name in stored if name.startswith(LEARNED)}:
        if dtype != "float32" and stored[name].numel() > 64:
            rounded = stored[name].to(getattr(torch, dtype)).float()
            assert not torch.equal(rounded, stored[name]), f"{name} is stored rounded"
    if kind in ("learned", "frozen"):
        ours, theirs = (moments(one.folder, "state4")[0] for one in (ran, exact))
        for key in theirs:
            if key.startswith("exp_avg"):
                assert float(ours[key].norm() / theirs[key].norm()) == pytest.approx(1, abs=0.05), key


def run_and_check(made: tuple[Path, Path], folder: Path, combinations: list[tuple[str, str, int]]) -> None:
    kinds = dict.fromkeys(kind for kind, _, _ in combinations)
    all_of = dict.fromkeys([*((kind, "float32", 0) for kind in kinds), *combinations])
    table = {f"{kind} {dtype} zero{zero}": jobs_of(made, kind, dtype, zero) for kind, dtype, zero in all_of}
    found = launch(1, run_table, folder, table)
    for kind, dtype, zero in all_of:
        check(found[f"{kind} {dtype} zero{zero}"], found[f"{kind} float32 zero0"], kind, dtype, zero)


@pytest.mark.slow
def test_what_is_stored_evaluated_and_resumed_is_what_was_trained(made: tuple[Path, Path], tmp_path: Path) -> None:
    run_and_check(made, tmp_path, [("lora", "bfloat16", 0), ("learned", DTYPES[-1], 2)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_table(made: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    run_and_check(made, tmp_path, [(kind, dtype, zero) for dtype in DTYPES for zero in range(4)])

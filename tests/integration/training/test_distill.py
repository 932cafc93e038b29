"""Self-distillation: the loss and its gradients are those of two plain passes, however the batch is divided."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_workers import (
    HEAVY,
    MIXING,
    StopAt,
    launch,
    make_ledger,
    model_of,
    never,
    recipe_of,
    stage,
    uneven_data,
    weights_digest,
)

from orchestrator.errors import StageRunError
from orchestrator.plan.jobs import Action, Distillation, StageJob, StudentPasses
from orchestrator.training.step import distillation_sum, rate_factor

WEIGHT, TEMPERATURE = 0.6, 2.0
TAUGHT = Distillation("full", (), WEIGHT, TEMPERATURE)
LIGHTER = ({"kind": "average_pool", "layer": 1, "stride": 2},)
STUDENTS = StudentPasses(("heavy", "lighter"), (HEAVY, LIGHTER), WEIGHT, TEMPERATURE)


def taught_job(made: tuple[Path, Path], **recipe: Any) -> StageJob:
    """Six steps that mix variants step by step, as a policy does."""
    table = (
        Action(0, 2, "heavy", HEAVY, TAUGHT),
        Action(2, 3, "full"),
        Action(3, 5, "heavy", HEAVY, replace(TAUGHT, points=LIGHTER)),
        Action(5, 6, "heavy", HEAVY),
    )
    settings = {"group_by_modality_length": False, "max_grad_norm": 0.5, "learning_rate": 1e-3, **recipe}
    return stage(
        model_of(made[0]), 6, table=table, data=uneven_data(made[1]), recipe=recipe_of(**settings), keep="weights"
    )


def sandwich_job(made: tuple[Path, Path], **recipe: Any) -> StageJob:
    """Steps of three passes, of two whose student learns its compression, of three again, and of one."""
    table = (
        Action(0, 2, "full + heavy + lighter", (), students=STUDENTS),
        Action(2, 4, "full + mix", (), students=replace(STUDENTS, variants=("mix",), points=(MIXING,))),
        Action(4, 5, "lighter + heavy + mix", LIGHTER, students=replace(STUDENTS, points=(HEAVY, MIXING))),
        Action(5, 6, "heavy", HEAVY),
    )
    parts = ("vision_tower", "projector", "language_model", "compressor")
    settings = {"group_by_modality_length": False, "max_grad_norm": 0.5, "learning_rate": 1e-3, "train": parts}
    return stage(
        model_of(made[0]), 6, table=table, data=uneven_data(made[1]), recipe=recipe_of(**settings | recipe),
        keep="weights",
    )  # fmt: skip


def dualspeed_job(made: tuple[Path, Path], **recipe: Any) -> StageJob:
    """Fast steps pruned behind an isolator; slow ones full, which the fast pass teaches (DualSpeed)."""
    fast = ({"kind": "divprune", "layer": "projector", "keep_ratio": "1/4"}, {"kind": "isolator"})
    taught = Distillation("fast", fast, 1.3, TEMPERATURE, added=True)
    table = (Action(0, 2, "fast", fast), Action(2, 4, "full", (), taught), Action(4, 6, "fast", fast))
    return replace(sandwich_job(made, **recipe), table=table)


def learned_job(made: tuple[Path, Path], **recipe: Any) -> StageJob:
    """A learned compressor is taught for two steps, rests for two, and teaches for the last two."""
    table = (
        Action(0, 2, "mix", MIXING, TAUGHT),
        Action(2, 4, "full"),
        Action(4, 6, "heavy", HEAVY, replace(TAUGHT, points=MIXING)),
    )
    parts = ("projector", "language_model", "compressor")
    settings = {"group_by_modality_length": False, "learning_rate": 1e-3, "train": parts, **recipe}
    return stage(
        model_of(made[0]), 6, table=table, data=uneven_data(made[1]), recipe=recipe_of(**settings), keep="weights"
    )


CLUSTERS = ({"kind": "divt", "layer": "projector", "keep_ratio": "3/4", "heads": 2},)


def adaptive_job(made: tuple[Path, Path], **recipe: Any) -> StageJob:
    """As `learned_job`, under a compressor that leaves as many tokens as an image has clusters."""
    job = learned_job(made, **recipe)
    first, full, last = job.table
    assert last.distill is not None
    last = replace(last, distill=replace(last.distill, points=CLUSTERS))
    return replace(job, table=(replace(first, points=CLUSTERS), full, last))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_distillation_is_the_sum_over_tokens_of_the_divergence(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, 7, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for row_student, row_teacher in zip(student, teacher, strict=True):
        p = torch.exp(row_teacher / temperature) / torch.exp(row_teacher / temperature).sum()
        q = torch.exp(row_student / temperature) / torch.exp(row_student / temperature).sum()
        total = total + temperature**2 * sum(p[v] * (p[v].log() - q[v].log()) for v in range(7))
    found = distillation_sum(student, teacher, temperature)
    assert found.item() == pytest.approx(total.item(), rel=1e-5)
    (mine,), (plain,) = torch.autograd.grad(found, student), torch.autograd.grad(total, student)
    assert torch.allclose(mine, plain, atol=1e-6)
    assert float(distillation_sum(teacher, teacher, temperature)) == pytest.approx(0.0, abs=1e-6)
    assert distillation_sum(student[:0], teacher[:0], temperature).item() == 0.0


def added(made: tuple[Path, Path], **recipe: Any) -> StageJob:
    """As `taught_job`, the divergence added to the labels' loss."""
    job = taught_job(made, **recipe)
    table = tuple(replace(a, distill=a.distill and replace(a.distill, weight=1.3, added=True)) for a in job.table)
    return replace(job, table=table)


def compared(folder: Path, job: StageJob) -> dict[str, float]:
    """Losses and gradients of one micro-batch with text alone and images, and those of two plain passes."""
    from orchestrator.compression import attach
    from orchestrator.models.build import WEIGHTS_FILE
    from orchestrator.training.batches import MicroBatch
    from orchestrator.training.engine import TrainingMemory, open_session
    from orchestrator.training.step import forward_losses

    ledger, memory = make_ledger(folder, job.model), TrainingMemory()
    memory.session = session = open_session(job, ledger.state_folder("root") / WEIGHTS_FILE)
    indices = [0, 1, 5, 7]
    batch = MicroBatch(indices, memory.data(job).collate(indices))
    items, model = batch.label_tokens + 3, session.engine.module
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    (losses,) = forward_losses(session, job.action_at(0), batch, items, seed=11)
    session.engine.backward(losses.total, scale_wrt_gas=False)
    mine = [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
    assert [point.spec.kind for point in session.attachment.points] == ["average_pool"]
    assert session.attachment.last_visual_layer_tokens < 2 * int(
        (batch.tensors["input_ids"] == model.config.image_token_id).sum()
    )

    session.attachment.detach()
    inputs = {name: tensor for name, tensor in batch.tensors.items() if name != "labels"}
    with torch.no_grad():
        teacher = model(**inputs).logits
    session.attachment = attach(model, HEAVY)
    student = model(**batch.tensors, return_logits=True, use_cache=False).logits
    labels_sum = distill_sum = torch.zeros(())
    for row, labels in enumerate(batch.tensors["labels"].tolist()):
        for column, label in enumerate(labels[1:]):
            if label == -100:
                continue
            ours, theirs = student[row, column], teacher[row, column]
            labels_sum = labels_sum - ours.log_softmax(0)[label]
            p, q = (theirs / TEMPERATURE).softmax(0), (ours / TEMPERATURE).softmax(0)
            distill_sum = distill_sum + TEMPERATURE**2 * (p * (p.log() - q.log())).sum()
    distill = job.action_at(0).distill
    assert distill is not None
    share, factor = (1.0, 1.3) if distill.added else (1 - WEIGHT, WEIGHT)
    total = share * labels_sum / items + factor * distill_sum / items
    plain = torch.autograd.grad(total, parameters, allow_unused=True)
    pairs = [(a, b) for a, b in zip(mine, plain, strict=True) if a is not None and b is not None]
    assert len(pairs) > 20 and losses.distill is not None
    found = {
        "loss": abs(float(losses.total - total)),
        "labels": abs(float(losses.labels - labels_sum / items)),
        "distill": abs(float(losses.distill - distill_sum / items)),
        "size": float(losses.distill),
        "gradient": max(float((a - b).abs().max()) for a, b in pairs),
        "gradient_size": max(float(b.abs().max()) for _, b in pairs),
    }
    memory.release()
    return found


@pytest.mark.parametrize("make", [taught_job, added])
def test_loss_and_gradients_are_those_of_two_plain_passes(made: tuple[Path, Path], tmp_path: Path, make: Any) -> None:
    found = launch(1, compared, tmp_path, make(made, deepspeed="zero0"))
    assert found["size"] > 1e-6 and found["gradient_size"] > 1e-3
    assert max(found["loss"], found["labels"], found["distill"]) < 1e-5
    assert found["gradient"] < 1e-5 * max(1.0, found["gradient_size"])


def trained(folder: Path, jobs: dict[str, StageJob]) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Trains each job in a ledger of its own; returns weight files and step lines."""
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    found = {}
    for name, job in jobs.items():
        ledger, memory = make_ledger(folder / name, job.model), TrainingMemory()
        assert train_stage(job, ledger, memory, never) == "done"
        memory.release()
        lines = (ledger.state_folder(job.id) / "metrics.jsonl").read_text().splitlines()
        weights = str(ledger.state_folder(job.id) / "weights/model.safetensors")
        found[name] = weights, [json.loads(line) for line in lines]
    return found


def _compare(one: tuple[str, list[dict[str, Any]]], other: tuple[str, list[dict[str, Any]]]) -> None:
    a, b = load_file(one[0]), load_file(other[0])
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine.get("distill_loss") == pytest.approx(theirs.get("distill_loss"), abs=1e-5)


def test_micro_batches_do_not_change_what_is_learned(made: tuple[Path, Path], tmp_path: Path) -> None:
    jobs = {str(micro): taught_job(made, per_device_train_batch_size=micro) for micro in (3, 8)}
    jobs["untaught"] = replace(jobs["8"], table=tuple(replace(action, distill=None) for action in jobs["8"].table))
    found = launch(1, trained, tmp_path, jobs)
    _compare(found["3"], found["8"])
    assert ["distill_loss" in line for line in found["8"][1]] == [True, True, False, True, True, False]
    assert [line["variant"] for line in found["8"][1]] == ["heavy", "heavy", "full", "heavy", "heavy", "heavy"]
    assert all(line["distill_loss"] > 0 for line in found["8"][1] if "distill_loss" in line)
    assert found["8"][1][0]["loss"] == found["untaught"][1][0]["loss"]  # the labels' own loss, before anything moved
    taught, plain = load_file(found["8"][0]), load_file(found["untaught"][0])
    assert max(float((taught[name] - plain[name]).abs().max()) for name in taught) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "zero"),
    [
        (make, zero)
        for make in (taught_job, added, learned_job, adaptive_job, sandwich_job, dualspeed_job)
        for zero in ("zero2", "zero3")
    ],
)
def test_workers_do_not_change_what_is_learned(made: tuple[Path, Path], tmp_path: Path, make: Any, zero: str) -> None:
    job = make(made, per_device_train_batch_size=2, deepspeed=zero)
    alone = launch(1, trained, tmp_path / "one", {"job": job})
    pair = launch(2, trained, tmp_path / "two", {"job": job})
    _compare(alone["job"], pair["job"])


@pytest.mark.slow
def test_a_learned_compressor_is_taught_and_teaches(made: tuple[Path, Path], tmp_path: Path) -> None:
    jobs = {str(micro): learned_job(made, per_device_train_batch_size=micro) for micro in (3, 8)}
    early = replace(jobs["8"], table=(replace(jobs["8"].table[0], last_step=1),), last_step=1)
    half = replace(jobs["8"], table=jobs["8"].table[:1], last_step=2)
    found = launch(1, trained, tmp_path, {**jobs, "early": early, "half": half})
    _compare(found["3"], found["8"])
    assert ["distill_loss" in line for line in found["8"][1]] == [True, True, False, False, True, True]
    weights = [
        {name: tensor for name, tensor in load_file(found[each][0]).items() if "llavolta_compressors" in name}
        for each in ("early", "half", "8")
    ]
    assert weights[0] and all(weights[0].keys() == other.keys() for other in weights)
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # A pass without gradient moves nothing: what only teaches stays as it is.
    assert all(torch.equal(weights[1][name], weights[2][name]) for name in weights[0])


@pytest.mark.slow
def test_numbers_of_tokens_are_the_images_own_in_any_micro_batch(made: tuple[Path, Path], tmp_path: Path) -> None:
    jobs = {str(micro): adaptive_job(made, per_device_train_batch_size=micro) for micro in (3, 8)}
    jobs["recomputed"] = adaptive_job(made, per_device_train_batch_size=3, gradient_checkpointing=True)
    found = launch(1, trained, tmp_path, jobs)
    _compare(found["3"], found["8"])
    _compare(found["3"], found["recomputed"])
    tokens = [[line["visual_tokens"] for line in found[name][1]] for name in jobs]
    assert tokens[0] == tokens[1] == tokens[2]
    most = 0.75 * tokens[0][2]  # of full tokens
    assert all(0 < one < most for one in tokens[0][:2]) and tokens[0][0] != tokens[0][1]


def resumed(folder: Path, jobs: tuple[StageJob, ...]) -> tuple[str, str]:
    """Stops after step 4, tries to go on as another job, then as the same; returns its digest and the refusal."""
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.stage_run import train_stage

    job, other = jobs
    ledger = make_ledger(folder, job.model)
    assert train_stage(job, ledger, TrainingMemory(), StopAt(3)) == "stopped"
    with pytest.raises(StageRunError) as told:
        train_stage(other, ledger, TrainingMemory(), never)
    assert train_stage(job, ledger, TrainingMemory(), never) == "done"
    return weights_digest(ledger, job.id), str(told.value)


def plain_loop(folder: Path, job: StageJob) -> tuple[str, list[dict[str, Any]]]:
    """The steps of a job without its engine: plain passes, torch's AdamW and clipping; weight file and step lines."""
    from safetensors.torch import save_file

    from orchestrator.compression import attach
    from orchestrator.models.build import WEIGHTS_FILE, build_model
    from orchestrator.spec.model import ModelSpec
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.learned_compressors import _distinct, _learns

    ledger = make_ledger(folder, job.model)
    model = build_model(ModelSpec.model_validate(job.model), ledger.state_folder("root") / WEIGHTS_FILE).train()
    data, recipe = TrainingMemory().data(job), job.recipe
    points = [point for action in job.table for point in action.all_points if _learns(point)]
    attachment = attach(model, [], modules=_distinct(points), seed=job.seed)
    optimizers = {
        name: torch.optim.AdamW(part.parameters(), lr=recipe["learning_rate"], weight_decay=0.0)
        for name, part in {"": model, **attachment.learned_modules}.items()
    }
    optimizers[""] = torch.optim.AdamW(
        [p for name, p in model.named_parameters() if "llavolta" not in name], lr=recipe["learning_rate"],
        weight_decay=0.0,
    )  # fmt: skip
    lines = []
    for step in range(job.last_step):
        action, indices = job.action_at(step), data.batch_indices(job.seed, step, recipe["global_batch_size"], False)
        batch = data.collate(indices)
        attachment.set_step(step, job.seed, indices)
        rate = rate_factor(recipe["lr_scheduler_type"], step, job.total_steps, recipe["warmup_ratio"])

        def logits_of(points: Any, batch: Any = batch) -> torch.Tensor:
            attachment.switch(points)
            rows = model(**batch, return_logits=True, use_cache=False).logits
            return torch.cat([row[:-1][labels[1:] != -100] for row, labels in zip(rows, batch["labels"], strict=True)])

        own, (first, *passes) = logits_of(action.points), action.trained_passes
        targets = torch.cat([labels[1:][labels[1:] != -100] for labels in batch["labels"]])
        loss = torch.nn.functional.cross_entropy(own, targets)
        factor, teacher, divergences = WEIGHT, own.detach(), []
        if action.distill is not None:
            with torch.no_grad():
                factor, teacher = action.distill.weight, logits_of(action.distill.points)
            q = (own / TEMPERATURE).log_softmax(1)
        p = (teacher / TEMPERATURE).softmax(1)
        if action.distill is not None:
            divergences.append(TEMPERATURE**2 * (p * (p.log() - q)).sum() / len(targets))
        for each in passes:
            q = (logits_of(each) / TEMPERATURE).log_softmax(1)
            divergences.append(TEMPERATURE**2 * (p * (p.log() - q)).sum() / len(targets))
        model.zero_grad()
        (loss + factor * sum(divergences)).backward()
        used = {"", *(name for each in (first, *passes) for name in attachment.learned_names(each))}
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], recipe["max_grad_norm"])
        for name in used:
            for group in optimizers[name].param_groups:
                group["lr"] = recipe["learning_rate"] * rate
            optimizers[name].step()
        mean = {"distill_loss": float(sum(divergences) / len(divergences))} if divergences else {}
        line = {"loss": float(loss)} | mean
        lines.append(line)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "plain.safetensors")
    return str(folder / "plain.safetensors"), lines


@pytest.mark.slow
def test_a_sandwich_is_a_plain_loop_of_passes(made: tuple[Path, Path], tmp_path: Path) -> None:
    jobs = {str(micro): sandwich_job(made, per_device_train_batch_size=micro) for micro in (3, 8)}
    jobs["recomputed"] = sandwich_job(made, per_device_train_batch_size=3, gradient_checkpointing=True)
    found = launch(1, trained, tmp_path, jobs)
    plain = launch(1, plain_loop, tmp_path / "plain", jobs["8"])
    for name in jobs:
        _compare(found[name], plain)
    lines = found["8"][1]
    assert ["distill_loss" in line for line in lines] == [True] * 5 + [False]
    assert all(line["distill_loss"] > 0 for line in lines[:5])
    start = load_file(launch(1, untrained, tmp_path / "8", jobs["8"]))
    moved = load_file(found["8"][0])
    assert all(not torch.equal(moved[name], start[name]) for name in start if name.endswith("lm_head.weight"))


@pytest.mark.slow
def test_dualspeed_is_a_plain_loop_of_fast_and_slow_steps(made: tuple[Path, Path], tmp_path: Path) -> None:
    job = dualspeed_job(made, per_device_train_batch_size=8)
    found = launch(1, trained, tmp_path, {"dual": job})["dual"]
    _compare(found, launch(1, plain_loop, tmp_path / "plain", job))
    assert ["distill_loss" in line for line in found[1]] == [False, False, True, True, False, False]
    (tokens,) = (tensor for name, tensor in load_file(found[0]).items() if name.endswith(".tokens"))
    assert tokens.shape == (4, 16) and float(tokens.abs().max()) > 0


def untrained(folder: Path, job: StageJob) -> str:
    return str(make_ledger(folder, job.model).state_folder("root") / "weights/model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("make", [sandwich_job, dualspeed_job])
def test_passes_resume_as_if_left_alone(made: tuple[Path, Path], tmp_path: Path, make: Any) -> None:
    job = make(made, per_device_train_batch_size=3)
    first, *rest = job.table
    students = replace(first.students or STUDENTS, weight=0.5)
    other = replace(job, table=(replace(first, students=students), *rest))
    digest, told = launch(1, resumed, tmp_path / "stopped", (job, other))
    assert "table is" in told and '"weight": 0.5' in told
    weights, _ = launch(1, trained, tmp_path / "alone", {"job": job})["job"]
    assert hashlib.sha256(Path(weights).read_bytes()).hexdigest() == digest


@pytest.mark.slow
def test_resumed_is_left_alone_and_another_teacher_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    job = taught_job(made)
    first, *rest = job.table
    other = replace(job, table=(replace(first, distill=replace(TAUGHT, weight=0.5)), *rest))
    digest, told = launch(1, resumed, tmp_path / "stopped", (job, other))
    assert "table is" in told and '"weight": 0.5' in told
    weights, _ = launch(1, trained, tmp_path / "alone", {"job": job})["job"]
    assert hashlib.sha256(Path(weights).read_bytes()).hexdigest() == digest

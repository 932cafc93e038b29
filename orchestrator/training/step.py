"""One optimizer step: micro-batches forward and backward, the loss over the global batch's label tokens."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.errors import StageRunError
from orchestrator.plan.jobs import Action, Distillation, StageJob, StudentPasses
from orchestrator.training import distributed
from orchestrator.training.batches import MicroBatch
from orchestrator.training.engine import Session


@dataclass(frozen=True)
class Losses:
    """Losses of one pass of a micro-batch: sums over its label tokens, divided by those of the global batch.

    Attributes:
        total: The loss that is minimised.
        labels: Cross-entropy; 0 in a pass that does not learn from labels.
        distill: `T^2 KL(teacher || student)`, of one of K students its K-th part; None without a teacher.
    """

    total: Tensor
    labels: Tensor
    distill: Tensor | None = None


def distillation_sum(student_LV: Tensor, teacher_LV: Tensor, temperature: float) -> Tensor:
    """Return the sum over label tokens of `T^2 KL(teacher || student)` of softmaxes at temperature T, in float32.

    Hinton et al. (arXiv 1503.02531), section 2: gradients of soft targets scale with 1/T^2, hence the factor.

    Args:
        student_LV: The student's logits of L label tokens.
        teacher_LV: The teacher's logits of the same tokens, without gradient.
        temperature: T.
    """
    student = F.log_softmax(student_LV.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_LV.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


def rate_factor(kind: str, step: int, total_steps: int, warmup_ratio: float) -> float:
    """Return the factor on the learning rate in one optimizer step.

    Linear warm-up over `ceil(warmup_ratio * total_steps)` steps (the first has factor 0, as in transformers), then
    cosine or linear decay to 0 at `total_steps`, or constant.

    Args:
        kind: `cosine`, `linear` or `constant`.
        step: 0-based step of the phase.
        total_steps: Steps of the whole phase.
        warmup_ratio: Share of the phase that warms up.
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return step / warmup_steps
    if kind == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "linear":
        return max(0.0, 1.0 - progress)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class StepFigures:
    """Measurements of one optimizer step, over all ranks.

    Attributes:
        loss: Mean over the label tokens of the global batch.
        learning_rate: Rate of the first optimizer group, or the learned compressors' where nothing else trains.
        samples: Samples of the global batch.
        visual_layer_tokens: Visual tokens summed over samples and decoder layers, mean over the passes that train.
        text_tokens: Tokens that are neither visual nor padding, summed over samples.
        label_tokens: Tokens that are predicted.
        step_seconds: Wall-clock time of the step on this rank.
        stop: Whether a rank asks to stop after this step.
        writing: Whether a rank was still writing a checkpoint.
        distill_loss: Mean over the same tokens (and over students) of `T^2 KL(teacher || student)`; None without a
            teacher. `loss` stays the labels' cross-entropy, so that steps of all variants compare.
        skipped: Gradients overflowed in float16, and no weight was changed.
    """

    loss: float
    learning_rate: float
    samples: int
    visual_layer_tokens: float
    text_tokens: int
    label_tokens: int
    step_seconds: float
    stop: bool
    writing: bool
    distill_loss: float | None = None
    skipped: bool = False

    @property
    def is_finite(self) -> bool:
        """Whether the losses are numbers: training has not diverged."""
        return math.isfinite(self.loss + (self.distill_loss or 0.0))


def _micro_batch_seed(seed: int, step: int, first_sample: int) -> int:
    """Return the seed of torch's generator in one micro-batch, for a compressor that draws from it.

    Dropout does not: it draws by sample (`training/dropout.py`). The seed depends on no rank's state, so that a resumed
    run draws the same.
    """
    digest = hashlib.sha256(f"{seed}:{step}:{first_sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _seed(seed: int) -> None:
    """Seed torch's generators; without a GPU the CPU's alone, since torch's own notes a stack trace for others."""
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def run_step(
    session: Session,
    job: StageJob,
    step: int,
    micro_batches: Sequence[MicroBatch],
    should_stop: bool,
    writing: bool = False,
) -> StepFigures:
    """Run one optimizer step; every rank calls it with its own micro-batches.

    The loss is the sum over all label tokens of the global batch divided by their number, counted across ranks and
    micro-batches (docs/concepts/exact.md). DeepSpeed averages gradients over ranks, so each rank's share is multiplied
    by their number; it is not divided by the accumulation steps. That a rank asks to stop, or is still writing a
    checkpoint, becomes known to all with the sums of the losses.
    """
    start = time.perf_counter()
    engine = session.engine
    counts = [float(sum(batch.label_tokens for batch in micro_batches))]
    label_tokens = distributed.reduce_values(counts)[0]
    action, recipe = job.action_at(step), job.recipe
    factor = rate_factor(recipe["lr_scheduler_type"], step, job.total_steps, recipe["warmup_ratio"])
    for optimizer_group, base in zip(engine.optimizer.param_groups, session.base_rates, strict=True):
        optimizer_group["lr"] = base * factor
    loss_sum = distill_sum = torch.zeros((), dtype=torch.float64)
    visual_layer_tokens = text_tokens = 0.0
    for batch in micro_batches:
        session.attachment.set_step(step=step, seed=job.seed, sample_index=batch.indices)
        session.draws.enter(job.seed, step, batch.indices)
        seed = _micro_batch_seed(job.seed, step, batch.indices[0])
        used: set[str | None] = set()
        for losses in forward_losses(session, action, batch, label_tokens, seed):
            # To the engine each pass is a micro-batch (`set_accumulation`).
            engine.backward(losses.total * distributed.world_size(), scale_wrt_gas=False)
            session.learned.collect()
            used.update(point.module_name for point in session.attachment.points)
            if engine.is_gradient_accumulation_boundary():
                session.learned.reduce(used)
            engine.step()
            loss_sum = loss_sum.to(losses.total.device) + losses.labels.detach().double()
            if losses.distill is not None:
                distill_sum = distill_sum.to(losses.total.device) + losses.distill.detach().double()
            visual_layer_tokens += session.attachment.last_visual_layer_tokens / len(action.trained_passes)
        text_tokens += _text_tokens(session, batch)
    session.learned.step(factor)
    samples = sum(len(batch.indices) for batch in micro_batches)
    sums = distributed.reduce_values(
        [
            loss_sum.item(),
            float(samples),
            visual_layer_tokens,
            text_tokens,
            float(should_stop),
            float(writing),
            distill_sum.item(),
        ]
    )
    return StepFigures(
        loss=sums[0],
        learning_rate=(session.base_rates[0] or session.learned.base_rate) * factor,
        samples=int(sums[1]),
        visual_layer_tokens=sums[2],
        text_tokens=int(sums[3]),
        label_tokens=int(label_tokens),
        step_seconds=time.perf_counter() - start,
        stop=sums[4] > 0,
        writing=sums[5] > 0,
        distill_loss=sums[6] if action.distill is not None or action.students is not None else None,
        skipped=not engine.was_step_applied(),
    )


def forward_losses(
    session: Session, action: Action, batch: MicroBatch, label_tokens: float, seed: int
) -> Iterator[Losses]:
    """Yield the losses of each pass of one micro-batch, which goes backward before the next is asked for.

    They are sums over its label tokens, divided by those of the global batch. Without an image the vision tower runs
    all the same (see `attach`): all ranks must take the same path.

    Raises:
        StageRunError: teacher and student do not see the same label tokens.
    """
    device, dtype = session.engine.device, session.compute_dtype
    tensors = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)
        for name, tensor in batch.tensors.items()
    }
    # At least 1: a global batch without any label has loss 0, not NaN.
    num_items = max(1.0, label_tokens)
    if action.distill is not None:
        yield _taught_losses(session, action, action.distill, tensors, num_items, seed)
    elif action.students is not None:
        yield from _sandwich_losses(session, action, action.students, tensors, num_items, seed)
    else:
        _seed(seed)
        loss: torch.Tensor = session.engine(**tensors, use_cache=False, num_items_in_batch=num_items).loss
        yield Losses(loss, loss)


def _taught_losses(
    session: Session, action: Action, distill: Distillation, tensors: dict[str, Tensor], num_items: float, seed: int
) -> Losses:
    """Return the losses under self-distillation: a pass without gradient under fuller points teaches the second pass.

    Both draw from the same seed, so that the student's pass draws what it would draw without a teacher.
    """
    session.switch(distill.points)
    _seed(seed)
    with torch.no_grad():
        teacher_LV = session.engine(**tensors, use_cache=False, label_logits=True).logits
    session.switch(action.points)
    _seed(seed)
    output = session.engine(**tensors, use_cache=False, label_logits=True, num_items_in_batch=num_items)
    _check_same_tokens(action.variant, output.logits, distill.teacher, teacher_LV)
    soft = distillation_sum(output.logits, teacher_LV, distill.temperature) / num_items
    share = 1.0 if distill.added else 1 - distill.weight
    return Losses(share * output.loss + distill.weight * soft, output.loss, soft)


def _sandwich_losses(
    session: Session, action: Action, students: StudentPasses, tensors: dict[str, Tensor], num_items: float, seed: int
) -> Iterator[Losses]:
    """Yield the losses of the action's own pass, which learns from labels, then of each pass that learns from it.

    In-place distillation of universally slimmable networks (arXiv 1903.05134, section 3.3 and algorithm 1): each pass
    goes backward before the next begins, the gradients add up, and none flows into the teacher. Every rank runs the
    passes in this order, all of the same seed.
    """
    session.switch(action.points)
    _seed(seed)
    output = session.engine(**tensors, use_cache=False, label_logits=True, num_items_in_batch=num_items)
    teacher_LV = output.logits.detach()
    yield Losses(output.loss, output.loss)
    del output
    for variant, points in zip(students.variants, students.points, strict=True):
        session.switch(points)
        _seed(seed)
        logits_LV = session.engine(**tensors, use_cache=False, label_logits=True, num_items_in_batch=num_items).logits
        _check_same_tokens(variant, logits_LV, action.variant, teacher_LV)
        soft = distillation_sum(logits_LV, teacher_LV, students.temperature) / num_items
        yield Losses(students.weight * soft, soft.new_zeros(()), soft / len(students.points))


def _check_same_tokens(student: str, student_LV: Tensor, teacher: str, teacher_LV: Tensor) -> None:
    if student_LV.shape != teacher_LV.shape:
        raise StageRunError(
            f"distillation: {student} predicts {len(student_LV)} label tokens, its teacher {teacher} "
            f"{len(teacher_LV)}; labels belong to text, which no compressor may drop"
        )


def _text_tokens(session: Session, batch: MicroBatch) -> int:
    """Return the number of tokens that are neither padding nor visual."""
    visual = session.attachment.visual_BN(batch.tensors["input_ids"]).sum()
    return int(batch.tensors["attention_mask"].sum() - visual)

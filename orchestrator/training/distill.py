"""Self-distillation: a pass without gradient under fuller points teaches the pass that trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.errors import StageRunError
from orchestrator.plan.jobs import Action, Distillation

if TYPE_CHECKING:
    from orchestrator.training.memory import Session


@dataclass(frozen=True)
class Losses:
    """Losses of one micro-batch, each its label tokens' sum over the number of the whole global batch.

    Attributes:
        total: What is minimised.
        labels: Cross-entropy.
        distill: `T^2 KL(teacher || student)`; None where no teacher runs.
    """

    total: Tensor
    labels: Tensor
    distill: Tensor | None = None


def distillation_sum(student_LV: Tensor, teacher_LV: Tensor, temperature: float) -> Tensor:
    """Return the sum over label tokens of `T^2 KL(teacher || student)` of softmaxes at temperature T, in float32.

    Hinton et al. (arXiv 1503.02531), section 2: soft targets' gradients scale with 1/T^2, so they are multiplied back.

    Args:
        student_LV: Logits of L label tokens.
        teacher_LV: The teacher's of the same tokens, without gradient.
        temperature: T.
    """
    student = F.log_softmax(student_LV.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_LV.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


def taught_losses(
    session: Session, action: Action, distill: Distillation, tensors: dict[str, Tensor], num_items: float, seed: int
) -> Losses:
    """Return the teacher's pass, then the student's; every rank takes both in this order.

    Both draw dropout from the same seed: the student's pass draws what it would without a teacher.

    Args:
        session: Engine and attachment; the attachment is left at the action's points.
        action: What the step does.
        distill: Its teacher.
        tensors: The micro-batch on the device, labels included.
        num_items: Label tokens of the global batch.
        seed: Of the micro-batch.

    Raises:
        StageRunError: the two passes do not see the same label tokens.
    """
    engine, attachment = session.engine, session.attachment
    attachment.switch(list(distill.points))
    torch.manual_seed(seed)
    with torch.no_grad():
        teacher_LV = engine(**tensors, use_cache=False, label_logits=True).logits
    attachment.switch(list(action.points))
    torch.manual_seed(seed)
    output = engine(**tensors, use_cache=False, label_logits=True, num_items_in_batch=num_items)
    if output.logits.shape != teacher_LV.shape:
        raise StageRunError(
            f"distillation: {action.variant} predicts {len(output.logits)} label tokens, its teacher "
            f"{distill.teacher} {len(teacher_LV)}; labels belong to text, which no compressor may drop"
        )
    soft = distillation_sum(output.logits, teacher_LV, distill.temperature) / num_items
    return Losses((1 - distill.weight) * output.loss + distill.weight * soft, output.loss, soft)

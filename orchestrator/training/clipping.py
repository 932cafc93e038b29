"""One gradient norm over all that trains: what an engine holds, and what learned compressors hold beside it."""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed.runtime.utils import clip_grad_norm_

from orchestrator.errors import StageRunError


class SharedNorm:
    """Makes an engine clip by the norm of its gradients and of some it does not know.

    It steps in where DeepSpeed's optimizers use their norm; with nothing beside, every bit is DeepSpeed's.

    Args:
        engine: A DeepSpeed engine.
        max_norm: The recipe's `max_grad_norm`; 0 clips nothing.
        alone: Nothing in the engine trains, so its gradients do not count.

    Attributes:
        beside: Norm of this step's gradients beside the engine, on its device; None where there are none.
        scale: What the engine multiplied this step's loss with.
        overflowed: Under float16, the gradients beside the engine are not finite: nothing takes this step.
    """

    def __init__(self, engine: Any, max_norm: float, alone: bool = False) -> None:
        self._engine, self._max_norm, self._alone = engine, max_norm, alone
        self._total: torch.Tensor | None = None
        self.beside: torch.Tensor | None = None
        self.scale, self.overflowed = 1.0, False
        optimizer = engine.optimizer
        if engine.fp16_enabled():
            self._share_overflow(optimizer)
            self._keep_scale(optimizer)
        if max_norm <= 0 or alone:
            return
        if hasattr(optimizer, "unscale_and_clip_grads"):  # ZeRO 1 to 3, float16
            self._widen_total_norm(optimizer)
        elif hasattr(optimizer, "get_grads_for_norm"):  # ZeRO 1 in bfloat16
            self._add_to_gradients(optimizer)
        else:  # ZeRO 0 in float32: torch's own optimizer
            self._clip_all(engine)

    def factor(self) -> torch.Tensor | None:
        """Return what the gradients beside the engine are multiplied with, once it has stepped; None for nothing."""
        total = self.beside if self._alone and self._max_norm > 0 else self._total
        self._total = self.beside = None
        return None if total is None else self._factor(total)

    def _factor(self, total: torch.Tensor) -> torch.Tensor:
        return (self._max_norm / (total + 1e-6)).clamp(max=1.0)

    def _widened(self, norm: torch.Tensor) -> torch.Tensor:
        assert self.beside is not None
        self._total = torch.hypot(norm.to(self.beside), self.beside)
        return self._total

    def _share_overflow(self, optimizer: Any) -> None:
        original = optimizer.has_overflow
        optimizer.has_overflow = lambda *args, **kwargs: bool(original(*args, **kwargs)) or self.overflowed

    def _keep_scale(self, optimizer: Any) -> None:
        """DeepSpeed 0.19.8 may double its scale between the backward pass and the division by it: a step of half size.

        Gradients are divided by the scale they were multiplied with.
        """
        original = optimizer.unscale_and_clip_grads

        def unscale(*args: Any, **kwargs: Any) -> Any:
            following, optimizer.loss_scale = optimizer.loss_scale, self.scale
            try:
                return original(*args, **kwargs)
            finally:
                optimizer.loss_scale = following

        optimizer.unscale_and_clip_grads = unscale

    def _widen_total_norm(self, optimizer: Any) -> None:
        original = optimizer.unscale_and_clip_grads

        def clip(*args: Any, **kwargs: Any) -> Any:
            if self.beside is None:
                return original(*args, **kwargs)
            # The last positional argument is the norm, of gradients still multiplied by the loss scale.
            norm = torch.as_tensor(args[-1])
            return original(*args[:-1], self._widened(norm / self.scale).to(norm) * self.scale, **kwargs)

        optimizer.unscale_and_clip_grads = clip

    def _add_to_gradients(self, optimizer: Any) -> None:
        original = optimizer.get_grads_for_norm

        def gradients(for_clipping: bool = False) -> Any:
            found = original(for_clipping=for_clipping)
            if self.beside is None or for_clipping:
                return found
            dense, experts = found
            self._widened(torch.nn.utils.get_total_norm(dense))
            return [*dense, self.beside.reshape(1)], experts

        optimizer.get_grads_for_norm = gradients

    def _clip_all(self, engine: Any) -> None:
        original = engine.clip_fp32_gradients

        def clip() -> None:
            if self.beside is None:
                original()
                return
            trained = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
            # Without a limit it only measures, in its own order of additions.
            total = self._widened(clip_grad_norm_(trained, math.inf, mpu=engine.mpu))
            for parameter in trained:
                parameter.grad.mul_(self._factor(total))

        engine.clip_fp32_gradients = clip


def loss_scale(engine: Any) -> float:
    """Return what the engine multiplies the loss with against underflow; 1 but for float16.

    Raises:
        StageRunError: the engine computes in float16, and its optimizer does not say the scale it uses.
    """
    optimizer = engine.optimizer
    scaled = getattr(optimizer, "scale_if_loss", None)
    # DeepSpeed scales nothing but what a gradient flows back from.
    used = 1.0 if scaled is None else float(scaled(torch.ones((), requires_grad=True) * 1.0).detach())
    if used != (float(getattr(optimizer, "loss_scale", math.nan)) if engine.fp16_enabled() else 1.0):
        raise StageRunError(
            f"{type(optimizer).__name__} multiplies the loss by {used}, and says it is "
            f"{getattr(optimizer, 'loss_scale', 'none')}; gradients beside it cannot be brought to their size"
        )
    return used

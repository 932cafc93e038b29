"""Learned compressors in training: an optimizer of their own beside DeepSpeed's, so that stages can add and drop them.

DeepSpeed fixes the set of parameters of an engine. A learned compressor enters, pauses and returns with the stages, so
its parameters never enter an engine: every rank holds all of them in float32, sums their gradients over the ranks and
takes AdamW's step on them. The engine's optimizer is not affected; their checkpoint fits any number of workers and any
ZeRO stage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import clip_grad_norm_
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from orchestrator import registry
from orchestrator.compression import Attachment, attach
from orchestrator.errors import StageRunError, StorageError
from orchestrator.models.build import cast_parameters, copy_weights, weight_tensors
from orchestrator.models.compressor_weights import LEARNED_MODULES, learned_modules, learned_weights
from orchestrator.models.parts import COMPRESSOR, names_without_decay, rate_of
from orchestrator.plan.ledger.files import storage_error
from orchestrator.spec.phase import PhaseSpec
from orchestrator.training import distributed
from orchestrator.training.dropout import refuse_dropout


class _SharedNorm:
    """One gradient norm over all that trains: an engine clips by its own gradients and external ones together.

    It patches the places where DeepSpeed's optimizers use their norm; without external gradients, every bit is
    DeepSpeed's.

    Args:
        engine: A DeepSpeed engine.
        max_norm: The recipe's `max_grad_norm`; 0 = no clipping.
        alone: Nothing in the engine trains, so its gradients do not count.

    Attributes:
        external: Norm of this step's external gradients, on the engine's device; None where there are none.
        scale: The engine's loss scale in this step.
        overflowed: Under float16, external gradients are not finite: the step is skipped everywhere.
    """

    def __init__(self, engine: Any, max_norm: float, alone: bool = False) -> None:
        self._engine, self._max_norm, self._alone = engine, max_norm, alone
        self._total: torch.Tensor | None = None
        self.external: torch.Tensor | None = None
        self.scale, self.overflowed = 1.0, False
        optimizer = engine.optimizer
        if engine.fp16_enabled():
            _wrap(optimizer, "has_overflow", self._has_overflow)
            _wrap(optimizer, "unscale_and_clip_grads", self._with_own_scale)
        if max_norm <= 0 or alone:
            return
        if hasattr(optimizer, "unscale_and_clip_grads"):  # ZeRO 1 to 3, float16
            _wrap(optimizer, "unscale_and_clip_grads", self._with_total_norm)
        elif hasattr(optimizer, "get_grads_for_norm"):  # ZeRO 1 in bfloat16
            _wrap(optimizer, "get_grads_for_norm", self._with_external_gradient)
        else:  # ZeRO 0 in float32: torch's own optimizer
            _wrap(engine, "clip_fp32_gradients", self._clip_all)

    def factor(self) -> torch.Tensor | None:
        """Return the clipping factor of the external gradients, after the engine's step; None = no clipping."""
        total = self.external if self._alone and self._max_norm > 0 else self._total
        self._total = self.external = None
        return None if total is None else self._factor(total)

    def _factor(self, total: torch.Tensor) -> torch.Tensor:
        return (self._max_norm / (total + 1e-6)).clamp(max=1.0)

    def _widened(self, norm: torch.Tensor) -> torch.Tensor:
        assert self.external is not None
        self._total = torch.hypot(norm.to(self.external), self.external)
        return self._total

    def _has_overflow(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
        return bool(original(*args, **kwargs)) or self.overflowed

    def _with_own_scale(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Divide gradients by the scale they were multiplied with.

        DeepSpeed 0.19.8 may double its scale between the backward pass and the division, which halves the step.
        """
        optimizer = self._engine.optimizer
        following, optimizer.loss_scale = optimizer.loss_scale, self.scale
        try:
            return original(*args, **kwargs)
        finally:
            optimizer.loss_scale = following

    def _with_total_norm(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.external is None:
            return original(*args, **kwargs)
        # The last positional argument is the norm, of gradients still multiplied by the loss scale.
        norm = torch.as_tensor(args[-1])
        return original(*args[:-1], self._widened(norm / self.scale).to(norm) * self.scale, **kwargs)

    def _with_external_gradient(self, original: Callable[..., Any], for_clipping: bool = False) -> Any:
        found = original(for_clipping=for_clipping)
        if self.external is None or for_clipping:
            return found
        dense, experts = found
        self._widened(torch.nn.utils.get_total_norm(dense))
        return [*dense, self.external.reshape(1)], experts

    def _clip_all(self, original: Callable[[], None]) -> None:
        if self.external is None:
            original()
            return
        trained = [parameter for parameter in self._engine.module.parameters() if parameter.grad is not None]
        # Without a limit it only computes the norm, in its own order of additions.
        total = self._widened(clip_grad_norm_(trained, math.inf, mpu=self._engine.mpu))
        for parameter in trained:
            parameter.grad.mul_(self._factor(total))


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by a call of `around` with it and its arguments."""
    setattr(owner, name, partial(around, getattr(owner, name)))


def _loss_scale(engine: Any) -> float:
    """Return the engine's loss scale; 1 except under float16.

    Raises:
        StageRunError: the engine's optimizer reports another scale than it uses.
    """
    optimizer = engine.optimizer
    scaled = getattr(optimizer, "scale_if_loss", None)
    # DeepSpeed scales only tensors that require a gradient.
    used = 1.0 if scaled is None else float(scaled(torch.ones((), requires_grad=True) * 1.0).detach())
    if used != (float(getattr(optimizer, "loss_scale", math.nan)) if engine.fp16_enabled() else 1.0):
        raise StageRunError(
            f"{type(optimizer).__name__} multiplies the loss by {used}, but reports a loss scale of "
            f"{getattr(optimizer, 'loss_scale', 'none')}; gradients of learned compressors cannot be unscaled"
        )
    return used


LEARNED_FILE = "learned.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class CompressorState:
    """The state of a learned compressor, on the CPU: kept while no stage uses it, and what a checkpoint holds.

    Attributes:
        weights: Parameters (float32) and persistent buffers by name.
        moments: Adam's `exp_avg` and `exp_avg_sq` by parameter; empty before the first step.
        steps: Adam's step count: optimizer steps of this phase in which the compressor was used.
    """

    weights: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    steps: int = 0


@dataclass
class _ActiveCompressor:
    """A learned compressor in the model.

    Attributes:
        module: The module, in the compute type.
        masters: Its parameters in float32; the module's own where it computes in float32.
        optimizer: AdamW over the masters; None where learned compressors do not train.
        steps: Adam's step count.
    """

    module: nn.Module
    masters: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW | None
    steps: int

    def advance(self, base_rate: float, rate_factor: float, clipping: torch.Tensor | None) -> None:
        """Take one step of AdamW on the masters and copy the new values into the module."""
        assert self.optimizer is not None
        for master in self.masters.values():
            if master.grad is not None and clipping is not None:
                master.grad.mul_(clipping)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = base_rate * rate_factor
        self.optimizer.step()
        self.steps += 1
        for name, parameter in self.module.named_parameters():
            if parameter is not self.masters[name]:
                parameter.data.copy_(self.masters[name].data)


class LearnedCompressors:
    """All learned compressors of a state: those of the phase's table so far, and those of an earlier phase.

    Those of an earlier phase are kept: a point that uses one again starts from its weights, with a new optimizer.

    Args:
        engine: The engine of the rest of the model.
        recipe: Whether they train, their learning rate, weight decay and clipping.
        seed: The phase's seed; a compressor that no earlier state knows starts from (seed, its name).
        dtype: The type they compute in.
        weights_file: Weights of the parent state, with the compressors it knows.
        alone: Nothing in the engine trains.

    Attributes:
        base_rate: Their learning rate before the schedule's factor; 0 where they do not train.
    """

    def __init__(
        self,
        engine: Any,
        recipe: PhaseSpec,
        seed: int,
        dtype: torch.dtype,
        weights_file: Path,
        alone: bool,
    ) -> None:
        self._engine, self._model, self._recipe, self._seed = engine, engine.module, recipe, seed
        self._device, self._dtype = engine.device, dtype
        self._norm = _SharedNorm(engine, recipe.max_grad_norm, alone)
        self._stepping: list[_ActiveCompressor] = []
        self._inactive = {name: CompressorState(weights) for name, weights in learned_weights(weights_file).items()}
        self._active: dict[str, _ActiveCompressor] = {}
        self._points: list[dict[str, Any]] = []
        self._modules: nn.Module | None = None
        self.base_rate = rate_of(recipe.learning_rate, COMPRESSOR) if self.trains else 0.0

    @property
    def trains(self) -> bool:
        """Whether learned compressors train in this phase; otherwise they run with fixed weights."""
        return COMPRESSOR in self._recipe.train

    def enter(self, attachment: Attachment, points: Iterable[Mapping[str, Any]]) -> Attachment:
        """Activate the compressors of these points, hidden from the engine, and deactivate the others.

        Args:
            attachment: The model's attachment.
            points: All points of the phase's table up to the end of the stage run.

        Returns:
            The model's attachment: the same one, or a new one with other modules.
        """
        learned = _distinct(dict(point) for point in points if _learns(point))
        if learned != self._points:
            for name in list(self._active):
                self._inactive[name] = _state_of(self._active.pop(name))
            attachment.detach()
            attachment = attach(self._model, [], modules=learned, seed=self._seed)
            self._points = learned
            for name, module in learned_modules(self._model).items():
                self._active[name] = self._activated(name, module)
        # Out of the model's tree, so that the engine finds only the parameters it knows.
        self._modules = self._model._modules.pop(LEARNED_MODULES, None) or self._modules
        for active in self._active.values():
            active.module.train()
        return attachment

    def show(self) -> None:
        """Put the modules back into the model's tree, for whatever uses the model next."""
        if self._modules is not None and self._active:
            self._model.add_module(LEARNED_MODULES, self._modules)

    def collect(self) -> None:
        """Add the gradients of a micro-batch to those of the masters, in float32."""
        if self._dtype == torch.float32:
            return  # they are the masters' own
        for active in self._active.values():
            for name, parameter in active.module.named_parameters():
                if parameter.grad is None:
                    continue
                master, gradient = active.masters[name], parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    def reduce(self, used: Iterable[str | None]) -> None:
        """Sum over ranks the gradients of the compressors used in this optimizer step; right before the engine's step.

        Args:
            used: Names of the modules; None for points without one.
        """
        self._norm.scale, self._norm.overflowed = _loss_scale(self._engine), False
        names = sorted({name for name in used if name is not None}) if self.trains else []
        self._stepping = [self._active[name] for name in names]
        masters = [master for active in self._stepping for master in active.masters.values()]
        if not masters:
            return
        flat = torch.cat([(m.grad if m.grad is not None else torch.zeros_like(m)).flatten() for m in masters])
        if distributed.world_size() > 1:
            dist.all_reduce(flat)
        # The loss was multiplied by the number of ranks, since DeepSpeed averages over them.
        flat.div_(distributed.world_size() * self._norm.scale)
        if self._engine.fp16_enabled() and not bool(torch.isfinite(flat).all()):
            # The engine skips this step as it does where its own gradients overflow.
            self._norm.overflowed, self._stepping = True, []
            return
        self._norm.external = flat.norm()
        for master, gradient in zip(masters, flat.split([m.numel() for m in masters]), strict=True):
            master.grad = gradient.view_as(master)

    def step(self, rate_factor: float) -> None:
        """Take one step of AdamW on the reduced gradients, right after the engine's; other compressors do not change.

        Args:
            rate_factor: The schedule's factor on the learning rate.
        """
        factor = self._norm.factor()
        for active in self._stepping if self._engine.was_step_applied() else []:
            active.advance(self.base_rate, rate_factor, factor)
        self._stepping = []
        for active in self._active.values():
            for parameter in (*active.masters.values(), *active.module.parameters()):
                parameter.grad = None

    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the weights of all compressors by module and name, in float32 on the CPU."""
        return {name: state.weights for name, state in self._all().items()}

    def save(self, folder: Path) -> None:
        """Write weights, moments and step counts into a checkpoint's folder; nothing if there are no compressors.

        Raises:
            StorageError: the disk is full.
        """
        states = self._all()
        if not states:
            return
        tensors: dict[str, torch.Tensor] = {}
        for name, one in states.items():
            tensors |= {f"weights.{name}.{key}": tensor.contiguous() for key, tensor in one.weights.items()}
            for key, moments in one.moments.items():
                tensors |= {f"{kind}.{name}.{key}": moments[kind].contiguous() for kind in MOMENTS}
        steps = json.dumps({name: one.steps for name, one in states.items()})
        try:
            save_file(tensors, folder / LEARNED_FILE, metadata={"steps": steps})
        except Exception as error:  # safetensors raises its own kind and OSError
            raise storage_error(folder, error) from error

    def load(self, folder: Path, names: Sequence[str]) -> None:
        """Load what `save` wrote; before any compressor is active.

        Args:
            folder: The checkpoint.
            names: The compressors it must hold.

        Raises:
            StorageError: the file is missing or cannot be read, or lacks one.
        """
        self._inactive = _read_states(folder / LEARNED_FILE) if names else {}
        if sorted(self._inactive) != sorted(names):
            raise StorageError(
                f"{folder / LEARNED_FILE} holds {', '.join(sorted(self._inactive)) or 'nothing'}, but the checkpoint's "
                f"state has {', '.join(sorted(names))}"
            )

    def names(self) -> list[str]:
        """Return the names of all compressors, sorted."""
        return sorted({*self._inactive, *self._active})

    def _all(self) -> dict[str, CompressorState]:
        active = {name: _state_of(one) for name, one in self._active.items()}
        return dict(sorted({**self._inactive, **active}.items()))

    def _activated(self, name: str, module: nn.Module) -> _ActiveCompressor:
        state = self._inactive.pop(name, None) or CompressorState(
            {key: tensor.clone() for key, tensor in weight_tensors(module).items()}
        )
        refuse_dropout(module, name)
        cast_parameters(module.to(self._device), self._dtype)
        copy_weights(state.weights, module, name)
        module.requires_grad_(self.trains)
        masters = dict(module.named_parameters())
        if self._dtype != torch.float32:
            masters = {
                key: nn.Parameter(state.weights[key].to(self._device, torch.float32, copy=True)) for key in masters
            }
        optimizer = None
        if self.trains:
            optimizer = _adamw(module, masters, self._recipe)
            for key, moments in state.moments.items():
                optimizer.state[masters[key]] = {
                    "step": torch.tensor(float(state.steps)),
                    **{kind: moments[kind].to(self._device, copy=True) for kind in MOMENTS},
                }
        return _ActiveCompressor(module, masters, optimizer, state.steps)


def _read_states(path: Path) -> dict[str, CompressorState]:
    """Return what `LearnedCompressors.save` wrote.

    Raises:
        StorageError: the file is missing or cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            steps: dict[str, int] = json.loads(file.metadata()["steps"])
            found = {name: CompressorState({}, steps=count) for name, count in steps.items()}
            for key in sorted(file.keys()):
                kind, _, rest = key.partition(".")
                name, _, parameter = rest.partition(".")
                tensor = file.get_tensor(key)
                if kind == "weights":
                    found[name].weights[parameter] = tensor
                else:
                    found[name].moments.setdefault(parameter, {})[kind] = tensor
            return found
    except Exception as error:  # a broken file raises safetensors' own kind, KeyError, ValueError, OSError
        raise StorageError(f"{path} cannot be read: {error}") from error


def _adamw(module: nn.Module, masters: Mapping[str, nn.Parameter], recipe: PhaseSpec) -> torch.optim.AdamW:
    """Return AdamW with the engine's settings (`deepspeed_config`)."""
    without_decay = set(names_without_decay(module))
    groups = [
        {
            "params": [m for name, m in masters.items() if name not in without_decay],
            "weight_decay": recipe.weight_decay,
        },
        {"params": [m for name, m in masters.items() if name in without_decay], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([one for one in groups if one["params"]], lr=0.0, betas=(0.9, 0.999), eps=1e-8)


def _state_of(active: _ActiveCompressor) -> CompressorState:
    """Return the current state of an active compressor, on the CPU; it shares its memory where possible."""
    weights = {**weight_tensors(active.module), **{name: master.detach() for name, master in active.masters.items()}}
    moments = {}
    if active.optimizer is not None:
        states = ((name, active.optimizer.state.get(master)) for name, master in active.masters.items())
        moments = {name: {kind: state[kind].cpu() for kind in MOMENTS} for name, state in states if state}
    return CompressorState({name: tensor.cpu() for name, tensor in weights.items()}, moments, active.steps)


def _learns(point: Mapping[str, Any]) -> bool:
    return bool(registry.spec_class(registry.COMPRESSORS, point["kind"]).learns)


def _distinct(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found = {json.dumps(point, sort_keys=True): point for point in points}
    return [found[text] for text in sorted(found)]

"""Learned compressors in training: an optimizer of their own beside DeepSpeed's, so that they come and go freely.

DeepSpeed fixes the set of parameters of an engine. A learned compressor enters, pauses and returns with the stages, so
its parameters never enter an engine: every rank holds them whole in float32, sums their gradients over the ranks and
steps AdamW on them. What happens to them touches nothing of anyone else's optimizer; a checkpoint of them fits any
number of workers and any ZeRO stage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
from orchestrator.models.build import cast_parameters, weight_tensors
from orchestrator.models.compressor_weights import LEARNED_MODULES, fill, learned_modules, learned_weights
from orchestrator.models.parts import COMPRESSOR, names_without_decay, rate_of
from orchestrator.plan.ledger.files import storage_error
from orchestrator.spec.phase import PhaseSpec
from orchestrator.training import distributed
from orchestrator.training.dropout import refuse_dropout


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


LEARNED_FILE = "learned.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Parked:
    """A learned compressor at rest: it waits for a stage that uses it, and nothing of it changes.

    Attributes:
        weights: Parameters (float32) and persistent buffers by name.
        moments: Adam's `exp_avg` and `exp_avg_sq` by parameter; empty before the first step.
        steps: Adam's step count: optimizer steps in which the compressor was used, in this phase.
    """

    weights: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    steps: int = 0


def write_parked(parked: Mapping[str, Parked], path: Path) -> None:
    """Write weights, moments and step counts as one safetensors file.

    Raises:
        StorageError: the disk is full.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, one in parked.items():
        tensors |= {f"weights.{name}.{key}": tensor for key, tensor in one.weights.items()}
        for key, moments in one.moments.items():
            tensors |= {f"{kind}.{name}.{key}": moments[kind] for kind in MOMENTS}
    steps = {name: one.steps for name, one in parked.items()}
    try:
        clean = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(clean, path, metadata={"steps": json.dumps(steps)})
    except Exception as error:  # safetensors raises its own kind and OSError
        raise storage_error(path.parent, error) from error


def read_parked(path: Path) -> dict[str, Parked]:
    """Return what `write_parked` wrote.

    Raises:
        StorageError: the file is missing or cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            steps: dict[str, int] = json.loads(file.metadata()["steps"])
            found = {name: Parked({}, steps=count) for name, count in steps.items()}
            for key in file.keys():  # noqa: SIM118 (the handle is no mapping)
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


@dataclass
class _Live:
    """A learned compressor in the model.

    Attributes:
        module: What computes, in the compute type.
        masters: Its parameters in float32; the module's own where it computes in float32.
        optimizer: AdamW over the masters; None where learned compressors do not train.
    """

    module: nn.Module
    masters: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW | None
    steps: int

    def advance(self, base_rate: float, rate_factor: float, clipping: torch.Tensor | None) -> None:
        """Return one step of AdamW on the masters, and the new values into the module."""
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


class LearnedPart:
    """All learned compressors of a state: those of the phase's table so far, and those an earlier phase left.

    What an earlier phase left is carried along: a point that uses it again starts from its weights, with a new
    optimizer.

    Args:
        engine: The engine of the rest of the model.
        recipe: Whether they train, their rate, decay and clipping.
        seed: Of the phase; a compressor that no earlier state knows starts from (seed, its name).
        dtype: What it computes in.
        weights_file: Weights of the parent state; the compressors in it are known from the start.
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
        self._norm = SharedNorm(engine, recipe.max_grad_norm, alone)
        self._stepping: list[_Live] = []
        self._parked = {name: Parked(weights) for name, weights in learned_weights(weights_file).items()}
        self._live: dict[str, _Live] = {}
        self._points: list[dict[str, Any]] = []
        self._modules: nn.Module | None = None
        self.base_rate = rate_of(recipe.learning_rate, COMPRESSOR) if self.trains else 0.0

    @property
    def trains(self) -> bool:
        """Whether learned compressors train in this phase; else they run with the weights they have."""
        return COMPRESSOR in self._recipe.train

    def enter(self, attachment: Attachment, points: Iterable[Mapping[str, Any]]) -> Attachment:
        """Make the compressors of these points live, and park the others.

        Args:
            attachment: The model's attachment.
            points: All points of the phase's table up to the end of the stage run.

        Returns:
            The model's attachment: the same one, or a new one that holds other modules.
        """
        learned = _distinct(dict(point) for point in points if _learns(point))
        if learned == self._points:
            return attachment
        for name in list(self._live):
            self._parked[name] = _parked(self._live.pop(name))
        attachment.detach()
        attachment = attach(self._model, [], modules=learned, seed=self._seed)
        self._points = learned
        for name, module in learned_modules(self._model).items():
            self._live[name] = self._woken(name, module)
        self.hide()
        return attachment

    def hide(self) -> None:
        """Take the modules out of the model's tree: an engine that walks over it finds only what it knows."""
        self._modules = self._model._modules.pop(LEARNED_MODULES, None) or self._modules
        for live in self._live.values():
            live.module.train()

    def show(self) -> None:
        """Put them back into the tree, for whoever uses the model next."""
        if self._modules is not None and self._live:
            self._model.add_module(LEARNED_MODULES, self._modules)

    def collect(self) -> None:
        """Add the gradients of a micro-batch to those of the masters, in float32."""
        if self._dtype == torch.float32:
            return  # they are the masters' own
        for live in self._live.values():
            for name, parameter in live.module.named_parameters():
                if parameter.grad is None:
                    continue
                master, gradient = live.masters[name], parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    def reduce(self, used: Iterable[str | None]) -> None:
        """Sum over ranks the gradients of the compressors used in this optimizer step; right before the engine steps.

        Args:
            used: Names of the modules; None for points without one.
        """
        self._norm.scale, self._norm.overflowed = loss_scale(self._engine), False
        names = sorted({name for name in used if name is not None}) if self.trains else []
        self._stepping = [self._live[name] for name in names]
        masters = [master for live in self._stepping for master in live.masters.values()]
        if not masters:
            return
        flat = torch.cat([(m.grad if m.grad is not None else torch.zeros_like(m)).flatten() for m in masters])
        if distributed.world_size() > 1:
            dist.all_reduce(flat)
        # The loss was multiplied by the number of ranks, since an engine takes the mean over them.
        flat.div_(distributed.world_size() * self._norm.scale)
        if self._engine.fp16_enabled() and not bool(torch.isfinite(flat).all()):
            # The engine is told, and passes this step over as it does where it overflows itself.
            self._norm.overflowed, self._stepping = True, []
            return
        self._norm.beside = flat.norm()
        for master, gradient in zip(masters, flat.split([m.numel() for m in masters]), strict=True):
            master.grad = gradient.view_as(master)

    def step(self, rate_factor: float) -> None:
        """Return one step of AdamW on what was reduced, right after the engine's; the other compressors stay as they
        are.

        Args:
            rate_factor: The schedule's factor on the learning rate.
        """
        factor = self._norm.factor()
        for live in self._stepping if self._engine.was_step_applied() else []:
            live.advance(self.base_rate, rate_factor, factor)
        self._stepping = []
        for live in self._live.values():
            for parameter in (*live.masters.values(), *live.module.parameters()):
                parameter.grad = None

    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the weights of all compressors, by module and name; float32 on the CPU."""
        return {name: parked.weights for name, parked in self._all().items()}

    def save(self, folder: Path) -> None:
        """Write weights, moments and step counts beside a checkpoint; nothing where there are no compressors.

        Raises:
            StorageError: the disk is full.
        """
        if parked := self._all():
            write_parked(parked, folder / LEARNED_FILE)

    def load(self, folder: Path, names: Sequence[str]) -> None:
        """Take over what `save` wrote; before anything is live.

        Args:
            folder: The checkpoint.
            names: The compressors it must hold.

        Raises:
            StorageError: the file is missing or cannot be read, or lacks one.
        """
        self._parked = read_parked(folder / LEARNED_FILE) if names else {}
        if sorted(self._parked) != sorted(names):
            raise StorageError(
                f"{folder / LEARNED_FILE} holds {', '.join(sorted(self._parked)) or 'nothing'}; the checkpoint is of a "
                f"state with {', '.join(sorted(names))}"
            )

    def names(self) -> list[str]:
        """Return the names of all compressors, sorted."""
        return sorted({*self._parked, *self._live})

    def _all(self) -> dict[str, Parked]:
        live = {name: _parked(one) for name, one in self._live.items()}
        return dict(sorted({**self._parked, **live}.items()))

    def _woken(self, name: str, module: nn.Module) -> _Live:
        parked = self._parked.pop(name, None) or Parked(
            {key: tensor.clone() for key, tensor in weight_tensors(module).items()}
        )
        refuse_dropout(module, name)
        cast_parameters(module.to(self._device), self._dtype)
        fill(module, parked.weights, name)
        module.requires_grad_(self.trains)
        masters = dict(module.named_parameters())
        if self._dtype != torch.float32:
            masters = {
                key: nn.Parameter(parked.weights[key].to(self._device, torch.float32, copy=True)) for key in masters
            }
        optimizer = None
        if self.trains:
            optimizer = _adamw(module, masters, self._recipe)
            for key, moments in parked.moments.items():
                optimizer.state[masters[key]] = {
                    "step": torch.tensor(float(parked.steps)),
                    **{kind: moments[kind].to(self._device, copy=True) for kind in MOMENTS},
                }
        return _Live(module, masters, optimizer, parked.steps)


def _adamw(module: nn.Module, masters: Mapping[str, nn.Parameter], recipe: PhaseSpec) -> torch.optim.AdamW:
    """AdamW as the engine's (`deepspeed_config`)."""
    without_decay = set(names_without_decay(module))
    groups = [
        {
            "params": [m for name, m in masters.items() if name not in without_decay],
            "weight_decay": recipe.weight_decay,
        },
        {"params": [m for name, m in masters.items() if name in without_decay], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([one for one in groups if one["params"]], lr=0.0, betas=(0.9, 0.999), eps=1e-8)


def _parked(live: _Live) -> Parked:
    """Return what a live compressor is now, on the CPU; it shares memory with it where it can."""
    weights = {**weight_tensors(live.module), **{name: master.detach() for name, master in live.masters.items()}}
    moments = {}
    if live.optimizer is not None:
        states = ((name, live.optimizer.state.get(master)) for name, master in live.masters.items())
        moments = {name: {kind: state[kind].cpu() for kind in MOMENTS} for name, state in states if state}
    return Parked({name: tensor.cpu() for name, tensor in weights.items()}, moments, live.steps)


def _learns(point: Mapping[str, Any]) -> bool:
    return bool(registry.spec_class(registry.COMPRESSORS, point["kind"]).learns)


def _distinct(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found = {json.dumps(point, sort_keys=True): point for point in points}
    return [found[text] for text in sorted(found)]

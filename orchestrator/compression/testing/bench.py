"""The tiny models of one family, built once and used for all methods, and the batches they are tried on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.compression import Attachment, attach
from orchestrator.compression.attach import MODULES_NAME, PointLike
from orchestrator.compression.families import Family, family_of
from orchestrator.compression.testing.reference import Reference, draws
from orchestrator.compression.testing.tiny import Row, TinyFamily
from orchestrator.spec.components import Grid

_ANSWER = 3


@dataclass(frozen=True)
class Batch:
    """Keyword arguments of a forward, and the grids of each row's images."""

    inputs: dict[str, Any]
    units: tuple[tuple[Grid, ...], ...]

    @property
    def rows(self) -> int:
        """Rows."""
        return len(self.units)


@dataclass
class Bench:
    """A family's models.

    Attributes:
        tiny: What the kit knows of the family.
        models: Models by attention implementation, all of the same weights; `plain` is never attached to.
    """

    tiny: TinyFamily
    models: dict[str, nn.Module] = field(default_factory=dict)

    def model(self, attention: str) -> nn.Module:
        """Return the model of an attention implementation, in training mode; `plain` is an eager one."""
        if attention not in self.models:
            with torch.random.fork_rng(devices=[]):
                built = self.tiny.build("eager" if attention == "plain" else attention, 0)
            self.models[attention] = built.train()
            self.models[attention](**self.batch(self.rows(False), "right").inputs)  # installs hooks of its own
        return self.models[attention]

    @property
    def family(self) -> Family:
        """Adapter of the plain model."""
        return family_of(self.model("plain"))

    @property
    def grids(self) -> tuple[Grid, ...]:
        """All grids of more than one token that the family's batches hold."""
        found = dict.fromkeys(grid for grids in self.tiny.units.values() for grid in grids)
        return tuple(grid for grid in found if grid.tokens > 1)

    def rows(self, other: bool) -> list[Row]:
        """Return the rows of two mixed batches: none, one, two and three images of unequal size, a video where there
        is one.
        """
        kinds = [kind for kind in self.tiny.units if kind != "video"]
        first, last = kinds[0], kinds[-1]
        video: list[Row] = [[1, "video", 4]] if "video" in self.tiny.units else []
        if other:
            return [[1, first, last, 4], [6], *video]
        return [[3, first, 7], [9], [2, first, 2, last, first, 5], *video]

    def batch(self, rows: Sequence[Row], padding: str, seed: int = 0, answer: int = _ANSWER) -> Batch:
        """Return a batch of rows."""
        inputs = dict(self.tiny.batch(rows, padding, seed, answer))
        if not answer:
            inputs.pop("labels", None)
        units = tuple(
            tuple(grid for part in row if isinstance(part, str) for grid in self.tiny.units[part]) for row in rows
        )
        return Batch(inputs, units)

    @contextmanager
    def attached(
        self, attention: str, points: Sequence[PointLike], modules: Sequence[PointLike] | None = None
    ) -> Iterator[tuple[nn.Module, Attachment]]:
        """Yield a model with points for the block; learned modules have parameters that do something."""
        model = self.model(attention)
        attachment = attach(model, points) if modules is None else attach(model, points, modules)
        try:
            move_parameters(model)
            yield model, attachment
        finally:
            model.zero_grad()
            model.train()
            attachment.detach()

    def reference(self, attachment: Attachment | None = None) -> Reference:
        """Return the plain computation, with copies of an attachment's learned modules."""
        modules: dict[str, nn.Module] = {}
        created = attachment.model._modules.get(MODULES_NAME) if attachment is not None else None
        if created is not None:
            modules = {name: copy_of(module) for name, module in created.items()}
        return Reference(self.family, modules)


def copy_of(module: nn.Module) -> nn.Module:
    """Return a module with parameters of its own and the same values."""
    import copy

    return copy.deepcopy(module)


def move_parameters(model: nn.Module) -> None:
    """Move learned modules from their first values: some begin as an identity, which would prove little."""
    created = model._modules.get(MODULES_NAME)
    if created is None:
        return
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for _, parameter in sorted(created.named_parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def run(model: nn.Module, attachment: Attachment | None, batch: Batch, **options: Any) -> Any:
    """Return a forward of a batch, drawing what the reference draws."""
    if attachment is not None:
        attachment.set_step(**draws(batch.rows))
    return model(**batch.inputs, **options)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of all parameters by name."""
    model.zero_grad()
    loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def reference_gradients(reference: Reference, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a plain computation, learned modules under their names in an attached model."""
    for module in reference.modules.values():
        module.zero_grad()
    found = gradients(reference.family.model, loss)
    reference.family.model.zero_grad()
    for name, module in reference.modules.items():
        for inner, one in module.named_parameters():
            if one.grad is not None:
                found[f"{MODULES_NAME}.{name}.{inner}"] = one.grad.clone()
    return found

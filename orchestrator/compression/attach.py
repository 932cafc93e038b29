"""`attach`: visual-token compression in an unmodified Hugging Face model, switched per stage and taken off again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import Tensor, nn

from orchestrator.compression.decoder import Decoder
from orchestrator.compression.families import Family, family_of
from orchestrator.compression.modules import MODULES_NAME, check_modules, create_modules, names_of
from orchestrator.compression.patching import announce, patch_forward, patch_generate, refuse_patched, restore
from orchestrator.compression.points import check_together, resolve_points
from orchestrator.compression.protocol import Point
from orchestrator.compression.segments import Draw
from orchestrator.compression.top import forward_top
from orchestrator.errors import UsageError
from orchestrator.spec.components import CompressorSpec

PointLike = CompressorSpec | Mapping[str, Any]
ALL_LEARNED_POINTS: Final = "all learned points"


def attach(
    model: nn.Module,
    points: Sequence[PointLike],
    modules: Sequence[PointLike] | str = ALL_LEARNED_POINTS,
    seed: int = 0,
) -> Attachment:
    """Puts compressors into a vision-language model, in place.

    Args:
        model: A Hugging Face image-text-to-text model, plain or wrapped by peft, DeepSpeed or DDP.
        points: Compressors, as specs or mappings; an empty list runs full tokens.
        modules: Points whose learned modules are created now, since `switch` cannot add parameters; by default those
            of `points`. Name all stages' points where later ones learn.
        seed: Seed of learned modules; their parameters depend on it and on their names alone.

    Raises:
        UsageError: the model cannot be served, is attached already, or a point does not fit it.
    """
    inner = unwrap(model)
    family = family_of(inner)
    refuse_patched(inner)
    refuse_patched(family.language_model)
    resolved = resolve_points(points, family)
    check_together(resolved)
    learned = resolved if isinstance(modules, str) else resolve_points(modules, family)
    return Attachment(family, resolved, learned, seed)


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment a model carries, None where it has none."""
    found = getattr(unwrap(model).__dict__.get("forward"), "llavolta", None)
    return found if isinstance(found, Attachment) else None


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside peft, DeepSpeed, DDP or compile wrappers."""
    while True:
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
            continue
        if hasattr(model, "config") and hasattr(model, "get_output_embeddings") and "module" not in model._modules:
            return model
        inside = model._modules.get("module") or model._modules.get("_orig_mod")
        if inside is None:
            return model
        model = inside


class Attachment:
    """Compressors in a model; made by `attach`.

    Attributes:
        model: The unwrapped model.
        visual_tokens_per_layer: Visual tokens that ran in each decoder layer in the last forward, summed over rows.
    """

    def __init__(self, family: Family, points: tuple[Point, ...], learned: tuple[Point, ...], seed: int = 0) -> None:
        self.model = family.model
        self.visual_tokens_per_layer: tuple[int, ...] = ()
        self._decoder = Decoder(family, points)
        created = create_modules(learned, family, seed)
        check_modules(points, created)
        if len(created):
            family.model.add_module(MODULES_NAME, created)
            self._decoder.modules = created
        patch_forward(family.model, self._top_forward, self)
        patch_forward(family.language_model, self._decoder.forward, self)
        patch_generate(family.model, self._decoder)
        family.enter()
        announce(family.model, points)

    @property
    def points(self) -> tuple[Point, ...]:
        """The present points, in the order of layers."""
        return self._decoder.points

    @property
    def last_visual_layer_tokens(self) -> int:
        """Visual tokens summed over decoder layers and rows, as they ran in the last forward."""
        return sum(self.visual_tokens_per_layer)

    @property
    def learned_modules(self) -> dict[str, nn.Module]:
        """All learned modules by name, those that the present points do not use included."""
        return dict(self._decoder.modules.items()) if self._decoder.modules is not None else {}

    def learned_names(self, points: Sequence[PointLike] | None = None) -> tuple[str, ...]:
        """Names of the learned modules that points (by default the present ones) use."""
        return names_of(self.points if points is None else resolve_points(points, self._decoder.family))

    def visual_BN(self, input_ids_BN: Tensor) -> Tensor:
        """True at the placeholders of visual tokens (images, frames, tiles)."""
        return self._decoder.family.visual_BN(input_ids_BN)

    def switch(self, points: Sequence[PointLike]) -> None:
        """Other points from the next forward on; an empty list runs full tokens.

        Raises:
            UsageError: a point does not fit, or needs a learned module that `attach` was not told of.
        """
        self._require_attached()
        resolved = resolve_points(points, self._decoder.family)
        check_together(resolved)
        check_modules(resolved, self._decoder.modules)
        self._decoder.points = resolved
        announce(self.model, resolved)

    def set_step(self, step: int = 0, seed: int = 0, sample_index: Sequence[int] | Tensor = ()) -> None:
        """What random methods draw from: the optimizer step, the phase's seed, the sample of each row."""
        rows = sample_index.tolist() if isinstance(sample_index, Tensor) else sample_index
        self._decoder.draw = Draw(seed, step, tuple(int(row) for row in rows))

    def detach(self) -> None:
        """Takes everything out again; the model is as it was. Safe to call twice.

        Raises:
            UsageError: something wrapped the model's forward after `attach`.
        """
        family = self._decoder.family
        restore((family.model, family.language_model))
        family.model._modules.pop(MODULES_NAME, None)
        family.leave()
        self._decoder.modules = None

    def _require_attached(self) -> None:
        if "forward" not in self.model.__dict__:
            raise UsageError("switch: this attachment was detached; attach again")

    def _top_forward(self, inputs: dict[str, Any]) -> Any:
        output, self.visual_tokens_per_layer = forward_top(self._decoder, inputs)
        return output

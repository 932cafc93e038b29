"""`attach`: visual-token compression in an unmodified Hugging Face model, switched per stage and taken off again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from orchestrator.compression.caches import record_of
from orchestrator.compression.decoder import Decoder
from orchestrator.compression.entry import Pass
from orchestrator.compression.families import Family, family_of
from orchestrator.compression.head import Head
from orchestrator.compression.modules import MODULES_NAME, check_modules, create_modules, names_of
from orchestrator.compression.points import resolve_points
from orchestrator.compression.projector import AtProjector, expand_images
from orchestrator.compression.protocol import Point
from orchestrator.compression.segments import Draw
from orchestrator.compression.tower import watched_tower
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
    _refuse_patched(inner)
    _refuse_patched(family.language_model)
    resolved = resolve_points(points, family)
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


def _refuse_patched(module: nn.Module) -> None:
    patched = module.__dict__.get("forward")
    if patched is None:
        return
    if getattr(patched, "llavolta", False):
        raise UsageError("attach: this model is attached already; use switch() of its attachment, or detach() first")
    raise UsageError(
        f"attach: the forward of {type(module).__name__} was replaced by something else (accelerate's device map or "
        "mixed precision?); attach first, or load the model without it"
    )


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
        self._patch(family.model, self._top_forward)
        self._patch(family.language_model, self._language_forward)
        self._patch_generate(family.model)
        family.enter()
        self._announce()

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
        check_modules(resolved, self._decoder.modules)
        self._decoder.points = resolved
        self._announce()

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
        patched = [module for module in (family.model, family.language_model) if "forward" in module.__dict__]
        for module in patched:
            if not getattr(module.__dict__["forward"], "llavolta", False):
                raise UsageError(f"detach: the forward of {type(module).__name__} was wrapped since; unwrap it first")
        for module in patched:
            del module.__dict__["forward"]
        for name in ("generate", "_expand_inputs_for_generation"):
            family.model.__dict__.pop(name, None)
        family.model._modules.pop(MODULES_NAME, None)
        family.leave()
        self._decoder.modules = None

    def _require_attached(self) -> None:
        if "forward" not in self.model.__dict__:
            raise UsageError("switch: this attachment was detached; attach again")

    def _patch(self, module: nn.Module, forward: Any) -> None:
        original = type(module).forward

        @functools.wraps(original)  # generate() reads the signature
        def patched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return forward(_named(original, self, args, kwargs))

        patched.llavolta = self  # type: ignore[attr-defined]
        # nn.Module.__setattr__ would put a bound method here too; the instance dict is what detach() clears.
        module.__dict__["forward"] = MethodType(patched, module)

    def _patch_generate(self, model: nn.Module) -> None:
        """Notes the prompt's length while `generate` runs: what asks stays the same while tokens are added."""
        original = getattr(type(model), "generate", None)
        if original is None:
            return
        decoder = self._decoder

        @functools.wraps(original)
        def patched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            named = _named(original, self, args, kwargs)
            prompts = [named[name] for name in ("input_ids", "inputs") if isinstance(named.get(name), Tensor)]
            before, decoder.prompt_columns = decoder.prompt_columns, prompts[0].shape[1] if prompts else None
            try:
                return original(self, *args, **kwargs)
            finally:
                decoder.prompt_columns = before

        model.__dict__["generate"] = MethodType(patched, model)

        expand = getattr(type(model), "_expand_inputs_for_generation", None)
        if expand is None:
            return

        @functools.wraps(expand)
        def expanded(self: nn.Module, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
            ids = kwargs.get("input_ids")
            if expand_size == 1 or ids is None or not _encodes_in_forward(decoder.points):
                return expand(self, expand_size, *args, **kwargs)
            images = expand_images(decoder.family, ids, expand_size, kwargs)
            ids, rest = expand(self, expand_size, *args, **{k: v for k, v in kwargs.items() if k not in images})
            return ids, {**rest, **images}

        model.__dict__["_expand_inputs_for_generation"] = MethodType(expanded, model)

    def _announce(self) -> None:
        """While a point looks at how images are encoded, `generate` must leave that to forward, not do it before."""
        forward = self.model.__dict__["forward"].__func__
        forward.__dict__.pop("__signature__", None)
        if _encodes_in_forward(self.points):
            signature = inspect.signature(forward)
            kept = [one for name, one in signature.parameters.items() if name != "mm_encoder_outputs"]
            forward.__signature__ = signature.replace(parameters=kept)

    def _language_forward(self, arguments: dict[str, Any]) -> Any:
        return self._decoder.forward(arguments)

    def _top_forward(self, inputs: dict[str, Any]) -> Any:
        labels = inputs.pop("labels", None)
        return_logits = inputs.pop("return_logits", False)
        label_logits = inputs.pop("label_logits", False)
        shifted = inputs.get("shift_labels")
        has_labels = labels is not None or shifted is not None
        current = Pass(inputs, labels)
        self._decoder.current = current
        idle = self._idle_images() if has_labels and self._lacks_images(inputs) else None
        current.idle = idle is not None
        record = record_of(inputs.get("past_key_values"))
        points = record.points if record else self.points
        at_projector = AtProjector(self._decoder, current, [point for point in points if point.at_projector])
        try:
            with watched_tower(self._decoder.family, points) as current.tower, at_projector:
                if not has_labels and not self.points:
                    output = type(self.model).forward(self.model, **inputs)
                else:
                    output = self._with_head(current, return_logits, label_logits)
        finally:
            self._decoder.current = None
            if idle is not None:
                idle.remove()
        self._count(current)
        return output

    def _with_head(self, current: Pass, return_logits: bool, label_logits: bool) -> Any:
        """The top model's own forward with our head in the place of its own.

        With `label_logits` and labels the output's logits are those of the L tokens that predict a label, row by row:
        L x vocabulary, L and its order the same under all points.
        """
        return_logits = return_logits and not label_logits
        inputs = dict(current.inputs)
        shifted = inputs.pop("shift_labels", None)
        if shifted is not None and current.labels_BN is None:
            current.labels_BN = nn.functional.pad(shifted, (1, 0), value=-100)[:, :-1]
        num_items = inputs.pop("num_items_in_batch", None)
        keep = inputs.pop("logits_to_keep", 0)
        return_dict = inputs.pop("return_dict", None)
        if current.labels_BN is not None and inputs.get("use_cache") is None:
            inputs["use_cache"] = False
        source = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        family = self._decoder.family
        head = Head(getattr(self.model, family.head_name), current, source.shape[1], shifted, keep, return_logits)
        view = object.__new__(type(self.model))
        view.__dict__.update(self.model.__dict__)
        view.__dict__["_modules"] = {**self.model._modules, family.head_name: head}
        output = type(self.model).forward(view, **inputs, return_dict=True)
        values = dict(output.items())
        if current.labels_BN is not None:
            values["loss"] = head.loss(values["logits"], num_items)
        if current.labels_BN is not None and not return_logits:
            if not label_logits:
                del values["logits"]
        else:
            values["logits"] = head.at_original_length(values["logits"])
        output = type(output)(**values)
        if return_dict is None:
            return_dict = getattr(self.model.config, "return_dict", True)
        return output if return_dict else output.to_tuple()

    def _lacks_images(self, inputs: dict[str, Any]) -> bool:
        """A training rank whose batch has no image must still call the tower: others do, and wait for it."""
        # One rank alone does it too: parameters without a gradient would move differently than among several, and
        # ZeRO-3 would take their gradient of the step before.
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (self.model.training and distributed):
            return False
        return self._decoder.family.num_visual_tokens(inputs) == 0

    def _idle_images(self) -> RemovableHandle:
        """Runs the vision tower on an empty image, without effect on the numbers.

        A hook in front of all others of the language model, so that modules are called in the order of a batch with
        images (token embedding, tower, projector, decoder): ZeRO-3 gathers parameters in that order on every rank.
        """
        family = self._decoder.family

        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            embeds_BND = kwargs["inputs_embeds"]
            kwargs["inputs_embeds"] = embeds_BND + 0.0 * family.idle_features().sum().to(embeds_BND)
            return args, kwargs

        handle: RemovableHandle = family.language_model.register_forward_pre_hook(add, prepend=True, with_kwargs=True)
        return handle

    def _count(self, current: Pass) -> None:
        family = self._decoder.family
        if current.visual_tokens_per_layer:
            self.visual_tokens_per_layer = current.visual_tokens_per_layer
        else:
            self.visual_tokens_per_layer = (family.num_visual_tokens(current.inputs),) * family.num_layers


def _encodes_in_forward(points: Sequence[Point]) -> bool:
    return any(point.at_projector or "cls" in point.spec.needs for point in points)


def _named(function: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional arguments by their names."""
    if not args:
        return kwargs
    names = list(inspect.signature(function).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}

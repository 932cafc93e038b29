"""`attach`: visual-token compression in an unmodified Hugging Face model, switched per stage and taken off again."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any, Final

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from orchestrator import registry
from orchestrator.compression.attention.recorder import attention_module
from orchestrator.compression.attention.stats import turning
from orchestrator.compression.families import Family, family_of
from orchestrator.compression.features import SharedFeatures
from orchestrator.compression.forward.decoder import Decoder
from orchestrator.compression.forward.model import forward_top
from orchestrator.compression.forward.projector import expand_images
from orchestrator.compression.forward.queries import has_attention, shows_queries
from orchestrator.compression.forward.segments import Draw
from orchestrator.compression.masks import check_layer_kinds
from orchestrator.compression.protocol import Learns, Point
from orchestrator.errors import UsageError
from orchestrator.spec.base import validation_text
from orchestrator.spec.components import PLACES, CompressorSpec, cannot_follow, text_only_problem
from orchestrator.spec.components import Compressor as CompressorField

PointLike = CompressorSpec | Mapping[str, Any]
ALL_LEARNED_POINTS: Final = "all learned points"


def attach(
    model: nn.Module,
    points: Sequence[PointLike],
    modules: Sequence[PointLike] | str = ALL_LEARNED_POINTS,
    seed: int = 0,
) -> Attachment:
    """Put compressors into a vision-language model, in place.

    Args:
        model: A Hugging Face image-text-to-text model, plain or wrapped by peft, DeepSpeed or DDP.
        points: Compressors, as specs or mappings; an empty list runs full tokens.
        modules: Points whose learned modules are created now, since `switch` cannot add parameters; by default those
            of `points`. Name all stages' points where later ones learn.
        seed: Seed of learned modules; their parameters depend on it and on their names alone.

    Raises:
        UsageError: the model cannot be served, is attached already, or a point does not fit it.
    """
    family = family_of(unwrap(model))
    if not family.proven:  # loaded by name: the kit it is part of attaches models itself
        registry.load_object("orchestrator.compression.testing.self_check:check_family")(family)
    return attach_family(family, points, modules, seed)


def attach_family(
    family: Family,
    points: Sequence[PointLike],
    modules: Sequence[PointLike] | str = ALL_LEARNED_POINTS,
    seed: int = 0,
) -> Attachment:
    """Do what `attach` does with a model's adapter, without a self-check."""
    refuse_patched(family.model)
    refuse_patched(family.language_model)
    resolved = resolve_points(points, family)
    check_together(resolved)
    learned = resolved if isinstance(modules, str) else resolve_points(modules, family)
    return Attachment(family, resolved, learned, seed)


def attachment_of(model: nn.Module) -> Attachment | None:
    """Return the attachment a model carries, None where it has none."""
    found = getattr(unwrap(model).__dict__.get("forward"), "llavolta", None)
    return found if isinstance(found, Attachment) else None


def unwrap(model: nn.Module) -> nn.Module:
    """Return the Hugging Face model inside peft, DeepSpeed, DDP or compile wrappers."""
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
        trims_last_layer: In a forward with labels the last decoder layer computes queries, attention output and MLP
            only for the tokens whose logits a label needs.
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
        announce(family, points)
        self.trims_last_layer = self._decoder.trims  # shown now, not inside a training step

    @property
    def points(self) -> tuple[Point, ...]:
        """The present points, in the order of layers."""
        return self._decoder.points

    @property
    def zero3_refusal(self) -> str:
        """Why several workers under ZeRO-3 would wait for one another; empty where all call the same modules."""
        return self._decoder.family.zero3_refusal

    @property
    def last_visual_layer_tokens(self) -> int:
        """Visual tokens summed over decoder layers and rows, as they ran in the last forward."""
        return sum(self.visual_tokens_per_layer)

    @property
    def learned_modules(self) -> dict[str, nn.Module]:
        """All learned modules by name, those that the present points do not use included."""
        return dict(self._decoder.modules.items()) if self._decoder.modules is not None else {}

    def learned_names(self, points: Sequence[PointLike] | None = None) -> tuple[str, ...]:
        """Return the names of the learned modules that points (by default the present ones) use."""
        used = self.points if points is None else resolve_points(points, self._decoder.family)
        return tuple(dict.fromkeys(point.module_name for point in used if point.module_name is not None))

    def visual_BN(self, input_ids_BN: Tensor) -> Tensor:
        """Return True at the placeholders of visual tokens (images, frames, tiles)."""
        return self._decoder.family.visual_BN(input_ids_BN)

    def switch(self, points: Sequence[PointLike]) -> None:
        """Other points from the next forward on; an empty list runs full tokens.

        Raises:
            UsageError: a point does not fit, or needs a learned module that `attach` did not create.
        """
        if "forward" not in self.model.__dict__:
            raise UsageError("switch: this attachment was detached; attach again")
        resolved = resolve_points(points, self._decoder.family)
        check_together(resolved)
        check_modules(resolved, self._decoder.modules)
        self._decoder.points = resolved
        announce(self._decoder.family, resolved)

    def set_step(self, step: int = 0, seed: int = 0, sample_index: Sequence[int] | Tensor = ()) -> None:
        """Set what random methods draw from: the optimizer step, the phase's seed, the sample of each row."""
        rows = sample_index.tolist() if isinstance(sample_index, Tensor) else sample_index
        self._decoder.draw = Draw(seed, step, tuple(int(row) for row in rows), self._decoder.draw.fill)

    @contextmanager
    def largest(self) -> Iterator[None]:
        """Let adaptive methods leave the most they may within the block, so that memory is measured at its largest.

        They repeat tokens, so the numbers mean nothing.
        """
        self._decoder.draw = replace(self._decoder.draw, fill=True)
        try:
            yield
        finally:
            self._decoder.draw = replace(self._decoder.draw, fill=False)

    @contextmanager
    def sharing(self, features: SharedFeatures | None) -> Iterator[None]:
        """Let the model find features of images that it computed before, where no point acts on how images are encoded
        or watches it, and its family is proven; else nothing is shared.

        Args:
            features: What it computed before, of the very same weights; None shares nothing.
        """
        family = self._decoder.family
        inner = getattr(family, "inner", None)
        changed = any(
            point.before_decoder or point.spec.across_frames or {"cls", "pixels"} & set(point.spec.needs)
            for point in self.points
        )
        if features is None or inner is None or not family.proven or changed:
            yield
            return
        with features.of(inner):
            yield

    def detach(self) -> None:
        """Take everything out again; the model is as it was. Safe to call twice.

        Raises:
            UsageError: something wrapped the model's forward after `attach`.
        """
        family = self._decoder.family
        restore((family.model, family.language_model))
        family.model._modules.pop(MODULES_NAME, None)
        family.leave()
        self._decoder.modules = None

    def _top_forward(self, inputs: dict[str, Any]) -> Any:
        output, self.visual_tokens_per_layer = forward_top(self._decoder, inputs)
        return output


_ADAPTER: TypeAdapter[CompressorSpec] = TypeAdapter(CompressorField)


def resolve_points(points: Sequence[CompressorSpec | Mapping[str, Any]], family: Family) -> tuple[Point, ...]:
    """Return the validated points in the order of layers; several at one layer keep the order given.

    Raises:
        UsageError: a mapping is no compressor, or a point does not fit the model.
    """
    if isinstance(points, Mapping | CompressorSpec | str):
        raise UsageError("attach: points is a list of compressors (one or several), or an empty list for full tokens")
    return tuple(sorted((_resolve(spec, family) for spec in points), key=_order))


def check_together(points: Sequence[Point]) -> None:
    """Refuse points that cannot act in one forward; those of several stages may well be alike.

    Raises:
        UsageError: two of them resize the image or have one learned module, one acts on tokens that another adds, or
            where another keeps the image out.
    """
    if problem := text_only_problem([point.spec for point in points], [point.layer for point in points]):
        raise UsageError(f"attach: {problem[1]}")
    for number, point in enumerate(points):
        if unfit := cannot_follow(point.spec, [one.spec for one in points[:number]]):
            raise UsageError(f"attach: {point.spec.kind} at {point.place}: {unfit[1]}")
        if not hasattr(point.compressor, "enter"):
            continue
        if not hasattr(point.compressor, "compress") and number + 1 < len(points):
            raise UsageError(
                f"attach: {point.spec.kind} adds tokens for good, which {points[number + 1].spec.kind} after it would "
                "mix or drop; let it be the last point"
            )
        if hasattr(point.compressor, "compress") and number:
            raise UsageError(
                f"attach: {point.spec.kind} adds tokens at the decoder's input, which the points before it would mix "
                "or drop; let it be the first point"
            )
    inside = [point for point in points if point.tower_layer is not None]
    if len({point.tower_layer for point in inside}) < len(inside):
        raise UsageError("attach: one point acts before a layer of the vision tower, not several")
    learned = [point.module_name for point in points if point.module_name]
    if twice := sorted({name for name in learned if learned.count(name) > 1}):
        raise UsageError(
            f"attach: two points would share the learned module {twice[0]}; ZeRO-3 gathers a module once a forward, so "
            "act at different layers, or give the methods different shapes"
        )


def _order(point: Point) -> tuple[int, bool, int, int]:
    """Pixels first, then the tower's layers, features before the projector, the decoder's input and its layers."""
    resizes = hasattr(point.compressor, "resize")
    return point.layer, not resizes, PLACES.index(point.spec.place), point.tower_layer or 0


def _resolve(value: CompressorSpec | Mapping[str, Any], family: Family) -> Point:
    spec = value if isinstance(value, CompressorSpec) else _validate(value)
    if spec.layer_average_tokens is not None:
        raise UsageError(f"attach: {spec.kind}: layer_average_tokens is solved by the planner; give keep_tokens here")
    layer = spec.layer_index(family.num_layers)
    _check_place(spec, layer, family)
    implementation = registry.load_object(spec.implementation)
    if hasattr(implementation, "create_module") != spec.learns:
        raise UsageError(
            f"attach: {spec.kind}: a method that learns has `learns = True` in its spec and `create_module` in its "
            "implementation; this one has one of them only"
        )
    if hasattr(implementation, "enter"):
        _check_entry(spec, layer, family, stays=not hasattr(implementation, "compress"))
    if spec.across_frames and not family.knows_videos:
        raise UsageError(
            f"attach: {spec.kind} acts across the frames of a video, and {type(family.model).__name__} does not tell "
            "which frames are of one video"
        )
    at_projector = spec.layer == "projector" and family.projector is not None
    if hasattr(implementation, "resize") and (family.resizable_tower is None or not at_projector):
        raise UsageError(
            f"attach: {spec.kind}: the vision tower of {type(family.model).__name__} cannot take images of another "
            "size (it must interpolate its position embeddings and give one token a patch)"
        )
    tower_layers = family.tower.depth if spec.place == "tower" else 0
    name = spec.module_name(family.num_layers, tower_layers)
    tower_layer, inside = spec.tower_index(tower_layers), getattr(spec, "inside_layer", False)
    return Point(layer, spec, implementation(spec), name, at_projector, tower_layer=tower_layer, inside_layer=inside)


def _check_place(spec: CompressorSpec, layer: int, family: Family) -> None:
    if spec.place not in spec.points:
        places = {"decoder": "a decoder layer", "projector": "layer: projector", "tower": "layer: tower:N"}
        allowed = " or ".join(text for place, text in places.items() if place in spec.points)
        raise UsageError(f"attach: {spec.kind} cannot act at layer {spec.layer}; give {allowed}")
    if spec.place == "tower":
        _check_tower(spec, family)
    if layer >= family.num_layers:
        raise UsageError(
            f"attach: {spec.kind}: layer {spec.layer} does not exist; this model has layers 0 to "
            f"{family.num_layers - 1}"
        )
    if layer < family.first_layer:
        raise UsageError(
            f"attach: {spec.kind}: layer {spec.layer} is too early; {type(family.model).__name__} adds visual features "
            f"up to layer {family.first_layer - 1} (DeepStack), so give a layer from {family.first_layer} on"
        )
    if spec.enters_late and family.first_layer > 0:
        raise UsageError(
            f"attach: {spec.kind} keeps images out of the first layers, but {type(family.model).__name__} adds visual "
            f"features up to layer {family.first_layer - 1} (DeepStack), which must find the tokens it knows"
        )
    if layer == 0 and {"queries", "keys"} & set(spec.needs):
        raise UsageError(
            f"attach: {spec.kind} at layer {spec.layer}: it looks at what decoder layer K-1 saw, and none has run "
            "there; give it layer 1 or more"
        )
    if getattr(spec, "size_bias", False):
        check_layer_kinds(family.language_model.config, f"attach: {spec.kind} with size_bias")
    if {"queries", "keys"} & set(spec.needs):
        attention = attention_module(
            family.language_model.layers[layer - 1], f"attach: {spec.kind} at layer {spec.layer}"
        )
        if "keys" in spec.needs:
            turning(attention)
    if spec.keys_only:
        others = {type(one).__name__ for one in family.language_model.layers[layer:] if not has_attention(one)}
        if others:
            raise UsageError(
                f"attach: {spec.kind} with keys_only: of the layers from {layer} on some ({', '.join(sorted(others))}) "
                "make no keys and values (linear attention, convolutions); drop keys_only"
            )
        if not shows_queries(family):
            raise UsageError(
                f"attach: {spec.kind} with keys_only: a {type(family.language_model.layers[-1]).__name__} run for some "
                "tokens does not give them what it gives them among all; drop keys_only"
            )
    if "cls" in spec.needs and family.cls_attention() is None:
        raise UsageError(
            f"attach: {spec.kind} needs the attention of the vision tower's CLS token, and this model's tower has none "
            "that is used; use a method without this need"
        )


def _check_tower(spec: CompressorSpec, family: Family) -> None:
    tower = family.tower
    layer = spec.tower_index(tower.depth) or 0
    if layer >= tower.limit:
        raise UsageError(
            f"attach: {spec.kind}: {spec.layer} is layer {layer} of {tower.depth} of the vision tower, and the model "
            f"takes what layer {tower.limit - 1} gives; give tower:0 to tower:{tower.limit - 1}"
        )
    inside = getattr(spec, "inside_layer", False)
    if layer == 0 and "tower_keys" in spec.needs and not inside:
        raise UsageError(
            f"attach: {spec.kind} at layer {spec.layer}: it looks at the keys of the tower layer before it, and none "
            "has run there; give tower:1 or more"
        )
    if "tower_keys" in spec.needs:
        seen = tower.encoder.layers[layer if inside else layer - 1]
        attention_module(seen, f"attach: {spec.kind} at layer {spec.layer}")
    if spec.adaptive:
        raise UsageError(
            f"attach: {spec.kind} leaves another number of tokens of each image, which run through the vision tower in "
            "one batch; give projector or a decoder layer"
        )
    attention = tower.encoder.config._attn_implementation
    if getattr(spec, "size_bias", False) and attention not in ("eager", "sdpa"):
        raise UsageError(
            f"attach: {spec.kind} with size_bias adds to the attention logits of the vision tower, which "
            f"attn_implementation {attention!r} does not allow; use eager or sdpa, or size_bias: false"
        )


def _check_entry(spec: CompressorSpec, layer: int, family: Family, stays: bool) -> None:
    if stays and layer:
        raise UsageError(f"attach: {spec.kind}: layer {spec.layer} is {layer}; its tokens enter and stay, give layer 0")
    if layer == 0 and not stays:
        raise UsageError(f"attach: {spec.kind}: layer {spec.layer} is 0; its tokens enter there, give layer 1 or more")
    if family.first_layer > 0:
        raise UsageError(
            f"attach: {spec.kind} adds tokens at the decoder's input, but {type(family.model).__name__} adds visual "
            f"features up to layer {family.first_layer - 1} (DeepStack), which must find the tokens it knows"
        )


def _validate(value: Mapping[str, Any]) -> CompressorSpec:
    try:
        return _ADAPTER.validate_python(dict(value))
    except ValidationError as error:
        raise UsageError(f"attach: {dict(value)!r} is no compressor: {validation_text(error)}") from error


MODULES_NAME: Final = "llavolta_compressors"


def create_modules(points: Sequence[Point], family: Family, seed: int) -> nn.ModuleDict:
    """Return the learned modules of points, with parameters that depend on (seed, name) alone.

    They have the dtype of the decoder and stand on the device of what they act beside. No global random state is
    used or changed.

    Args:
        points: Points of which some learn.
        family: The model's adapter.
        seed: Seed of all modules.
    """
    created = nn.ModuleDict()
    for point in points:
        if point.module_name is None or point.module_name in created:
            continue
        beside: Any = family.projector if point.at_projector else family.language_model
        width = family.vision_width if point.at_projector else family.width
        if point.tower_layer is not None:
            beside, width = family.tower.encoder, family.tower.width
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(_number(seed, point.module_name))
            assert isinstance(point.compressor, Learns) and width is not None
            module: Any = point.compressor.create_module(width)
        module.to(next(beside.parameters()).device, family.language_model.dtype).train(family.model.training)
        # ZeRO-3 gathers it as a whole, in the one call that `apply_point.call_once` makes of it.
        module._z3_leaf = True
        created[point.module_name] = module
    return created


def check_modules(points: Sequence[Point], modules: nn.ModuleDict | None) -> None:
    """Refuse points whose learned module was not created.

    Raises:
        UsageError: one is missing; `switch` cannot add parameters.
    """
    known = set(modules) if modules is not None else set()
    for point in points:
        if point.module_name is not None and point.module_name not in known:
            raise UsageError(
                f"{point.spec.kind} at {point.place} learns, and its module {point.module_name} does not exist; name "
                "the point in attach(..., modules=[...])"
            )


def _number(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{MODULES_NAME}:{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


_GENERATION = ("generate", "_expand_inputs_for_generation")


def refuse_patched(module: nn.Module) -> None:
    """Refuse a model that something has replaced the forward of.

    Raises:
        UsageError: it is attached already, or was wrapped by something else.
    """
    patched = module.__dict__.get("forward")
    if patched is None:
        return
    if getattr(patched, "llavolta", False):
        raise UsageError("attach: this model is attached already; use switch() of its attachment, or detach() first")
    raise UsageError(
        f"attach: the forward of {type(module).__name__} was replaced by something else (accelerate's device map or "
        "mixed precision?); attach first, or load the model without it"
    )


def patch_forward(module: nn.Module, forward: Callable[[dict[str, Any]], Any], owner: Any) -> None:
    """Put `forward`, which takes all arguments by name, in the place of a module's own.

    Args:
        module: The module.
        forward: What runs instead.
        owner: Whose it is, found again as `module.forward.llavolta`.
    """
    original = type(module).forward

    @functools.wraps(original)  # generate() reads the signature
    def patched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(_named(original, self, args, kwargs))

    patched.__dict__["llavolta"] = owner
    # nn.Module.__setattr__ would put a bound method here too; the instance dict is what `restore` clears.
    module.__dict__["forward"] = MethodType(patched, module)


def patch_generate(model: nn.Module, decoder: Decoder) -> None:
    """Note the prompt's length while `generate` runs: what asks stays the same while tokens are added."""
    original = getattr(type(model), "generate", None)
    if original is None:
        return

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
    if (expand := getattr(type(model), "_expand_inputs_for_generation", None)) is not None:
        _patch_expansion(model, decoder, expand)


def _patch_expansion(model: nn.Module, decoder: Decoder, expand: Callable[..., Any]) -> None:
    """Repeat the images of a row, not rows of pixels, where `generate` leaves encoding them to forward."""

    @functools.wraps(expand)
    def expanded(self: nn.Module, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        if expand_size == 1 or ids is None or not _encodes_in_forward(decoder.family, decoder.points):
            return expand(self, expand_size, *args, **kwargs)
        if across := [point.spec.kind for point in decoder.points if point.spec.across_frames]:
            raise UsageError(
                f"generate: {across[0]} acts across frames, and videos cannot be repeated; give num_beams=1"
            )
        if not decoder.family.proven:
            raise decoder.family.cannot_serve("several beams or answers at once need an adapter of its own")
        images = expand_images(decoder.family, ids, expand_size, kwargs)
        ids, rest = expand(self, expand_size, *args, **{k: v for k, v in kwargs.items() if k not in images})
        return ids, {**rest, **images}

    model.__dict__["_expand_inputs_for_generation"] = MethodType(expanded, model)


def announce(family: Family, points: Sequence[Point]) -> None:
    """While a point looks at how images are encoded, `generate` must leave that to forward, not do it before."""
    forward = family.model.__dict__["forward"].__func__
    forward.__dict__.pop("__signature__", None)
    if _encodes_in_forward(family, points):
        signature = inspect.signature(forward)
        kept = [one for name, one in signature.parameters.items() if name != "mm_encoder_outputs"]
        forward.__signature__ = signature.replace(parameters=kept)


def restore(modules: Sequence[nn.Module]) -> None:
    """Take all replaced methods off again; safe to call twice.

    Raises:
        UsageError: something wrapped a forward since.
    """
    patched = [module for module in modules if "forward" in module.__dict__]
    for module in patched:
        if not getattr(module.__dict__["forward"], "llavolta", False):
            raise UsageError(f"detach: the forward of {type(module).__name__} was wrapped since; unwrap it first")
    for module in patched:
        del module.__dict__["forward"]
    for module in modules:
        for name in _GENERATION:
            module.__dict__.pop(name, None)


def _encodes_in_forward(family: Family, points: Sequence[Point]) -> bool:
    if points and family.encodes_in_forward:
        return True
    return any(point.before_decoder or point.spec.across_frames or "cls" in point.spec.needs for point in points)


def _named(function: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the positional arguments by their names."""
    if not args:
        return kwargs
    names = list(inspect.signature(function).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}

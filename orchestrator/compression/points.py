"""From mappings or specs to points at layers of a given model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from orchestrator import registry
from orchestrator.compression.attention.stats import check_point
from orchestrator.compression.families import Family
from orchestrator.compression.protocol import Point
from orchestrator.errors import UsageError
from orchestrator.spec.components import Compressor as CompressorField
from orchestrator.spec.components import CompressorSpec

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
        UsageError: two of them resize the image or have one learned module, or one that adds tokens is not the first.
    """
    if sum(hasattr(point.compressor, "resize") for point in points) > 1:
        raise UsageError("attach: an image is resized by one point, not by several")
    for point in points[1:]:
        if hasattr(point.compressor, "enter"):
            raise UsageError(
                f"attach: {point.spec.kind} adds tokens at the decoder's input, which the points before it would mix "
                "or drop; let it be the first point"
            )
    learned = [point.module_name for point in points if point.module_name]
    if twice := sorted({name for name in learned if learned.count(name) > 1}):
        raise UsageError(
            f"attach: two points would share the learned module {twice[0]}; ZeRO-3 gathers a module once a forward, so "
            "act at different layers, or give the methods different shapes"
        )


def _order(point: Point) -> tuple[int, bool, bool]:
    """Pixels first, then features before the projector, then the decoder's input and its layers."""
    return point.layer, not hasattr(point.compressor, "resize"), point.spec.layer != "projector"


def _resolve(value: CompressorSpec | Mapping[str, Any], family: Family) -> Point:
    spec = value if isinstance(value, CompressorSpec) else _validate(value)
    if spec.layer_average_tokens is not None:
        raise UsageError(f"attach: {spec.kind}: layer_average_tokens is solved by the planner; give keep_tokens here")
    layer = spec.layer_index(family.num_layers)
    _check_place(spec, layer, family)
    check_point(layer if spec.layer != "projector" else "projector", spec.needs, spec.kind, family.cls_attention())
    implementation = registry.load_object(spec.implementation)
    if hasattr(implementation, "create_module") != spec.learns:
        raise UsageError(
            f"attach: {spec.kind}: a method that learns has `learns = True` in its spec and `create_module` in its "
            "implementation; this one has one of them only"
        )
    if hasattr(implementation, "enter"):
        _check_entry(spec, layer, family)
    at_projector = spec.layer == "projector" and family.projector is not None
    if hasattr(implementation, "resize") and (family.resizable_tower is None or not at_projector):
        raise UsageError(
            f"attach: {spec.kind}: the vision tower of {type(family.model).__name__} cannot take images of another "
            "size (it must interpolate its position embeddings and give one token a patch)"
        )
    return Point(layer, spec, implementation(spec), spec.module_name(family.num_layers), at_projector)


def _check_place(spec: CompressorSpec, layer: int, family: Family) -> None:
    place = "projector" if spec.layer == "projector" else "decoder"
    if place not in spec.points:
        allowed = "layer: projector" if "decoder" not in spec.points else "a decoder layer"
        raise UsageError(f"attach: {spec.kind} cannot act at layer {spec.layer}; give {allowed}")
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


def _check_entry(spec: CompressorSpec, layer: int, family: Family) -> None:
    if layer == 0:
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
        raise UsageError(f"attach: {dict(value)!r} is no compressor: {_reasons(error.errors())}") from error


def _reasons(errors: Sequence[Any]) -> str:
    parts = []
    for fault in errors:
        inner = (fault.get("ctx") or {}).get("errors")
        if inner:
            parts.append(_reasons(inner))
            continue
        where = ".".join(str(step) for step in fault["loc"])
        known = (fault.get("ctx") or {}).get("known")
        text = f"{where}: {fault['msg']}" if where else fault["msg"]
        parts.append(f"{text} (known: {', '.join(known)})" if known else text)
    return "; ".join(parts)

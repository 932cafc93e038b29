"""From mappings or specs to points at layers of a given model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from orchestrator import registry
from orchestrator.compression.families import Family
from orchestrator.compression.protocol import Point
from orchestrator.errors import UsageError
from orchestrator.spec.components import Compressor as CompressorField
from orchestrator.spec.components import CompressorSpec

_ADAPTER: TypeAdapter[CompressorSpec] = TypeAdapter(CompressorField)


def resolve_points(points: Sequence[CompressorSpec | Mapping[str, Any]], family: Family) -> tuple[Point, ...]:
    """Validated points in the order of layers; several at one layer keep the order given.

    Raises:
        UsageError: a mapping is no compressor, or a point does not fit the model.
    """
    if isinstance(points, Mapping | CompressorSpec | str):
        raise UsageError("attach: points is a list of compressors (one or several), or an empty list for full tokens")
    resolved = [_resolve(spec, family) for spec in points]
    return tuple(sorted(resolved, key=lambda point: point.layer))


def _resolve(value: CompressorSpec | Mapping[str, Any], family: Family) -> Point:
    spec = value if isinstance(value, CompressorSpec) else _validate(value)
    if spec.layer == "projector":
        raise UsageError(f"attach: {spec.kind} at the projector cannot be attached yet; give it a decoder layer")
    if spec.layer_average_tokens is not None:
        raise UsageError(f"attach: {spec.kind}: layer_average_tokens is solved by the planner; give keep_tokens here")
    layer = spec.layer_index(family.num_layers)
    if layer >= family.num_layers:
        raise UsageError(
            f"attach: {spec.kind}: layer {spec.layer} does not exist; this model has layers 0 to "
            f"{family.num_layers - 1}"
        )
    implementation = registry.load_object(spec.implementation)
    name = f"{spec.kind}_layer{layer}" if hasattr(implementation, "create_module") else None
    return Point(layer, spec, implementation(spec), name)


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

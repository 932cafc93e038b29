"""`check_compressor`: what every compressor must hold on every model family, for authors inside and outside."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from orchestrator import registry
from orchestrator.compression.testing.bench import Bench
from orchestrator.compression.testing.checks import Cell
from orchestrator.compression.testing.families import TINY
from orchestrator.compression.testing.tiny import TinyFamily
from orchestrator.errors import LlavoltaError, UsageError
from orchestrator.spec.components import Compressor, CompressorSpec, Grid

PROVEN = "proven"
PointOrMapping = CompressorSpec | Mapping[str, Any]
_ADAPTER: TypeAdapter[CompressorSpec] = TypeAdapter(Compressor)
_AMOUNTS: tuple[dict[str, Any], ...] = ({"stride": 2}, {"keep_ratio": "1/2"}, {"keep_tokens": 2}, {"keep_tokens": 1})
_AMOUNT_NAMES = ("stride", "keep_tokens", "keep_ratio")


@dataclass(frozen=True)
class Report:
    """What the contract kit found.

    Attributes:
        families: For each family `proven`, or `refused: ` and why it cannot be served.
    """

    families: Mapping[str, str]

    @property
    def proven(self) -> tuple[str, ...]:
        """Families on which every check held."""
        return tuple(name for name, result in self.families.items() if result == PROVEN)

    @property
    def refused(self) -> dict[str, str]:
        """The reason of each family that the points cannot run on."""
        return {name: result.removeprefix("refused: ") for name, result in self.families.items() if result != PROVEN}

    def __str__(self) -> str:
        return "\n".join(f"{name}: {result}" for name, result in self.families.items())


def check_compressor(
    points: PointOrMapping | Sequence[PointOrMapping], families: Iterable[str] | None = None
) -> Report:
    """Proves a compressor on tiny random models: one line in a plug-in's tests.

    On each family: with all tokens kept the loss is the plain model's to 1e-6 and so are the gradients; loss and
    gradients equal a plain computation, row by row without padding, in mixed batches (text only, one, two and three
    images of unequal size, a video), padded left and right, eager and sdpa, with and without activation checkpointing;
    `generate` with a KV cache equals recomputing everything; without an attention mask the answer sees the image;
    switch and detach leave no trace. The method itself must keep what its spec says, let every image be as it is
    alone, remember nothing, and draw from the context's seed only.

    Args:
        points: A compressor as a mapping or spec, or several of them. Without `layer` the kit tries those a family
            allows (and the projector, where the method acts there); without an amount it chooses one.
        families: Names in `orchestrator.compression.testing.families.TINY`; by default all.

    Raises:
        AssertionError: something does not hold; the message lists the checks with family, setting and numbers. Also
            where every family refuses the points, since nothing is proven then.
        UsageError: the points are no compressor, or a family is not known.

    Example:
        >>> check_compressor({"kind": "average_pool", "stride": 2}, ["llava"])
    """
    chosen = _choose(families)
    results: dict[str, str] = {}
    faults: list[str] = []
    cause: Exception | None = None
    for name in chosen:
        try:
            faults += [f"{name}: {fault}" for fault in check_cell(points, name)]
            results[name] = PROVEN
        except Refused as error:
            results[name] = f"refused: {error}"
        except Stopped as error:
            cause = cause or error
            faults.append(f"{name}: {error}")
    if faults:
        text = f"{len(faults)} checks of the contract kit failed:\n  " + "\n  ".join(faults)
        raise AssertionError(text) from cause
    report = Report(results)
    if not report.proven:
        raise AssertionError(f"no family can run it, so nothing is proven:\n  {report}".replace("\n", "\n  "))
    return report


class Refused(Exception):
    """A family cannot run the points; the message says why."""


class Stopped(Exception):
    """Something raised an error before all checks were done."""


def check_cell(points: PointOrMapping | Sequence[PointOrMapping], family: str) -> list[str]:
    """What does not hold for points on one family, in words.

    Raises:
        Refused: the family cannot run them.
        Stopped: the method, or the model with it, raised an error.
    """
    bench = bench_of(family)
    several: Sequence[PointOrMapping] = [points] if isinstance(points, Mapping | CompressorSpec) else points
    places = _places(several, bench)
    keep_all = _all_kept(several, bench)
    found: list[str] = []
    try:
        for fault in Cell(bench, places, keep_all).faults():
            found.append(fault)
    except Exception as error:
        told = [*found, f"an error stopped the checks: {type(error).__name__}: {error}"]
        raise Stopped(f"\n  {family}: ".join(told)) from error
    return found


@functools.cache
def bench_of(family: str) -> Bench:
    """The models of a family; built once in a process."""
    return Bench(TINY[family])


def _choose(families: Iterable[str] | None) -> tuple[str, ...]:
    chosen = tuple(TINY) if families is None else tuple(families)
    unknown = sorted(set(chosen) - set(TINY))
    if unknown:
        raise UsageError(f"check_compressor: no family {', '.join(unknown)}; known: {', '.join(TINY)}")
    return chosen


def _places(points: Sequence[PointOrMapping], bench: Bench) -> list[list[CompressorSpec]]:
    """The points at every place worth trying that the family allows.

    Raises:
        Refused: there is none.
    """
    layers: list[Any] = [None]
    if len(points) == 1 and isinstance(points[0], Mapping) and "layer" not in points[0]:
        cls = _class_of(points[0])
        layers = [*_decoder_layers(cls, bench.tiny), *(["projector"] if "projector" in cls.points else [])]
    found, reasons = [], []
    for layer in layers:
        try:
            several = _complete(points, layer, bench)
            bench_points(bench, several)
            found.append(several)
        except (LlavoltaError, ValueError) as error:
            reasons.append(str(error))
    if not found:
        raise Refused(reasons[0].removeprefix("attach: "))
    return found


def bench_points(bench: Bench, points: Sequence[CompressorSpec]) -> None:
    """Attaches points and takes them off again, so that a refusal is seen before any check."""
    with bench.attached("plain", points):
        pass


def _decoder_layers(cls: type[CompressorSpec], tiny: TinyFamily) -> list[int]:
    if "decoder" not in cls.points:
        return []
    first = max(tiny.first_layer, 1 if {"queries", "keys"} & set(cls.needs) else 0)
    return list(dict.fromkeys([first, max(first, tiny.layers - 2)]))


def _complete(points: Sequence[PointOrMapping], layer: Any, bench: Bench) -> list[CompressorSpec]:
    """Specs with a layer and an amount.

    Raises:
        ValueError: no amount fits the family's images.
    """
    grids, specs = bench.grids, []
    for point in points:
        spec = _with_amount(point, layer, grids)
        specs.append(spec)
        grids = tuple(spec.kept_grid(grid) for grid in grids)
    return specs


def _with_amount(point: PointOrMapping, layer: Any, grids: Sequence[Grid]) -> CompressorSpec:
    if isinstance(point, CompressorSpec):
        _fits(point, grids)
        return point
    given = dict(point) if layer is None else {**point, "layer": layer}
    choices = ({},) if any(name in given for name in _AMOUNT_NAMES) else _AMOUNTS
    reason: Exception | None = None
    for amount in choices:
        try:
            spec = _validate({**given, **amount})
            _fits(spec, grids)
        except (UsageError, ValueError) as error:
            reason = reason or error
            continue
        return spec
    assert reason is not None
    raise reason


def _fits(spec: CompressorSpec, grids: Iterable[Grid]) -> None:
    for grid in grids:
        spec.kept_tokens(grid)


def _all_kept(points: Sequence[PointOrMapping], bench: Bench) -> list[list[CompressorSpec]]:
    """The points where they keep every token, if the method then keeps them as they are."""
    if len(points) != 1 or not getattr(_class_of(points[0]), "keeps_all", True):
        return []
    point = points[0]
    given = dict(point) if isinstance(point, Mapping) else point.model_dump(exclude_none=True)
    given = {name: value for name, value in given.items() if name not in _AMOUNT_NAMES}
    return _places([{**given, "keep_ratio": 1}], bench)


def _class_of(point: PointOrMapping) -> type[CompressorSpec]:
    if isinstance(point, CompressorSpec):
        return type(point)
    kind = point.get("kind")
    if kind not in registry.kinds(registry.COMPRESSORS):
        raise UsageError(
            f"check_compressor: no compressor of kind {kind!r} is registered; known: "
            f"{', '.join(registry.kinds(registry.COMPRESSORS))}"
        )
    found: type[CompressorSpec] = registry.spec_class(registry.COMPRESSORS, kind)
    return found


def _validate(value: Mapping[str, Any]) -> CompressorSpec:
    try:
        return _ADAPTER.validate_python(dict(value))
    except ValidationError as error:
        faults = [
            "; ".join(str(inner["msg"]) for inner in (fault.get("ctx") or {}).get("errors", [fault]))
            for fault in error.errors()
        ]
        raise UsageError(f"check_compressor: {dict(value)!r} is no compressor: {'; '.join(faults)}") from error

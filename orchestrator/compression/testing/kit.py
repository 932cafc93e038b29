"""`check_compressor`: what every compressor must hold on every model family, for authors inside and outside."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator import registry
from orchestrator.compression.testing.bench import Bench
from orchestrator.compression.testing.checks import Cell
from orchestrator.compression.testing.families import TINY
from orchestrator.compression.testing.tiny import TinyFamily
from orchestrator.errors import UsageError
from orchestrator.spec.components import CompressorSpec, Grid

PROVEN = "proven"
PointLike = CompressorSpec | type[CompressorSpec] | Mapping[str, Any] | Path
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

    @property
    def lines(self) -> tuple[str, ...]:
        """A line a family."""
        return tuple(f"{name}: {result}" for name, result in self.families.items())

    def __str__(self) -> str:
        return "\n".join(self.lines)


def check_compressor(points: PointLike | str | Sequence[PointLike], families: Iterable[str] | None = None) -> Report:
    """Prove a compressor on tiny random models: one line in a plug-in's tests.

    On each family: with all tokens kept the loss is the plain model's to 1e-6 and so are the gradients; loss and
    gradients equal a plain computation, row by row without padding, in mixed batches (text only, one, two and three
    images of unequal size, a video), padded left and right, eager and sdpa, with and without activation checkpointing;
    `generate` with a KV cache equals recomputing everything; without an attention mask the answer sees the image;
    switch and detach leave no trace. The method itself must keep what its spec says, let every image be as it is
    alone, remember nothing, and draw from the context's seed only.

    Args:
        points: A compressor as a mapping with a `kind`, a spec, a spec class or a plug-in file that defines one; or
            several of them. Without `layer` the kit tries those a family allows (and the projector, where the method
            acts there); without an amount it chooses one.
        families: Names in `orchestrator.compression.testing.families.TINY`; by default all.

    Raises:
        AssertionError: something does not hold; the message lists the checks with family, setting and numbers. Also
            where every family refuses the points, since nothing is proven then.
        UsageError: the points are no compressor, or a family is not known.

    Example:
        >>> check_compressor({"kind": "average_pool", "stride": 2}, ["llava"])
    """
    chosen = _choose(families)
    points = Path(points) if isinstance(points, str) else points
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


def check_cell(points: PointLike | Sequence[PointLike], family: str) -> list[str]:
    """Return what does not hold for points on one family, in words.

    Raises:
        Refused: the family cannot run them.
        Stopped: the method, or the model with it, raised an error.
    """
    bench = bench_of(family)
    several = [_candidate(point) for point in (points if isinstance(points, Sequence) else [points])]
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


def first_place(points: PointLike | Sequence[PointLike], family: str) -> list[CompressorSpec]:
    """Return the points with layer and amount as the kit tries them first on a family.

    Raises:
        Refused: the family cannot run them.
    """
    several = [_candidate(point) for point in (points if isinstance(points, Sequence) else [points])]
    return _places(several, bench_of(family))[0]


@functools.cache
def bench_of(family: str) -> Bench:
    """Return the models of a family; built once in a process."""
    return Bench(TINY[family])


def _choose(families: Iterable[str] | None) -> tuple[str, ...]:
    chosen = tuple(TINY) if families is None else tuple(families)
    unknown = sorted(set(chosen) - set(TINY))
    if unknown:
        raise UsageError(f"check_compressor: no family {', '.join(unknown)}; known: {', '.join(TINY)}")
    return chosen


@dataclass(frozen=True)
class Candidate:
    """A compressor with some of its parameters; layer and amount may be missing."""

    cls: type[CompressorSpec]
    given: Mapping[str, Any]

    @property
    def has_amount(self) -> bool:
        """It says how many tokens it keeps."""
        return any(name in self.given for name in _AMOUNT_NAMES)

    def spec(self, **more: Any) -> CompressorSpec:
        """Return the spec with these parameters, too.

        Raises:
            UsageError: it does not validate.
        """
        value = {"kind": self.cls.kind_name(), **self.given, **more}
        try:
            return self.cls.model_validate(value)
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".removeprefix(": ") for fault in error.errors()
            )
            raise UsageError(f"check_compressor: {value!r} is no compressor: {faults}") from error

    def all_kept(self) -> Candidate:
        """Return the same with every token kept."""
        rest = {name: value for name, value in self.given.items() if name not in _AMOUNT_NAMES}
        return Candidate(self.cls, {**rest, "keep_ratio": 1})


def _candidate(point: PointLike) -> Candidate:
    if isinstance(point, CompressorSpec):
        return Candidate(type(point), point.model_dump(exclude_none=True))
    if isinstance(point, Path):
        point = registry.only_component(point, registry.COMPRESSORS)
    if isinstance(point, type):
        return Candidate(point, {})
    kind, known = point.get("kind"), registry.kinds(registry.COMPRESSORS)
    if kind not in known:
        raise UsageError(f"check_compressor: no compressor of kind {kind!r} is registered; known: {', '.join(known)}")
    return Candidate(registry.spec_class(registry.COMPRESSORS, kind), point)


def _places(points: Sequence[Candidate], bench: Bench) -> list[list[CompressorSpec]]:
    """Return the points at every place worth trying that the family allows.

    Raises:
        Refused: there is none.
    """
    found, reasons = [], []
    for layers in _layers(points, bench.tiny):
        try:
            several = _complete(points, layers, bench.grids)
            with bench.attached("plain", several):  # so that a refusal is seen before any check
                found.append(several)
        except (UsageError, ValueError) as error:
            reasons.append(str(error))
    if not found:
        raise Refused(reasons[0].removeprefix("attach: "))
    return found


def _layers(points: Sequence[Candidate], tiny: TinyFamily) -> list[list[Any]]:
    """Return the layers to try for the points that name none; several points go down the depth."""
    if all("layer" in point.given for point in points):
        return [[None] * len(points)]
    cls = points[0].cls
    enters = hasattr(registry.load_object(cls.implementation), "enter")
    first = max(tiny.first_layer, 1 if {"queries", "keys"} & set(cls.needs) or enters else 0)
    if len(points) > 1:
        return [[min(first + number, tiny.layers - 1) for number in range(len(points))]]
    inside = dict.fromkeys([first, max(first, tiny.layers - 2)]) if "decoder" in cls.points else {}
    return [[layer] for layer in [*inside, *(["projector"] if "projector" in cls.points else [])]]


def _complete(points: Sequence[Candidate], layers: Sequence[Any], grids: Sequence[Grid]) -> list[CompressorSpec]:
    """Return the specs with a layer and an amount.

    Raises:
        ValueError: no amount fits the family's images.
    """
    specs = []
    for point, layer in zip(points, layers, strict=True):
        more = {} if layer is None or "layer" in point.given else {"layer": layer}
        spec = _with_amount(point, more, grids)
        specs.append(spec)
        grids = tuple(spec.kept_grid(grid) for grid in grids)
    return specs


def _with_amount(point: Candidate, more: Mapping[str, Any], grids: Sequence[Grid]) -> CompressorSpec:
    reason: Exception | None = None
    for amount in ({},) if point.has_amount else _AMOUNTS:
        try:
            spec = point.spec(**more, **amount)
            for grid in grids:
                spec.kept_tokens(grid)
        except (UsageError, ValueError) as error:
            reason = reason or error
            continue
        return spec
    assert reason is not None
    raise reason


def _all_kept(points: Sequence[Candidate], bench: Bench) -> list[list[CompressorSpec]]:
    """Return the points where they keep every token, if the method then keeps them as they are."""
    if not all(point.cls.keeps_all for point in points):
        return []
    return _places([point.all_kept() for point in points], bench)

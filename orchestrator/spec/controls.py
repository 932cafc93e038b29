"""Control arms: every cell that compresses once more with a plain method at the same budget, marked `control`.

Random, strided and averaged tokens beat most published methods at some budget (UniPruneBench, arXiv:2511.02650), and so
does a smaller image (VTC-Bench, arXiv:2510.07143); a method is worth what it adds to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from pydantic import ValidationError

from orchestrator import registry
from orchestrator.errors import ErrorDetail
from orchestrator.spec.budgets import layer_average
from orchestrator.spec.checks.compression import ANY_STEPS, check_variant, schedule_of, used_variants
from orchestrator.spec.components import AMOUNTS, FULL, CompressorSpec, Grid, ScheduleSpec, adapts
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.loaded import ResolvedCell
from orchestrator.spec.model_facts import ModelFacts, model_facts
from orchestrator.spec.yaml.node import Node
from orchestrator.spec.yaml.validation_errors import error_at, unknown_name

AXIS = "control"
_VIDEO = Grid(20_000, 2, frames=10_000)  # longer than what a method of whole videos may leave of one
Points = tuple[CompressorSpec, ...]


def with_controls(cells: Sequence[ResolvedCell], root: Node, errors: list[ErrorDetail]) -> tuple[ResolvedCell, ...]:
    """Return the cells, each followed by its control arms; a cell on full tokens, or that is its own control, has none.

    Args:
        cells: The grid.
        root: The tree, for the places of errors.
        errors: Takes controls that do not exist or cannot meet a variant's budget.
    """
    found: list[ResolvedCell] = []
    known = registry.kinds(registry.COMPRESSORS)
    made: dict[tuple[int, str], Points | None] = {}

    def report(index: int, message: str, allowed: str | None = None, hint: str | None = None) -> None:
        errors.append(error_at(root, ("controls", index), message, allowed, hint))

    for cell in cells:
        found.append(cell)
        for index, kind in enumerate(cell.spec.controls):
            if kind not in known:
                report(index, f"there is no method `{kind}`", *unknown_name(kind, known))
            elif kind in cell.spec.controls[:index]:
                report(index, f"`{kind}` is named twice", hint="take one out")
            elif (arm := _arm(cell, kind, partial(report, index), made)) is not None:
                found.append(arm)
    return tuple(found)


def _arm(
    cell: ResolvedCell, kind: str, report: Callable[..., None], made: dict[tuple[int, str], Points | None]
) -> ResolvedCell | None:
    variants = dict(cell.spec.compressors)
    used = [name for name in compressing_variants(cell.spec) if name in variants]
    if all(point.kind == kind for name in used for point in variants[name]):
        return None
    facts = model_facts(cell.spec.model.model_name_or_path, cell.spec.model.revision)
    for name in used:
        key = (id(variants[name]), kind)
        if key not in made:
            made[key] = _control(kind, variants[name], facts, name, report)
        points = made[key]
        if points is None:
            return None
        if name in _moved_variants(cell.spec) and _stands_elsewhere(points, variants[name]):
            why = f"it meets its budget at another place, and a schedule moves {name} step by step"
            report(f"{kind} cannot be the control of {name}: {why}")
            return None
        variants[name] = points
    spec = cell.spec.model_copy(update={"compressors": variants})
    return replace(cell, name=f"{cell.name},{AXIS}={kind}", axes={**cell.axes, AXIS: kind}, spec=spec)


def compressing_variants(spec: ExperimentSpec) -> tuple[str, ...]:
    """Return the names of the variants that the phases' schedules use, without `full`."""
    names = (name for phase in spec.phases.by_name.values() for name in used_variants(phase, spec.schedules))
    return tuple(dict.fromkeys(name for name in names if name != FULL))


def _moved_variants(spec: ExperimentSpec) -> set[str]:
    """Return the variants of which a schedule derives others; one that cannot be divided is reported elsewhere."""
    moved: set[str] = set()
    for phase in spec.phases.by_name.values():
        if isinstance(schedule := schedule_of(phase, spec.schedules), ScheduleSpec):
            with suppress(ValueError):
                derived = schedule.compile(ANY_STEPS, 1).derived.values()
                moved |= {base for base, changes in derived if changes}
    return moved


def _stands_elsewhere(control: Points, points: Points) -> bool:
    """Return whether an amount means another budget in the control: it acts elsewhere, or adds tokens on the way."""
    return len(control) != len(points) or any(
        (mine.place != "decoder") > (theirs.place != "decoder")
        or (mine.place == "decoder" and bool(mine.layer_average_tokens) > bool(theirs.layer_average_tokens))
        for mine, theirs in zip(control, points, strict=True)
    )


def _control(
    kind: str, points: Points, facts: ModelFacts | None, name: str, report: Callable[..., None]
) -> Points | None:
    try:
        control = control_points(kind, points, facts)
    except (ValidationError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        report(f"{kind} cannot be the control of {name}: {reason}")
        return None
    findings = list(check_variant(control, ("compressors", name), facts))
    for each in findings:
        report(f"{kind} cannot be the control of {name}: {each.message}", each.allowed, each.hint)
    return None if findings else control


def control_points(kind: str, points: Points, facts: ModelFacts | None) -> Points:
    """Return a method at the budget of a variant: point by point where it can stand, else once before the decoder.

    Raises:
        ValueError: the variant's budget is not known, or the method cannot meet it.
    """
    if adapts(points):
        raise ValueError("how many tokens it leaves depends on the image, so its budget is not known")
    if own := [point.kind for point in points if _has_own_amount(point)]:
        raise ValueError(f"fields of {own[0]} alone say how many tokens it leaves, and no other method has them")
    method: type[CompressorSpec] = registry.spec_class(registry.COMPRESSORS, kind)
    if method.adaptive:
        raise ValueError(f"how many tokens {kind} leaves depends on the image, so it meets no budget")
    grid = facts.visual_grid if facts is not None else None
    if "decoder" not in method.points:
        if facts is None or grid is None:
            raise ValueError("it acts before the decoder, and how many tokens an image has is not known here")
        average = layer_average(points, facts.num_layers, grid)
        fields = {"kind": kind, "layer": "projector", "layer_average_tokens": round(average)}
        return (method.model_validate(fields),)
    found = []
    for point in points:
        # What takes no amount is no budget: the control has it too.
        found.append(_at_point(method, point, facts, grid) if point.takes_amount else point)
        grid = point.kept_grid(grid) if grid is not None and point.layer_average_tokens is None else None
    return tuple(found)


def _has_own_amount(point: CompressorSpec) -> bool:
    return not (point.takes_amount or point.keeps_none) and point.kept_tokens(_VIDEO) < _VIDEO.tokens


def _at_point(
    method: type[CompressorSpec], point: CompressorSpec, facts: ModelFacts | None, grid: Grid | None
) -> CompressorSpec:
    layer = point.layer
    if point.place != "decoder" and point.place not in method.points:  # the next place it can act at
        layer = "projector" if "projector" in method.points else 0
    fields = {"kind": method.kind_name(), "layer": layer}
    kept = None if grid is None or point.layer_average_tokens is not None else point.kept_tokens(grid)
    amounts = {name: getattr(point, name) for name in AMOUNTS}
    try:
        control = method.model_validate(fields | amounts)
    except ValidationError:
        if kept is None:
            raise
        control = method.model_validate(fields | {"keep_tokens": kept})  # its amount is a shape
    if grid is None or kept is None:
        return control
    if facts is not None and any(one.tokens_before(grid) != grid.tokens for one in (point, control)):
        # One adds tokens on the way, so the number at the point is not its budget.
        average = round(layer_average((point,), facts.num_layers, grid))
        return method.model_validate(fields | {"layer_average_tokens": average})
    return control if control.kept_tokens(grid) == kept else method.model_validate(fields | {"keep_tokens": kept})

"""What each variant of an experiment keeps: tokens after each point, mean over layers, compression ratio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.plan.cell import Cell
from orchestrator.plan.cost import compression_ratio
from orchestrator.plan.reached import resolve_points
from orchestrator.spec.budgets import tokens_by_layer
from orchestrator.spec.components import CompressorSpec, Grid
from orchestrator.spec.controls import AXIS, used_variants
from orchestrator.spec.model_facts import ModelFacts


def variant_documents(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One entry for each distinct variant the cells use.

    Returns:
        `name`, `control` (the method of a control arm, or None), `points` (`kind`, `layer`, `kept_tokens`),
        `layer_average_tokens` and `compression_ratio`; figures are of one image, None where its tokens vary.
    """
    found: dict[str, dict[str, Any]] = {}
    seen: set[tuple[Any, ...]] = set()  # cells often hold the very same points
    for cell in cells:
        for name in used_variants(cell.spec):
            points = cell.spec.compressors.get(name)
            if points is None:
                continue
            key = (name, *map(id, points), id(cell.facts), cell.axes.get(AXIS))
            if key in seen:
                continue
            seen.add(key)
            entry = _entry(name, points, cell.facts, cell.axes.get(AXIS))
            found.setdefault(repr(sorted(entry.items(), key=lambda item: item[0])), entry)
    return list(found.values())


def _entry(name: str, points: Sequence[CompressorSpec], facts: ModelFacts | None, control: Any) -> dict[str, Any]:
    grid = facts.visual_grid if facts is not None else None
    if facts is None or grid is None:
        shown = [{"kind": point.kind, "layer": point.layer, "kept_tokens": None} for point in points]
        figures: dict[str, Any] = {"layer_average_tokens": None, "compression_ratio": None}
    else:
        solved = _solved(points, facts, grid)
        total = sum(tokens_by_layer(solved, facts.num_layers, grid))
        figures = {
            "layer_average_tokens": total / facts.num_layers,
            "compression_ratio": compression_ratio(grid, total, facts.num_layers),
        }
        shown, left = [], grid
        for point in solved:
            left = point.kept_grid(left)
            layer = point.layer if point.layer == "projector" else point.layer_index(facts.num_layers)
            shown.append({"kind": point.kind, "layer": layer, "kept_tokens": left.tokens})
    return {"name": name, "control": control, "points": shown, **figures}


def _solved(points: Sequence[CompressorSpec], facts: ModelFacts, grid: Grid) -> list[CompressorSpec]:
    resolved = resolve_points(points, facts.num_layers, grid)
    return [type(point).model_validate(fields) for point, fields in zip(points, resolved, strict=True)]

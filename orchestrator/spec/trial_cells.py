"""The cells of a search's trial: the experiment with the drawn values in their places, once for each seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from orchestrator.errors import SpecError
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.faults import explain
from orchestrator.spec.grid import ResolvedCell
from orchestrator.spec.node import Mark, node_of
from orchestrator.spec.shape import find_path
from orchestrator.spec.space import summary

if TYPE_CHECKING:
    from orchestrator.spec.loaded import LoadedExperiment


def trial_name(number: int) -> str:
    """Return the name of a trial, and of its cell where it has one seed."""
    return f"trial-{number:03d}"


def trial_cells(loaded: LoadedExperiment, number: int, values: Mapping[str, Any]) -> tuple[ResolvedCell, ...]:
    """Return one cell a seed of the matrix, or one.

    Args:
        loaded: The experiment; its own cells are the base with each seed.
        number: The trial's number.
        values: Dotted path to a value as the file would write it.

    Raises:
        SpecError: a value cannot stand in its place.
    """
    mark = Mark(str(loaded.path))
    tree = node_of(loaded.tree, mark)
    for path, value in values.items():
        tree = tree.set_at(find_path(tree, path), node_of(value, mark))
    try:
        spec = ExperimentSpec.model_validate(tree.plain()).model_copy(update={"search": None})
    except ValidationError as error:
        raise SpecError(explain(error.errors(), tree)) from error
    axes = {path: summary(value) for path, value in values.items()}
    name = trial_name(number)
    if not any(cell.axes for cell in loaded.cells):
        return (ResolvedCell(name, axes, spec),)
    return tuple(
        ResolvedCell(
            f"{name},seed={cell.spec.seed}", axes | cell.axes, spec.model_copy(update={"seed": cell.spec.seed})
        )
        for cell in loaded.cells
    )

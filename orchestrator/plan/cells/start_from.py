"""Where a phase starts: the state before it, another experiment's cell, a folder, or parts of these put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orchestrator.errors import UsageError
from orchestrator.plan.cells import identity_fields
from orchestrator.plan.cells.cell import Cell, cell_id, find_cells
from orchestrator.plan.identity import SEMANTICS_VERSION, digest
from orchestrator.plan.jobs import StartJob
from orchestrator.spec.cell_reference import by_axis, by_name, misfit
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.phase import PhaseSpec, StartFromSpec

if TYPE_CHECKING:
    from orchestrator.spec.loaded import LoadedExperiment, ResolvedCell


@dataclass(frozen=True)
class Start:
    """Where a phase starts.

    Attributes:
        state: The state whose weights it takes.
        job: Puts that state together; None where it is another's.
        source: The other experiment's cell, up to the phase after which its weights are taken.
        settings: Digest of the model's settings where the state was trained under others: they are part of what the
            phase does, and the state does not say so.
    """

    state: str
    job: StartJob | None = None
    source: Cell | None = None
    settings: str | None = None


def start_text(recipe: PhaseSpec) -> str | None:
    """Return what a phase starts from by `start_from`, in words."""
    start = recipe.start
    if start is None:
        return None
    parts = "" if start.parts is None else f"{', '.join(start.parts)} of "
    return f"{parts}{start.path or f'cell {start.cell} of {start.spec} after {start.phase}'}"


def resolve_start(
    spec: ExperimentSpec,
    name: str,
    before: str,
    settings_of: Callable[[ExperimentSpec], str],
    other_cell: Callable[[StartFromSpec], Cell],
) -> Start:
    """Return where the phase `name` of a cell starts.

    Args:
        spec: The cell's.
        before: The state before the phase: the root, or the end of `pretrain`.
        settings_of: Digest of a model's settings.
        other_cell: Finds the other experiment's cell.

    Raises:
        UsageError: the other cell does not have the phase.
    """
    recipe: PhaseSpec = getattr(spec.phases, name)
    start = recipe.start
    if start is None:
        return Start(before)
    if start.spec is None:
        assert start.path is not None
        given = {"folder": identity_fields.folder_identity(start.path)}
        return Start(**_put_together(spec, start, before, given, settings_of(spec), folder=start.path))
    source = _cut(other_cell(start), name, start)
    if start.parts is None:
        own = settings_of(spec)
        return Start(source.state, source=source, settings=own if settings_of(source.spec) != own else None)
    found = _put_together(spec, start, before, {"source": source.state}, settings_of(spec), source=source.state)
    return Start(**found, source=source)


def _put_together(
    spec: ExperimentSpec, start: StartFromSpec, before: str, given: dict[str, Any], settings: str, **place: str
) -> dict[str, Any]:
    parts = tuple(sorted(start.parts or ()))
    rest = {"base": before, "parts": list(parts)} if parts else {"settings": settings}
    identity = digest({"semantics": SEMANTICS_VERSION, "start": {**given, **rest}})
    places = {"source": None, "folder": None, **place}
    model = spec.model.model_dump(mode="json")
    job = StartJob(
        identity, model, before if parts else None, places["source"], places["folder"], parts, tuple(spec.plugins)
    )
    return {"state": identity, "job": job}


def _cut(cell: Cell, name: str, start: StartFromSpec) -> Cell:
    """Return the cell as far as the phase."""
    names = [plan.name for plan in cell.phases]
    if start.phase not in names:
        raise UsageError(
            f"phases.{name}.start_from.phase: the cell {cell.name} of {start.spec} has no phase {start.phase!r}; "
            f"it has: {', '.join(names) or 'none'}"
        )
    phases = cell.phases[: names.index(start.phase) + 1]
    return replace(cell, id=cell_id(phases, cell.root), phases=phases, evaluations=(), state=phases[-1].end)


def pick(experiment: LoadedExperiment, start: StartFromSpec, plan: Callable[[ResolvedCell], Cell]) -> ResolvedCell:
    """Return the cell that `start_from` names; all are planned only where an id's beginning asks for it.

    Raises:
        UsageError: none or several fit.
    """
    assert start.cell is not None
    fits: Sequence[Any] = by_name(experiment.cells, start.cell) or by_axis(experiment.cells, start.cell)
    if not fits:
        ids = [cell.name for cell in find_cells([plan(cell) for cell in experiment.cells], start.cell)]
        fits = [cell for cell in experiment.cells if cell.name in ids]
    if len(fits) != 1:
        raise UsageError(f"start_from.cell of {experiment.path}: {misfit(experiment.cells, fits, start.cell)}")
    found: ResolvedCell = fits[0]
    return found

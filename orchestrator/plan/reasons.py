"""Why a cell has work to do, in words, and what sets a new one apart from the nearest finished cell."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from orchestrator import registry
from orchestrator.errors import shorten
from orchestrator.plan.cells.cell import Cell, PhasePlan
from orchestrator.plan.cells.identity_fields import RESOLVED, draws_weights, plugin_file
from orchestrator.plan.identity import canonical_json, content_digest, digest
from orchestrator.plan.jobs import EvaluationJob
from orchestrator.plan.ledger.files import read_json
from orchestrator.plan.ledger.leases import Holder
from orchestrator.plan.status import TreeStatus

Values = dict[str, str]
_SHOWN = 3
_VALUE_SHOWN = 40
_LONGEST = 160
_COMPARED = 100
_RECORDED = 500
_ACTIONS_SHOWN = 6
_BOUNDARIES = "exact_schedule"
_NAMED = ("compressors.", "data.")
_PLUGIN = "plug-in "


def cell_values(cell: Cell) -> Values:
    """Return what decides what a cell is, as dotted key to text: what its id hashes, and names for people."""
    model = cell.spec.model
    values: dict[str, Any] = {}
    _flatten("model", _fields(model), values)
    if not cell.phases or any(plan.recipe.seed is None for plan in cell.phases):
        values["seed"] = cell.spec.seed
    for plan in cell.phases:
        _phase_values(plan, values)
    if draws_weights(model):
        values["weights.seed"] = cell.root.seed
    return {key: value if isinstance(value, str) else canonical_json(value) for key, value in values.items()}


def _fields(spec: Any, leave: frozenset[str] = frozenset()) -> dict[str, Any]:
    return dict(spec.model_dump(mode="json", exclude=set(type(spec).not_identity | leave)))


def _phase_values(plan: PhasePlan, values: dict[str, Any]) -> None:
    place = f"phases.{plan.name}"
    _flatten(place, _fields(plan.recipe, RESOLVED), values)
    values[f"{place}.seed"] = plan.seed
    values[f"{place}.steps"] = plan.total_steps
    if plan.recipe.start_from is not None:
        _flatten(f"{place}.start_from", plan.recipe.model_dump(mode="json")["start_from"], values)
    few = len(plan.table) <= _ACTIONS_SHOWN
    shares = [(action.variant, (action.last_step - action.first_step) / plan.total_steps) for action in plan.table]
    stages = ", ".join(name if share == 1 else f"{name} {share:.3g}" for name, share in shares)
    values[f"{place}.schedule"] = stages if few else f"{plan.schedule.kind} of {len(plan.table)} actions"
    values[f"{place}.{_BOUNDARIES}"] = digest([plan.total_steps, plan.schedule.ids, [a.last_step for a in plan.table]])[
        :8
    ]
    for action in plan.table if few else ():
        for number, point in enumerate(action.points):
            name = f"compressors.{action.variant}" + (f".{number}" if len(action.points) > 1 else "")
            _flatten(name, point, values)
    values[f"{place}.data"] = " + ".join(
        entry["name"] if len(plan.data) == 1 else f"{entry['share']:g} {entry['name']}" for entry in plan.data
    )
    used = {(registry.DATA, entry["spec"]["kind"]) for entry in plan.data}
    used |= {(registry.COMPRESSORS, point["kind"]) for action in plan.table for point in action.all_points}
    for group, kind in used:
        if (file := plugin_file(registry.spec_class(group, kind))) is not None:
            values[f"{_PLUGIN}{Path(file).name}"] = content_digest(file)[:8]
    for entry in plan.data:
        _flatten(f"data.{entry['name']}", entry["spec"], values)


def _flatten(place: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(f"{place}.{key}", item, into)
    elif value is not None:
        into[place] = value


def differences(of: Mapping[str, str], to: Mapping[str, str]) -> list[str]:
    """Return `key old -> new` for each value in which `to` differs from `of`; what only one of them has is `none`.

    What only follows from another difference is not listed: a variant beside the schedule that uses it, a phase's
    seed beside the experiment's, the exact steps of a schedule beside a difference that shows.
    """
    found: dict[str, str] = {}
    in_both = {_entry(key) for key in of} & {_entry(key) for key in to}
    # The experiment's seed first: that of a phase or of the weights often only follows it.
    for key in sorted(dict.fromkeys((*to, *of)), key=lambda key: key != "seed"):
        old, new = of.get(key), to.get(key)
        unused = (key == "seed" and None in (old, new)) or (key.startswith(_NAMED) and _entry(key) not in in_both)
        unused |= key.startswith(_PLUGIN) and None in (old, new)
        change = f"{_brief(old)} -> {_brief(new)}"
        if old != new and _brief(old) == _brief(new):
            change = f"{shorten(old or 'none', _LONGEST)} -> {shorten(new or 'none', _LONGEST)}"
        follows = key.endswith("seed") and any(other == change for at, other in found.items() if at.endswith("seed"))
        if old != new and not unused and not follows:
            found[key] = change
    shown = {key: change for key, change in found.items() if not key.endswith(_BOUNDARIES)} or found
    return [_as_reason(key.removeprefix("phases."), change) for key, change in shown.items()]


def _as_reason(key: str, change: str) -> str:
    if key.startswith(_PLUGIN):
        return f"{key} was edited"
    if key.endswith(_BOUNDARIES):  # two digests say nothing
        return f"{key.removesuffix(_BOUNDARIES)}schedule in its exact steps, or in the source of a method it uses"
    return f"{key} {change}"


def _brief(value: str | None) -> str:
    """Return a value as a reason shows it: of an absolute path the last part, of a long text its beginning."""
    if not value:
        return "none"
    return shorten(value.rstrip("/").rpartition("/")[2] if value.startswith("/") else value, _VALUE_SHOWN)


def _entry(key: str) -> str:
    """Return the named variant or data set that a key belongs to."""
    return ".".join(key.split(".")[:2])


class Nearest:
    """Finds the finished cell nearest to a new one, in an experiment and among those recorded under its name.

    Only the first new cells are compared, with a bounded number of finished ones: a plan of 10,000 cells stays quick.

    Args:
        finished: Finished cells of the experiment.
        records: Folder of its recorded cells, `STORAGE/cells/EXPERIMENT`.
    """

    def __init__(self, finished: Iterable[Cell], records: Path) -> None:
        self._finished, self._records = finished, records
        self._known: list[tuple[str, Values]] | None = None
        self._left = _COMPARED

    def reason(self, cell: Cell) -> str | None:
        """Return `differs from finished cell X: …`; None where there is none, or enough cells were compared."""
        if self._left == 0:
            return None
        self._left -= 1
        own = cell_values(cell)
        candidates = self._candidates(cell.id)
        if not candidates:
            self._left = 0
            return None
        compared = ((name, differences(values, own)) for name, values in candidates)
        name, found = min(compared, key=lambda entry: (_distance(entry[1]), entry[0] != cell.name))
        if not found:
            found = ["the content of its model, data or plug-ins, or the version of the training"]
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        return f"differs from finished cell {name}: {', '.join(found[:_SHOWN])}{more}"

    def _candidates(self, cell_id: str) -> Sequence[tuple[str, Values]]:
        """Return the names and values."""
        if self._known is None:
            own = {cell.id: (cell.name, cell_values(cell)) for cell in islice(self._finished, _RECORDED)}
            self._known = [*own.values(), *_recorded(self._records, own.keys() | {cell_id})]
        return self._known


def _distance(found: Sequence[str]) -> int:
    # Another schedule is further away than another value of one.
    return len(found) + sum(".schedule " in text for text in found)


def _recorded(folder: Path, leave_out: Iterable[str]) -> list[tuple[str, Values]]:
    """Return the names and values of finished cells that were recorded, the newest first."""
    known = set(leave_out)
    found = []
    for file in heapq.nlargest(_RECORDED, folder.glob("*/record.json"), key=_changed):
        record = read_json(file) or {}
        values = record.get("values")
        if record.get("status") == "finished" and isinstance(values, dict) and record.get("cell_id") not in known:
            known.add(record["cell_id"])
            found.append((file.parent.name, values))
    return found


def _changed(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


class Reasons:
    """Says why a cell has work to do.

    Args:
        cells: All cells of the experiment; a new one is compared with those that are finished.
        experiment: Its name; cells recorded under it earlier are compared with as well. None compares nothing.
    """

    def __init__(self, status: TreeStatus, cells: Sequence[Cell], experiment: str | None) -> None:
        self._status = status
        done = (cell for cell in cells if status.cell(cell) == "done")
        self._nearest = None
        if experiment is not None:
            self._nearest = Nearest(done, status.ledger.cell_folder(experiment, "").parent)

    def of(self, cell: Cell) -> list[str]:
        """Return `["done"]`, or all reasons why a cell has work to do, the most important first."""
        status = self._status
        if status.cell(cell) == "done":
            return ["done"]
        path = status.tree.path_of[cell.id]
        needed = status.needed_of(cell)
        reasons = list(self._failure(cell))
        reasons += _elsewhere(status.holders[job] for job in status.jobs(cell) if job in status.holders)
        begun = list(self._continues(needed))
        untouched = len(needed) == len(path) and path and status.trained.isdisjoint(path)
        if untouched and not reasons and not begun:
            reasons.append("new")
        elif needed and not untouched:
            reasons.append(f"{len(path) - len(needed)} of {len(path)} stage runs are done")
        reasons += [*self._again(needed), *begun]
        if (
            cell.state in needed
            and self._nearest is not None
            and (difference := self._nearest.reason(cell)) is not None
        ):
            reasons.append(difference)
        first = [job for job in status.tree.origins_of.get(cell.id, ()) if job in status.needed and needed]
        if runs := sum(job in status.tree.stage_runs for job in first):
            reasons.append(f"{runs} stage run{'s' if runs > 1 else ''} of the cell it starts from first")
        if not needed:
            reasons += _missing(cell, [job for job in cell.evaluations if status.evaluation(job.id) != "done"])
        if cell.state not in needed and (open_ := [e for e in cell.along if status.evaluation(e.job.id) != "done"]):
            names = ", ".join(dict.fromkeys(each.job.name for each in open_))
            reasons.append(f"{len(open_)} evaluations along the way are missing ({names})")
        return reasons or ["new"]

    def _failure(self, cell: Cell) -> Iterable[str]:
        if (failure := self._status.failure(cell)) is not None:
            yield f"failed: {failure[1].splitlines()[0]} (--retry-failed takes it up again)"

    def _continues(self, needed: Sequence[str]) -> Iterable[str]:
        for run in needed:
            if run in self._status.begun and (steps := self._status.ledger.checkpoint_steps(run)):
                yield f"continues at step {steps[0]:,}"

    def _again(self, needed: Sequence[str]) -> Iterable[str]:
        """Return steps that were trained before and are trained once more, since the state they led to was not kept."""
        runs = self._status.tree.stage_runs
        dropped = [runs[run] for run in needed if run in self._status.trained]
        if dropped:
            steps = sum(job.last_step - job.first_step for job in dropped)
            yield f"checkpoint dropped: {steps:,} steps again"
        passed = [runs[run] for run in needed if run in self._status.passed]
        if passed:
            steps = sum(job.last_step - job.first_step for job in passed)
            yield f"leaves finished work at step {passed[-1].last_step}, not stored: {steps:,} steps again"


def _missing(cell: Cell, tests: Sequence[EvaluationJob]) -> list[str]:
    """Return what evaluations are missing; the variants of an evaluation's sweeps are counted."""
    found: dict[str, int] = {}
    for job in tests:
        swept = cell.spec.evaluate[job.name].tested_variants[job.under] is not None
        what = f"evaluation {job.label} under {'{}' if swept else job.under}"
        found[what] = found.get(what, 0) + 1
    return [
        f"{what.format(f'{count} swept variants' if count > 1 else 'a swept variant')} is missing"
        for what, count in found.items()
    ]


def _elsewhere(holders: Iterable[Holder]) -> list[str]:
    return list(dict.fromkeys(f"runs elsewhere: pid {holder.pid} on {holder.host}" for holder in holders))

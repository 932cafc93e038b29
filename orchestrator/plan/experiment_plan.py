"""ExperimentPlan: an experiment as far as planning takes it, from the file to the tree and the ledger."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

from orchestrator.errors import StageRunError, UsageError
from orchestrator.plan.cell_record import CellRecord, cell_record
from orchestrator.plan.cells.cell import PROMOTED, Cell, distinct_cells, find_cells
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.plan.cells.rungs import planned_up_to
from orchestrator.plan.identity import digest, share_caches
from orchestrator.plan.jobs import Job, Keep
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.files import dump_note
from orchestrator.plan.ledger.inventory import FOLDER, Recorded
from orchestrator.plan.ledger.ledger import as_name
from orchestrator.plan.status import CellStatus, cell_status, failure_of
from orchestrator.plan.tree import StageTree, build_stage_tree
from orchestrator.plan.trials import (
    ADDED,
    STOPPED,
    Trial,
    TrialNotes,
    cells_of_trials,
    front_of,
    promoted_cells,
    reference_cells,
    search_id,
)
from orchestrator.redaction import secret_in
from orchestrator.spec.cell_reference import misfit, which
from orchestrator.spec.loaded import LoadedExperiment, Source
from orchestrator.spec.loader import load_experiment
from orchestrator.spec.search_space import trial_name
from orchestrator.spec.yaml.environment import expanded


@dataclass(frozen=True)
class ExperimentPlan:
    """A loaded and planned experiment beside what its ledger holds.

    Attributes:
        cells: The grid's; of a search, those of the trials noted so far.
        trials: Of a search, by number.
        front: Ids of the cells on the search's Pareto front.
        references: Of a search, what its constraints compare with: the schedule's name to the ids of its cells.
        whole: Of a search, the cells of its trials by number, to their end wherever they are planned up to.
    """

    loaded: LoadedExperiment
    cells: tuple[Cell, ...]
    tree: StageTree
    ledger: Ledger
    trials: tuple[Trial, ...] = ()
    front: frozenset[str] = frozenset()
    references: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    whole: Mapping[int, tuple[Cell, ...]] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return f"<ExperimentPlan of {self.loaded.spec.name}: {len(self.cells)} cells, {self.ledger.url}>"

    @property
    def tracking_uri(self) -> str:
        """MLflow's address: the file's, the environment's, or sqlite in the storage (s3: in this machine's cache).

        The environment's may hold a password: it is kept in memory, and shown by `redacted` only.

        Raises:
            UsageError: the file's refers to a variable that is not there, or the storage's path cannot stand in an
                address.
        """
        written = expanded(self.loaded.spec.tracking.tracking_uri or "", "tracking.tracking_uri")
        uri = written or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri and (mark := next((mark for mark in "?%" if mark in str(self.ledger.storage)), "")):
            raise UsageError(
                f"MLflow would not keep its database in the storage {self.ledger.storage}: `{mark}` is a mark in the "
                "address of a database; choose a path without it, or set tracking.tracking_uri"
            )
        return uri or f"sqlite:///{self.ledger.storage / 'mlflow.db'}"

    @property
    def experiment_name(self) -> str:
        """Name of the MLflow experiment."""
        return self.loaded.spec.tracking.experiment_name or self.loaded.spec.name

    def with_trial(self, trial: Trial) -> ExperimentPlan:
        """Return the search once one of its trials has moved on."""
        assert self.loaded.spec.search is not None
        trials = tuple(trial if each.number == trial.number else each for each in self.trials)
        return replace(self, trials=trials, front=frozenset(front_of(trials, self.loaded.spec.search)))

    def replanned(self, trials: Sequence[Trial], *, to_the_end: bool = False) -> ExperimentPlan:
        """Return the search with these trials (`plan_trials`); what was expanded is not expanded again."""
        return plan_trials(self.loaded, self.ledger, trials, self.whole, to_the_end=to_the_end)

    def reference_values(self) -> dict[str, float] | None:
        """Return what each constraint of a search compares with, by metric; None while it is not trained.

        Raises:
            StageRunError: it failed, or lacks the metric.
        """
        assert self.loaded.spec.search is not None
        found = {}
        for metric, constraint in self.loaded.spec.search.constraints.items():
            ids = self.references.get(constraint.reference or "", ())
            cells = [cell for cell in self.cells if cell.id in ids and PROMOTED not in cell.axes]
            failures = (failure_of(cell, self.tree, self.ledger) for cell in cells)
            if (failure := next((each for each in failures if each is not None), None)) is not None:
                text = f"the search stopped: {constraint.reference}, which search.constraints compares with, failed"
                raise StageRunError(f"{text}: {failure[1]}; --retry-failed takes it up again")
            if any(self.status(cell) != "finished" for cell in cells):
                return None
            values = [self.record(cell).summary.get(metric, math.nan) for cell in cells]
            if not all(map(math.isfinite, values)):
                text = f"the search stopped: {constraint.reference}, which search.constraints compares with, has no"
                raise StageRunError(f"{text} {metric}; mend search.constraints or the evaluation")
            found[metric] = mean(values) if values else 0.0
        return found

    def repeated_trials(self) -> list[str]:
        """Return a sentence for each trial of a search that is the same as an earlier one, whose cells it shares."""
        first: dict[tuple[str, ...], int] = {}
        pairs = ((trial.number, first.setdefault(trial.cells, trial.number)) for trial in self.trials if trial.cells)
        return [f"{trial_name(new)} is the same as {trial_name(old)}" for new, old in pairs if new != old]

    def folder(self, cell: Cell) -> Path:
        """Return where a cell's weights, log and resolved YAML are found by name."""
        return self.ledger.cell_folder(self.loaded.spec.name, cell.name)

    def record(self, cell: Cell) -> CellRecord:
        """Return a cell as it stands in the ledger; a trial's says whether it is on the front, and what it added.

        One that lacks an objective is failed, since its trial is.
        """
        record = cell_record(cell, self.tree, self.ledger, self._baseline_of(cell))
        record = replace(record, status=self._as_judged(cell, record.status))
        search = self.loaded.spec.search
        if search is None or record.status not in ("finished", "stopped") or PROMOTED in cell.axes:
            return record
        has_failed = any(trial.state == "failed" and cell.id in trial.cells for trial in self.trials)
        if has_failed and not {*search.objectives, *search.constraints} <= record.summary.keys():
            return replace(record, status="failed")
        tags = {**record.tags, "pareto": str(cell.id in self.front).lower()}
        trial = self._trial_of(cell)
        if trial is not None and trial.violated:
            tags["violates"] = ", ".join(trial.violated)
        if trial is not None and trial.rungs:
            *_, (rung, value) = trial.rungs.items()
            tags[STOPPED] = f"at {rung}: {value:.4g}" if record.status == "stopped" else "no"
        if trial is None or trial.added_train_tflops is None:
            return replace(record, tags=tags)
        added = {ADDED: trial.added_train_tflops / len(trial.cells)}  # a row is the mean over its cells
        return replace(record, tags=tags, summary={**record.summary, **added})

    def _baseline_of(self, cell: Cell) -> Cell | None:
        """Return the baseline's cell that has all other axes in common, such as the seed; the only one there is else.

        It is looked for where an evaluation asks for it alone.
        """
        wanted = self.loaded.spec.report.baseline
        if not wanted or not any(entry.needs_baseline for entry in cell.spec.evaluate.values()):
            return None
        axes = {**cell.axes, **wanted}
        bases = [one for one in self.cells if all(one.axes.get(axis) == value for axis, value in wanted.items())]
        return next((one for one in bases if one.axes == axes), bases[0] if len(bases) == 1 else None)

    def status(self, cell: Cell) -> CellStatus:
        """Return a cell's state; quick, no metrics are read."""
        return self._as_judged(cell, cell_status(cell, self.tree, self.ledger))

    def _as_judged(self, cell: Cell, status: CellStatus) -> CellStatus:
        """Return a cell's state; one that is at a rung is stopped once its trial is, and waits for that until then."""
        if status != "stopped":
            return status
        trial = self._trial_of(cell)
        return trial.state if trial is not None and trial.state in ("stopped", "failed") else "interrupted"

    def _trial_of(self, cell: Cell) -> Trial | None:
        """Return the first trial that has a cell: later ones of the same cells share them and add nothing."""
        return next((each for each in self.trials if cell.id in each.cells), None)

    def cells_of(self, trial: Trial) -> list[Cell]:
        """Return the cells of a trial, one a seed; not those it has once it is promoted."""
        return [cell for cell in self.cells if cell.id in trial.cells and PROMOTED not in cell.axes]

    def jobs_of(self, cell: Cell) -> tuple[str, ...]:
        """Return ids of what a cell needs, in order: its root, what it starts from, its stage runs, its evaluations."""
        return self.tree.jobs_of(cell)

    def names_of(self, work: Sequence[Job]) -> dict[str, tuple[str, ...]]:
        """Return the job id to the names of the cells that need it."""
        names: dict[str, list[str]] = {job.id: [] for job in work}
        for cell in self.cells:
            for identity in self.jobs_of(cell):
                if identity in names:
                    names[identity].append(cell.name)
        return {identity: tuple(found) for identity, found in names.items()}

    def failures(self) -> dict[str, str]:
        """Return the cell name to the reason why it failed."""
        failed = ((cell.name, failure_of(cell, self.tree, self.ledger)) for cell in self.cells)
        return {name: failure[1] for name, failure in failed if failure is not None}

    def find(self, wanted: str | None) -> Cell:
        """Return the cell of a name, an id's unique beginning, or `axis=value`; None where there is only one.

        Raises:
            UsageError: none or several fit.
        """
        fits = distinct_cells(self.cells) if wanted is None else find_cells(self.cells, wanted)
        if len(fits) == 1:
            return fits[0]
        if wanted is None:
            raise UsageError(f"--cell: {which(fits)}")
        raise UsageError(f"cell {misfit(self.cells, fits, wanted)}")


def storage_path(given: str | os.PathLike[str] | None) -> str | Path:
    """Return a storage: the one given, $LLAVOLTA_STORAGE, or ./runs; a folder, or a URL.

    Raises:
        UsageError: its address holds a password: it is printed, and written into records.
    """
    text = os.fspath(given or os.environ.get("LLAVOLTA_STORAGE") or "runs")
    if what := secret_in(text):
        raise UsageError(
            f"the storage {text} ($LLAVOLTA_STORAGE, --storage): {what} must not stand there; credentials are found "
            "in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or in ~/.aws"
        )
    return text if "://" in text else Path(text).expanduser().absolute()


@contextmanager
def collector_paused() -> Iterator[None]:
    """Switch off the cycle collector, a fifth of the time of a plan: all that it makes stays in use."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@collector_paused()
def prepare(source: Source, overrides: Sequence[str] = ()) -> ExperimentPlan:
    """Load, expand and plan an experiment.

    Raises:
        SpecError: the file has errors.
    """
    loaded = load_experiment(source, overrides)
    ledger = Ledger(storage_path(loaded.spec.cluster.storage_path))
    share_caches(ledger.storage / "cache")
    if loaded.spec.search is not None:
        return plan_trials(loaded, ledger, TrialNotes(ledger.store, search_id(loaded)).read())
    cells = expand_cells(loaded)
    with ledger.snapshot():
        return ExperimentPlan(loaded, cells, build_stage_tree(cells, ledger), ledger)


def plan_trials(
    loaded: LoadedExperiment,
    ledger: Ledger,
    trials: Sequence[Trial],
    known: Mapping[int, tuple[Cell, ...]] | None = None,
    *,
    to_the_end: bool = False,
) -> ExperimentPlan:
    """Return a search with the trials there are; one that cannot be planned comes back failed.

    A trial that is the same as an earlier one shares its cells, under the earlier one's names; the cells of promoted
    trials come last, under names of their own. With a scheduler a trial is planned up to the rung where it is compared
    next, or stopped.

    Args:
        loaded: The experiment, with its search.
        ledger: Where it is stored.
        trials: By number.
        known: `whole` of an earlier plan of the same search: what it expanded is not expanded again.
        to_the_end: What has not ended is planned as if no rung stopped it.
    """
    assert loaded.spec.search is not None
    found = list(cells_of_trials(loaded, trials, known or {}))
    references = reference_cells(loaded)
    planned = tuple(trial for trial, _ in found)
    scheduler, reached = loaded.spec.search.scheduler, []
    for trial, some in found:
        rung = None if to_the_end and trial.state == "proposed" else trial.planned_rung(scheduler)
        reached += [planned_up_to(cell, rung, trial.compared_at(scheduler)) for cell in some]
    # They come first, so that they are trained first: no trial is judged before.
    cells = distinct_cells((*(cell for some in references.values() for cell in some), *reached))
    cells = (*cells, *promoted_cells(loaded, planned))
    front = frozenset(front_of(planned, loaded.spec.search))
    ids = {name: tuple(cell.id for cell in some) for name, some in references.items()}
    whole = {trial.number: some for trial, some in found}
    return ExperimentPlan(loaded, cells, build_stage_tree(cells, ledger), ledger, planned, front, ids, whole)


def reach_of(plan: ExperimentPlan) -> Recorded:
    """Return what an experiment reaches as it is planned now."""
    name, file, tree = plan.loaded.spec.name, str(plan.loaded.path.absolute()), plan.tree
    key = f"{FOLDER}/{as_name(name)}-{digest([file, sorted(plan.loaded.overrides)])[:12]}.json"
    states: dict[str, Keep] = dict.fromkeys((*tree.roots, *tree.starts), "weights")
    states |= {state: job.keep for state, job in tree.stage_runs.items()}
    jobs = {cell.name: plan.jobs_of(cell) for cell in plan.cells}
    cells = {cell: [job for job in found if job in states] for cell, found in jobs.items()}
    return Recorded(key, name, file, time.time(), states, frozenset(tree.evaluations), cells)


def record_experiment(plan: ExperimentPlan) -> None:
    """Note what an experiment reaches; call it before looking at what is stored, so that `gc` sees it in time.

    Raises:
        StorageError: the storage cannot be written.
    """
    found = reach_of(plan)
    fields = {name: getattr(found, name) for name in ("name", "file", "when", "states", "cells")}
    plan.ledger.store.write(found.key, dump_note(found.key, {**fields, "evaluations": sorted(found.evaluations)}))

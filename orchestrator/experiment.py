"""Experiment and Cell: what the command line does, from Python and in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from orchestrator.errors import OTHER_STORAGE, UsageError
from orchestrator.hub import fetched
from orchestrator.plan.cell_record import CellRecord
from orchestrator.plan.cells.cell import Cell as PlannedCell
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.plan.documents import plan_document, status_document
from orchestrator.plan.experiment_plan import ExperimentPlan, prepare
from orchestrator.report.cell_folders import log_files, weights_folder
from orchestrator.report.console import (
    print_bench,
    print_check,
    print_plan,
    print_predictions,
    print_row,
    print_sources,
    print_status,
)
from orchestrator.report.documents import Document
from orchestrator.report.experiment_report import ANSWERS, print_report, report_document, report_page
from orchestrator.report.pages import predictions_document, predictions_page, row_page
from orchestrator.report.table import Table, html_table, table_of
from orchestrator.run import RunOutcome, evaluate_experiment, record_scores, run_experiment
from orchestrator.search.search import search_experiment
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.loaded import LoadedExperiment, Source, resolved_yaml
from orchestrator.spec.loader import load_experiment
from orchestrator.storage import Storage

if TYPE_CHECKING:
    import pandas

    from orchestrator.dispatch.ray.jobs import ClusterJob


def load(source: Source, overrides: Sequence[str] = ()) -> Experiment:
    """Load and validate an experiment.

    Args:
        source: The YAML file, or a mapping of the same form; its relative paths start in the file's folder, a
            mapping's in the current one.
        overrides: `a.b=c` settings over it, values in YAML, as after `--set`.

    Raises:
        SpecError: all errors at once, each with its place; in `errors`.
    """
    return Experiment(load_experiment(source, overrides))


def table(experiments: Sequence[Experiment], *, all_metrics: bool = False) -> Table:
    """Return one table over several experiments, each compared with its own baseline.

    A row found in two of them is shown once; a warning names what is left out and would read otherwise.

    Args:
        all_metrics: Every metric, not the headline ones.
    """
    plans = [experiment.planned() for experiment in experiments]
    with ExitStack() as stack:
        for plan in plans:
            stack.enter_context(plan.ledger.snapshot())
        return table_of(plans, all_metrics=all_metrics)


class Experiment:
    """A valid experiment, as `load` returns it. What is stored of it is read anew by every call.

    Attributes:
        loaded: The experiment file's content, its grid, and where each value came from.
    """

    def __init__(self, loaded: LoadedExperiment) -> None:
        self.loaded = loaded

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self.loaded.spec.name

    @property
    def spec(self) -> ExperimentSpec:
        """The values, defaults filled in; axes not applied (each cell has its own)."""
        return self.loaded.spec

    @property
    def notices(self) -> tuple[str, ...]:
        """What one should know: renamed keys, merged cells, checks that are deferred to the run."""
        return self.loaded.notices

    @property
    def storage(self) -> Storage:
        """Where its work is stored."""
        return Storage(experiment=self.loaded)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells of the grid, in order; of a search, those of the trials so far.

        Raises:
            DataError: a data file cannot be read.
        """
        plan = self.planned()
        return tuple(Cell(plan, cell) for cell in plan.cells)

    def cell(self, wanted: str | None = None) -> Cell:
        """Return one cell, by its name, its id's unique beginning, or `axis=value`; None where there is only one.

        Raises:
            UsageError: none or several fit.
        """
        plan = self.planned()
        return Cell(plan, plan.find(wanted))

    def planned(self) -> ExperimentPlan:
        """Return the cells, the stage tree and the ledger as they are now; what the other methods work with."""
        return prepare(self.loaded)

    def plan(self, *, text_tokens: int | None = None) -> Document:
        """Return the cells, the stage tree, what is done already, why the rest runs, and the cost.

        Args:
            text_tokens: Text tokens of a sample; None takes the data's measured mean.
        """
        plan = self.planned()
        with plan.ledger.snapshot():
            document = plan_document(plan.loaded, plan.cells, plan.tree, plan.ledger, text_tokens=text_tokens)
        return Document(document, print_plan)

    def status(self) -> Document:
        """Return what runs where, what is done, waiting or failed and why, and the time left; also of a live run."""
        plan = self.planned()
        with plan.ledger.snapshot():
            return Document(status_document(plan), print_status)

    def table(self, *, all_metrics: bool = False) -> Table:
        """Return the ablation table of what is finished.

        Args:
            all_metrics: Every metric, not the headline ones.
        """
        return table([self], all_metrics=all_metrics)

    def report(self, *, beside: Sequence[Experiment] = (), answers: int = ANSWERS) -> Document:
        """Return all that is known of the experiment; `to_html()` is one file that works offline.

        Args:
            beside: Other experiments in the same report.
            answers: Wrong answers shown of each row, with their pictures; 0 for none.
        """
        plans = [each.planned() for each in (self, *beside)]
        with ExitStack() as stack:
            for plan in plans:
                stack.enter_context(plan.ledger.snapshot())
            return Document(report_document(plans, answers=answers), print_report, report_page)

    def run(
        self,
        *,
        local: bool = False,
        retry_failed: bool = False,
        fail_fast: bool = False,
        max_hours: float | None = None,
        smoke: bool = False,
        console: Console | None = None,
    ) -> RunOutcome:
        """Run what is missing and return how it ended; a failed cell is in its `failed`, not an exception.

        Args:
            local: In this process, without Ray, for a debugger.
            retry_failed: Runs again what failed before.
            fail_fast: Stops at the first failure.
            max_hours: Stops at a checkpoint after so many hours.
            smoke: A trial with model, steps and data made small, in a storage of its own.
            console: Where progress is shown; None takes standard output.

        Raises:
            SpecError: it uses a key that this version cannot run.
            DataError: rows or images cannot be used.
            Interrupted: Ctrl-C, a signal or the last hour stopped it; finished work stays.
        """
        return run_experiment(
            self.loaded, local=local, retry_failed=retry_failed, fail_fast=fail_fast, max_hours=max_hours,
            smoke=smoke, console=console,
        )  # fmt: skip

    def evaluate(
        self,
        cell: str | None = None,
        *,
        local: bool = False,
        retry_failed: bool = False,
        fail_fast: bool = False,
        console: Console | None = None,
    ) -> RunOutcome:
        """Run the evaluations that trained cells lack; nothing is trained, and cells that are not trained are named.

        Args:
            cell: Name, unique beginning of the id, or `axis=value` of the one cell to test; None tests all.
            local: In this process, without Ray, for a debugger.
            retry_failed: Runs again what failed before.
            fail_fast: Stops at the first failure.
            console: Where progress is shown; None takes standard output.

        Raises:
            UsageError: the cell is not there or not trained yet, or this is a search.
            DataError: rows or images cannot be used.
            Interrupted: Ctrl-C or a signal stopped it; finished work stays.
        """
        return evaluate_experiment(
            self.loaded, cell, local=local, retry_failed=retry_failed, fail_fast=fail_fast, console=console
        )

    def record(
        self, cell: str, scores: Mapping[str, float], *, source: str, console: Console | None = None
    ) -> RunOutcome:
        """Record scores that someone else measured, such as a benchmark's server, in the ledger and in MLflow.

        The table marks them. Recording one again replaces it.

        Args:
            cell: Name, unique beginning of the id, or `axis=value` of the cell.
            scores: Names as MLflow has them to values: `{"eval/bench/vqav2_test/accuracy": 78.5}`.
            source: Where they are from.
            console: Where remarks are shown; None takes standard output.

        Raises:
            UsageError: the cell or the evaluation is not there or not done, the metric was measured, or a value is
                not finite.
        """
        return record_scores(self.loaded, cell, scores, source, console)

    def search(
        self,
        *,
        local: bool = False,
        retry_failed: bool = False,
        fail_fast: bool = False,
        max_hours: float | None = None,
        console: Console | None = None,
    ) -> RunOutcome:
        """Run the search that its `search` describes; arguments and errors are those of `run`.

        Raises:
            UsageError: it describes none.
        """
        return search_experiment(
            self.loaded, local=local, retry_failed=retry_failed, fail_fast=fail_fast, max_hours=max_hours,
            console=console,
        )  # fmt: skip

    def submit(
        self,
        address: str,
        *,
        retry_failed: bool = False,
        fail_fast: bool = False,
        max_hours: float | None = None,
        smoke: bool = False,
    ) -> ClusterJob:
        """Run it, or its search, as a job of a Ray cluster; one that does the same already is joined.

        Its file and what that names by relative paths travel; absolute paths must be there.

        Args:
            address: Of the cluster's dashboard: `http://HOST:8265`.
            retry_failed: Runs again what failed before.
            fail_fast: Stops at the first failure.
            max_hours: Stops at a checkpoint after so many hours.
            smoke: A trial with model, steps and data made small, in a storage of its own.

        Returns:
            The job; `follow(print)` writes its log until it ends, `cancel(print)` stops it at a checkpoint.

        Raises:
            UsageError: no cluster answers there, it refuses the token, or the job runs with other options.
            SpecError: it names what cannot travel.
        """
        from orchestrator.dispatch.package import package_of
        from orchestrator.dispatch.ray.jobs import JobServer  # loads ray

        verb = "run" if self.spec.search is None else "search"
        if smoke and verb == "search":
            raise UsageError("a search has no trial run: leave `smoke` out")
        flags = {"--retry-failed": retry_failed, "--fail-fast": fail_fast, "--smoke": smoke}
        options = [flag for flag, wanted in flags.items() if wanted]
        options += [] if max_hours is None else ["--max-hours", f"{max_hours:g}"]
        package = package_of(self.loaded)
        return JobServer(address).submit(package, self.name, verb, self.loaded.overrides, options)

    def jobs(self, address: str) -> list[ClusterJob]:
        """Return the jobs of a Ray cluster that did or do exactly this, the oldest first.

        Args:
            address: Of the cluster's dashboard: `http://HOST:8265`.

        Raises:
            UsageError: no cluster answers there, or it refuses the token.
            SpecError: it names what cannot travel.
        """
        from orchestrator.dispatch.package import package_of
        from orchestrator.dispatch.ray.jobs import JobServer  # loads ray

        return JobServer(address).jobs(package_of(self.loaded), self.name)

    def fetch(self, *, download: bool = True) -> Document:
        """Download what it reads from the Hugging Face hub into the cache there is one of; folders are checked only.

        Args:
            download: Whether anything is downloaded; else it is only said what is missing.

        Returns:
            `complete`, whether a run needs no network, and `sources`, each with where it is or its `problem`.

        Raises:
            SpecError: what was fetched does not go with the rest, which could not be checked without it.
        """
        document = fetched(self.loaded, download=download)
        if download and document["complete"] and self.loaded.path.is_file():
            load_experiment(self.loaded.path, self.loaded.overrides)
        return Document(document, print_sources)

    def check_data(self) -> list[str]:
        """Read every row and image, try each with the model's processor, and return what one should know of them.

        Raises:
            DataError: rows or images cannot be used.
        """
        from orchestrator.data.check import check_uses, uses_of_cells  # loads numpy

        return list(check_uses(uses_of_cells(self._data_cells())).remarks)

    def data_report(self) -> Document:
        """Read every row and image and return all errors by row, and lengths as the model gets them; in `valid`,
        whether the data can be used.

        Raises:
            UsageError: the model's processor cannot be used at all.
        """
        from orchestrator.data.check import check_document  # loads numpy and the processors of transformers

        return Document(check_document(self._data_cells()), print_check)

    def data_row(self, row: int | None = None, *, name: str | None = None) -> Document:
        """Return one row as the model gets it: prompt, what of it is learned, tokens, lengths, pictures.

        Args:
            row: Its index in its file; None for the first.
            name: Entry under `data`; None for what is trained on.

        Raises:
            UsageError: there is no such data set or row.
            DataError: the row cannot be used.
        """
        from orchestrator.data.check import row_document  # loads numpy and the processors of transformers

        return Document(row_document(self._data_cells(), name, row), print_row, row_page)

    def _data_cells(self) -> tuple[PlannedCell, ...]:
        """Return the grid's cells; of a search those that it starts from."""
        return self.planned().cells or expand_cells(self.loaded)

    def bench(
        self,
        *,
        text_tokens: int = 64,
        rows: int | None = None,
        repeats: int = 7,
        chart: Path | None = None,
        on_round: Callable[[int], None] = lambda number: None,
    ) -> Document:
        """Measure the step time of each variant on this machine, beside what the cost formula says.

        Args:
            text_tokens: Text tokens of a sample, all labelled; beside them one image.
            rows: Samples of the micro-batch; None takes the phase's.
            repeats: Rounds in which every variant is timed once; at least 7.
            chart: A PNG to draw it into; None draws it into the storage.
            on_round: Called before each round, 0 for the one that is not counted.

        Raises:
            UsageError: there is no phase, or the model's images are of no fixed size.
        """
        # Late: it imports torch.
        from orchestrator.bench import bench_experiment

        document = bench_experiment(
            self.loaded, text_tokens=text_tokens, rows=rows, repeats=repeats, chart=chart, on_round=on_round
        )
        return Document(document, print_bench)

    def to_yaml(self, *, sources: bool = False) -> str:
        """Return the experiment with defaults filled in and names resolved, as YAML that loads again.

        Args:
            sources: Adds to every value where it came from.
        """
        return resolved_yaml(self.loaded, with_sources=sources)

    def __repr__(self) -> str:
        return f"<Experiment {self.name}: {len(self.loaded.cells)} cells, {self.loaded.path}>"

    def _repr_html_(self) -> str:
        cells = self.cells
        axes = list(dict.fromkeys(axis for cell in cells for axis in cell.axes))
        rows = [[cell.name, cell.id[:12], *(str(cell.axes.get(axis, "")) for axis in axes), cell.status]
                for cell in cells]  # fmt: skip
        return html_table(["cell", "id", *axes, "status"], rows, caption=f"{self.name} ({self.loaded.path})")


@dataclass(frozen=True)
class Cell:
    """One cell of an experiment, and what is stored of it.

    Attributes:
        plan: The plan it is of.
        cell: Its recipe, resolved.
    """

    plan: ExperimentPlan
    cell: PlannedCell

    @property
    def name(self) -> str:
        """Its name."""
        return self.cell.name

    @property
    def id(self) -> str:
        """Its identity: a hash of all values it reaches."""
        return self.cell.id

    @property
    def axes(self) -> dict[str, Any]:
        """Its place in the grid: axis to value."""
        return self.cell.axes

    @property
    def spec(self) -> ExperimentSpec:
        """The experiment as this cell sees it, its axis values applied."""
        return self.cell.spec

    @property
    def status(self) -> str:
        """`new`, `running`, `interrupted`, `trained`, `finished` or `failed`."""
        return self.plan.status(self.cell)

    @property
    def record(self) -> CellRecord:
        """All that the table and MLflow show of it: scores, costs, recipe, hardware and versions."""
        return self.plan.record(self.cell)

    @property
    def metrics(self) -> dict[str, float]:
        """Its scores and costs, under the names MLflow has them."""
        return self.record.summary

    def history(self) -> pandas.DataFrame:
        """Return the curves of training and of evaluations along the way: one row an optimizer step, cumulative over
        phases, one column a metric.
        """
        import pandas

        points = pandas.DataFrame(
            [*self.record.history, *self.record.along], columns=["metric", "value", "step", "time"]
        )
        frame = points.pivot_table(index="step", columns="metric", values="value", aggfunc="last")
        return frame.rename_axis(columns=None)

    @property
    def log_files(self) -> list[Path]:
        """The logs of its stage runs and evaluations, in order."""
        return log_files(self.plan, self.cell)

    def logs(self) -> str:
        """Return what its stage runs and evaluations printed, in order.

        Raises:
            UsageError: it has not run.
        """
        if not (files := self.log_files):
            raise UsageError(
                f"cell {self.name} has no log yet: it has not run in {self.plan.ledger.url}; {OTHER_STORAGE}"
            )
        return "\n".join(f"==> {path} <==\n{path.read_text(errors='replace')}" for path in files)

    @property
    def weights_path(self) -> Path:
        """The folder of its weights; it does not exist before they are trained. Those in a bucket are downloaded.

        Raises:
            DamagedStateError: they are damaged there.
        """
        return weights_folder(self.plan, self.cell)

    def predictions(self, evaluation: str | None = None, under: str | None = None, *, wrong: bool = False) -> Document:
        """Return every answer of an evaluation, with question, pictures and right answer; a page in a notebook.

        Args:
            evaluation: Entry under `evaluate`; None where the cell has one.
            under: What it was tested under; None for `final`, or the only one there is.
            wrong: Leaves out what was answered right.

        Returns:
            A document whose `predictions` are the answers, in the order of the rows.

        Raises:
            UsageError: there is no such evaluation, or it is not done.
        """
        document = predictions_document(self.plan, self.cell, evaluation, under, wrong=wrong)
        return Document(document, print_predictions, predictions_page)

    def export(self, folder: str | Path, *, adapter: bool = False) -> Path:
        """Write it as a Hugging Face folder that transformers loads; `load_exported` attaches its compressor again.

        Args:
            folder: Folder to make.
            adapter: Writes LoRA as a peft adapter beside its base's name; else it is merged.

        Returns:
            The folder, absolute.

        Raises:
            UsageError: the folder holds something, or the cell has no weights.
        """
        from orchestrator.models.export import export_cell  # loads torch and transformers

        return export_cell(self.plan, self.cell, folder, adapter=adapter)

    def __repr__(self) -> str:
        return repr(self.cell)

    def _repr_html_(self) -> str:
        rows = [[name, f"{value:.6g}"] for name, value in self.metrics.items()]
        return html_table(["metric", "value"], rows, caption=f"{self.name} ({self.id[:12]}): {self.status}")

"""CellRecord: all that is shown and tracked of one cell, rebuilt from the ledger at any time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orchestrator.plan.cell_costs import Costs
from orchestrator.plan.cells.cell import PROMOTED, Cell
from orchestrator.plan.cells.identity_fields import data_digest
from orchestrator.plan.identity import canonical_json, digest
from orchestrator.plan.jobs import Action, EvaluationJob, place_of
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.files import is_there
from orchestrator.plan.status import CellStatus, cell_status
from orchestrator.plan.step_history import Point, StepHistory, Stretch, last_metrics
from orchestrator.plan.tree import StageTree
from orchestrator.redaction import redacted
from orchestrator.spec.components import FINAL, EvaluationSpec
from orchestrator.spec.search import measured_by

NOTE = "mlflow.note.content"
"""Tag whose Markdown the dashboard shows as the description, of a run and of an experiment."""
CELL_ID = "cell_id"
"""Tag by which the run of a cell is found."""
_NOTE_LINES = 40
_DATA_DIGITS = 36
_COSTS = Costs()  # one for the process: lengths of data are measured once
AT_MOST = "costs_at_most"
"""Tag of a cell whose operations and tokens by the formula are bounds: a method's tokens depend on the image."""
EVALUATION_TAG = "fingerprint.eval."
_NOTICE_CHARACTERS = 4000  # MLflow takes tags of 8,000 bytes
_VERSIONS = ("python", "torch", "transformers", "deepspeed", "peft")


@dataclass(frozen=True)
class UsedData:
    """A data set that a cell is trained or evaluated on.

    Attributes:
        name: Its entry under `data`.
        digest: Of its rows as they were read, without those left out; 36 digits, the most that MLflow takes.
        kind: Kind of data.
        source: Its entry as JSON.
        uses: `training`, `evaluation`, or both.
    """

    name: str
    digest: str
    kind: str
    source: str
    uses: tuple[str, ...]


@dataclass(frozen=True)
class KeptState:
    """A final state whose weights are kept.

    Attributes:
        state: Its identity in the ledger.
        weights: Folder or URL of its weights.
    """

    state: str
    weights: str


@dataclass(frozen=True)
class CellRecord:
    """One cell as the table and MLflow show it.

    Attributes:
        params: The axes and the headline recipe.
        tags: `cell_id`, `experiment_spec_sha`, hardware, versions, attention, notices (rows left out, and which).
        history: `(key, value, step, timestamp in ms)` by step; steps are cumulative over phases.
        summary: Metrics written once at the end (docs/reference/metrics.md).
        last_step: Step that final scores are of: the last of the cell's way, trained or not. Costs are of step 0.
        artifacts: File name to text, bytes or a file to copy.
        tested: Ids of its evaluations; with the cell's id they say which cells are one measurement.
        along: Points of evaluations along the way, by step, as in `history`. They come later than the steps' own.
        evaluated: How each finished evaluation was done (its fingerprint), by `eval/<name>` as metrics are named; empty
            where it was done before there were any.
        evaluation_notices: What readers of its scores should know, by evaluation.
        recorded: Metrics that someone else measured (`llavolta record`), and the source of each.
        data: Data sets of its phases and evaluations, as far as they can be read here.
        kept: Its final state, where that is trained and its weights are kept.
        id_tag: Tag by which its run in MLflow is found, with `cell_id` as its value; another one for a run that is no
            cell's.
        start_ms: When it began, where that is not the time of its first step.
        artifacts_digest: Digest of what the artifacts are made from, where making them again gives other bytes.
    """

    cell_id: str
    cell_name: str
    status: CellStatus
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    history: StepHistory | Sequence[Point] = field(default=(), repr=False)
    summary: dict[str, float] = field(default_factory=dict)
    last_step: int = 0
    artifacts: dict[str, str | bytes | Path] = field(default_factory=dict, repr=False)
    tested: tuple[str, ...] = ()
    along: tuple[Point, ...] = ()
    evaluated: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    evaluation_notices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    recorded: dict[str, str] = field(default_factory=dict)
    data: tuple[UsedData, ...] = ()
    kept: KeptState | None = None
    id_tag: str = CELL_ID
    start_ms: int | None = None
    artifacts_digest: str = ""


def cell_record(cell: Cell, tree: StageTree, ledger: Ledger, baseline: Cell | None = None) -> CellRecord:
    """Return a cell as its ledger holds it, with what it costs by the formula and the data's measured means.

    Args:
        cell: The cell.
        tree: The tree it is in.
        ledger: Where it is stored.
        baseline: The cell that it is compared with, for evaluations whose summary needs it.
    """
    status = cell_status(cell, tree, ledger)
    resolved = cell.spec.model_dump(mode="json")
    runs = _trained_runs(cell, tree, ledger)
    trained = ledger.is_done(cell.state) if cell.phases else status == "finished"
    results = [(test, found) for test in cell.evaluations if (found := ledger.evaluation(test.id)) is not None]
    evaluated = {test.place: found.get("fingerprint") or {} for test, found in results}
    recorded = _recorded(cell, ledger)
    return CellRecord(
        cell_id=cell.id,
        cell_name=cell.name,
        status=status,
        params=_params(cell),
        tags={
            CELL_ID: cell.id,
            NOTE: _description(cell),
            "experiment_spec_sha": digest(resolved),
            "attention": cell.spec.model.attn_implementation,
            **({"control": "true"} if "control" in cell.axes else {}),
            **({AT_MOST: "true"} if any(map(_COSTS.at_most, cell.phases)) else {}),
            **_fingerprint_tags(runs or ()),
            **_evaluation_tags(evaluated),
            **({"notices": "\n".join(cell.notices)[:_NOTICE_CHARACTERS]} if cell.notices else {}),
            **({"recorded": canonical_json(recorded)[:_NOTICE_CHARACTERS]} if recorded else {}),
            "tree_share": f"{_tree_share(cell, tree):.4f}",
        },
        history=() if runs is None else _history(cell, tree, ledger, runs),
        summary=_summary(cell, ledger, runs or (), baseline, with_costs=trained and runs is not None),
        last_step=max(sum(plan.last_step for plan in cell.phases) - 1, 0),
        artifacts={
            "cell.yaml": yaml.safe_dump(resolved, sort_keys=False),
            **_step_tables(cell),
            **_files(cell, ledger),
        },
        tested=tuple(test.id for test in cell.evaluations),
        along=tuple(_along(cell, ledger)),
        evaluated=evaluated,
        evaluation_notices=_evaluation_notices(results),
        recorded=recorded,
        data=_used_data(cell),
        kept=_kept(cell, ledger) if trained and cell.phases else None,
    )


def _used_data(cell: Cell) -> tuple[UsedData, ...]:
    """Return a cell's data sets: those of its phases, then those of its evaluations that bring none of their own."""
    entries = [("training", entry) for plan in cell.phases for entry in plan.data]
    for test in cell.evaluations:
        name = cell.spec.evaluate[test.name].data
        if name is not None:
            entries.append(("evaluation", {"name": name, "content": test.content, "left_out": test.left_out}))
    found: dict[tuple[str, str], UsedData] = {}
    for use, entry in entries:
        name, content = entry["name"], entry["content"]
        if content is None:
            continue  # without its rows it cannot be told from another
        data = cell.spec.data[name]
        key = name, data_digest(data, content, entry.get("left_out") or ())[:_DATA_DIGITS]
        uses = found[key].uses if key in found else ()
        source = redacted(canonical_json(data.model_dump(mode="json")))
        found[key] = UsedData(*key, data.kind, source, tuple(dict.fromkeys((*uses, use))))
    return tuple(found.values())


def _kept(cell: Cell, ledger: Ledger) -> KeptState | None:
    if not ledger.has(cell.state, "weights"):
        return None
    return KeptState(cell.state, f"{ledger.url}/stage_runs/{cell.state}/weights")


# A finished stage run on a cell's way, as the ledger recorded it: its job and its result.
_Run = tuple[dict[str, Any], dict[str, Any]]


def _trained_runs(cell: Cell, tree: StageTree, ledger: Ledger) -> list[_Run] | None:
    """Return the stage runs that led to the cell's furthest finished state, first to last.

    Followed by the recorded parents, not by the tree: a state may have been trained before another cell cut its way.
    What another experiment trained for it to start from is that one's. None where one before it is missing (damaged
    and made again, or forgotten): a curve that begins midway, or a part of the seconds, would pass for all of it.
    """
    if not cell.phases:
        return []
    first = cell.phases[0].start
    state: str | None = next((run for run in reversed(tree.path_of[cell.id]) if ledger.is_done(run)), None)
    runs: list[_Run] = []
    while state is not None and state != first:
        if (job := ledger.job(state)) is None:
            return None
        if job["type"] == "start":
            state = job["base"]
            continue
        runs.append((job, ledger.result(state) or {}))
        state = job["parent"]
    return runs[::-1]


def _history(cell: Cell, tree: StageTree, ledger: Ledger, runs: Sequence[_Run]) -> StepHistory:
    offsets, before = {}, 0
    for plan in cell.phases:
        offsets[plan.name] = before
        before += plan.total_steps
    stretches = [
        Stretch(ledger.metrics_file(job["id"]), job["first_step"], job["last_step"], offsets.get(job["phase"], 0))
        for job, _ in runs
    ]
    done, path = {job["id"] for job, _ in runs}, tree.path_of[cell.id]
    reached = max((index + 1 for index, run in enumerate(path) if run in done), default=0)
    for run in path[reached : reached + 1]:
        if is_there(work := ledger.metrics_file(run)):
            job = tree.stage_runs[run]
            stretches.append(Stretch(work, job.first_step, job.last_step, offsets.get(job.phase, 0)))
    return StepHistory(stretches)


def _params(cell: Cell) -> dict[str, str]:
    model = cell.spec.model
    params = {
        "model": model.model_name_or_path.rstrip("/").rsplit("/", 1)[-1],
        "weights": model.weights if isinstance(model.weights, str) else canonical_json(model.weights),
        "dtype": model.dtype,
    }
    for plan in cell.phases:
        recipe = plan.recipe
        schedule = recipe.schedule if isinstance(recipe.schedule, str) else recipe.schedule.kind
        rate = recipe.learning_rate
        params |= {
            f"{plan.name}.schedule": schedule,
            f"{plan.name}.total_steps": str(plan.total_steps),
            f"{plan.name}.global_batch_size": str(recipe.global_batch_size),
            f"{plan.name}.learning_rate": canonical_json(rate) if isinstance(rate, dict) else repr(rate),
            f"{plan.name}.train": ",".join(recipe.train),
            f"{plan.name}.seed": str(plan.seed),
        }
        if recipe.lora is not None:
            params[f"{plan.name}.lora_r"] = str(recipe.lora.r)
    # An axis that sets what stands there already is there under that name: each value once. What trials are compared
    # with has it where they have it.
    is_compared = PROMOTED in cell.axes
    axes = {a: text for a, text in _axes(cell).items() if is_compared or params.get(_recipe_name(a)) != text}
    return {**params, **axes}


def _axes(cell: Cell) -> dict[str, str]:
    return {axis: value if isinstance(value, str) else canonical_json(value) for axis, value in cell.axes.items()}


def _recipe_name(axis: str) -> str:
    """Return the name in params of a phase's field: `phases.finetune.schedule` is `finetune.schedule`."""
    return axis.removeprefix("phases.")


def axis_params(cell: Cell) -> dict[str, str]:
    """Return a cell's axes to the names of the params that hold their values."""
    params = _params(cell)
    return {axis: axis if axis in params else _recipe_name(axis) for axis in cell.axes}


def _fingerprint_tags(runs: Sequence[_Run]) -> dict[str, str]:
    """Return the hardware and versions; several where stage runs differ."""
    marks = [result.get("fingerprint") or {} for _, result in runs]

    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(mark[name]) for mark in marks if mark.get(name) is not None))

    workers = all_of("world_size")
    tags = {
        "hardware": f"{workers} x {all_of('device')}" if workers else "",
        "versions": ", ".join(f"{name} {all_of(name)}" for name in _VERSIONS if all_of(name)),
    }
    rest = sorted({name for mark in marks for name in mark} - {"device", *_VERSIONS})
    tags |= {f"fingerprint.{name}": all_of(name) for name in rest}
    return {name: value for name, value in tags.items() if value}


def _evaluation_tags(evaluated: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return one tag an evaluation: how it was done, but for the compressor, as far as all its variants agree."""
    marks: dict[str, list[dict[str, Any]]] = {}
    for place, found in evaluated.items():
        if found:
            marks.setdefault(place.split("/")[1], []).append(flat(found))
    shared = {
        name: {key: value for key, value in one.items() if all(other.get(key) == value for other in rest)}
        for name, (one, *rest) in marks.items()
    }
    return {
        f"{EVALUATION_TAG}{name}": ", ".join(f"{key} {value}" for key, value in same.items() if key != "compressor")
        for name, same in shared.items()
    }


def _evaluation_notices(results: Sequence[tuple[EvaluationJob, Mapping[str, Any]]]) -> dict[str, tuple[str, ...]]:
    """Return the notices of results by evaluation, each once."""
    found: dict[str, dict[str, None]] = {}
    for test, result in results:
        found.setdefault(test.name, {}).update(dict.fromkeys(result.get("notices") or ()))
    return {name: tuple(notices) for name, notices in found.items() if notices}


def flat(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fingerprint without levels: `settings.max_new_tokens`."""
    found: dict[str, Any] = {}
    for key, value in fingerprint.items():
        found |= {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, Mapping) else {key: value}
    return found


def _tree_share(cell: Cell, tree: StageTree) -> float:
    """Return a cell's share of its own cost when each stage run is split evenly over the cells that use it."""
    plans = {plan.name: plan for plan in cell.phases}
    alone = shared = 0.0
    for job in map(tree.stage_runs.__getitem__, tree.path_of[cell.id]):
        plan = plans[job.phase]
        price = _COSTS.stage_run(cell, plan, job.first_step, job.last_step)["train_tflops"]
        cost = price or float((job.last_step - job.first_step) * plan.recipe.global_batch_size)
        alone, shared = alone + cost, shared + cost / len(tree.cells_of[job.id])
    return shared / alone if alone else 1.0


def _summary(
    cell: Cell, ledger: Ledger, runs: Sequence[_Run], baseline: Cell | None, with_costs: bool
) -> dict[str, float]:
    """Return the scores that are there, and with `with_costs` what the cell cost."""
    scores = _all_scores(cell, ledger)
    summary = {**_summaries(cell, ledger, scores, baseline), **scores}
    if not with_costs:
        return summary
    for name, price in _COSTS.cell(cell).items():
        if price is not None:
            summary[f"cost/{name}"] = price
    if not runs:
        return summary
    seconds: dict[str, float] = {}
    samples = 0
    for job, result in runs:
        seconds[job["phase"]] = seconds.get(job["phase"], 0.0) + float(result.get("train_seconds", 0.0))
        samples += (job["last_step"] - job["first_step"]) * job["recipe"]["global_batch_size"]
    total = sum(seconds.values())
    summary["cost/train_seconds"] = total
    summary |= {f"cost/{phase}/train_seconds": value for phase, value in seconds.items()}
    if total > 0:
        summary["cost/samples_per_second"] = samples / total
    summary["cost/peak_memory_gib"] = max(float(result.get("peak_memory_gib", 0.0)) for _, result in runs)
    return summary


def rung_value(cell: Cell, ledger: Ledger, objective: str) -> float | None:
    """Return what a cell is compared by at the rung it is planned up to; None where the objective was not measured.

    Args:
        cell: The cell, with its evaluations there.
        ledger: Where they are stored.
        objective: Name of the metric at the end, such as `eval/vqa/accuracy`.
    """
    tests = [each.job for each in cell.along if each.rung is not None and each.rung == cell.rung]
    if not tests or (measured := measured_by(objective)) is None:
        return None
    entry, metric = measured
    place = place_of(entry, tests[0].under)
    scores = _below(place, {name: value for test in tests for name, value in _scores(test, ledger).items()})
    return {**cell.spec.evaluate[entry].summary(scores, None), **scores}.get(metric)


def _all_scores(cell: Cell, ledger: Ledger) -> dict[str, float]:
    return {name: value for test in cell.evaluations for name, value in _scores(test, ledger).items()}


def _summaries(cell: Cell, ledger: Ledger, scores: Mapping[str, float], baseline: Cell | None) -> dict[str, float]:
    """Return what evaluations make of the scores of their parts, such as a suite's average."""
    found: dict[str, float] = {}
    theirs: dict[str, float] | None = None
    for name, entry in cell.spec.evaluate.items():
        if type(entry).summary is EvaluationSpec.summary:
            continue
        if entry.needs_baseline and baseline is not None and theirs is None:
            theirs = _all_scores(baseline, ledger)
        known = None if theirs is None else _below(place_of(name, FINAL), theirs)
        for under in entry.tested_variants:
            place = place_of(name, under)
            summary = entry.summary(_below(place, scores), known)
            found |= {f"{place}/{metric}": value for metric, value in summary.items()}
    return found


def _below(place: str, scores: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(f"{place}/"): value for name, value in scores.items() if name.startswith(f"{place}/")}


def _scores(test: EvaluationJob, ledger: Ledger) -> dict[str, float]:
    """Return what an evaluation measured under the names of MLflow, or others of it; nothing before it is done."""
    if (result := ledger.evaluation(test.id)) is None:
        return {}
    recorded = {metric: score["value"] for metric, score in result.get("recorded", {}).items()}
    found = {**(result.get("metrics") or {}), **recorded}
    return {f"{test.place}/{metric}": float(value) for metric, value in found.items()}


def _recorded(cell: Cell, ledger: Ledger) -> dict[str, str]:
    return {
        f"{test.place}/{metric}": str(score["source"])
        for test in cell.evaluations
        for metric, score in (ledger.evaluation(test.id) or {}).get("recorded", {}).items()
    }


def _files(cell: Cell, ledger: Ledger) -> dict[str, bytes]:
    """Return what evaluations wrote for elsewhere, under the places of their metrics."""
    return {
        f"{test.place}/{name}": content
        for test in cell.evaluations
        if (ledger.evaluation(test.id) or {}).get("files")
        for name, content in ledger.evaluation_files(test.id).items()
    }


def _along(cell: Cell, ledger: Ledger) -> Iterator[Point]:
    """Return the points of the evaluations along the way; a point's time is that of the last step before it."""
    for each in {each.job.id: each for each in cell.along}.values():
        scores = _scores(each.job, ledger)
        if scores:
            line = last_metrics(ledger.metrics_file(each.job.state)) or {}
            for name, value in scores.items():
                yield name, value, each.last_step, int(line.get("timestamp_ms", 0))


def _step_tables(cell: Cell) -> dict[str, str]:
    """Return what every step of every phase does, for people (CSV) and programs (JSON)."""
    tables = {plan.name: [_step_row(action) for action in plan.table] for plan in cell.phases}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("phase", "first_step", "last_step", "variant"))
    for phase, table in tables.items():
        writer.writerows((phase, *row[:3]) for row in table)
    return {"schedule.json": json.dumps(tables, indent=1) + "\n", "schedule.csv": text.getvalue()}


def _description(cell: Cell) -> str:
    """Return what a cell is, as Markdown: the experiment's description, and what each step is trained under."""
    steps = [
        (plan.name, action) for plan in cell.phases for action in plan.table if action.last_step > action.first_step
    ]
    rows = [f"| {phase} | {act.first_step} to {act.last_step} | {act.variant} |" for phase, act in steps]
    if len(rows) > _NOTE_LINES:
        rows = [*rows[:_NOTE_LINES], f"| … | {len(rows):,} stretches in all: `schedule.csv` | |"]
    table = ["| phase | optimizer steps | under |", "|---|---|---|", *rows] if rows else ["Nothing is trained."]
    return "\n\n".join(filter(None, [cell.spec.description, "\n".join(table)]))


def _step_row(action: Action) -> list[Any]:
    row: list[Any] = [action.first_step, action.last_step, action.variant, list(action.points)]
    more = {} if action.distill is None else {"distill": action.distill.fields()}
    more |= {} if action.students is None else {"students": asdict(action.students)}
    return [*row, more] if more else row

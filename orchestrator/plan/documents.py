"""Documents of an experiment: `plan` (what will run, why, at what cost), `status`, and the hours that both count."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.plan.cell_costs import Costs
from orchestrator.plan.cells.cell import PROMOTED, Cell, PhasePlan, distinct_cells, tested_differently
from orchestrator.plan.cells.identity_fields import resolve_points
from orchestrator.plan.cells.start_from import start_text
from orchestrator.plan.cost import MeasuredRows, compression_ratio, kv_cache_bytes, parameter_count
from orchestrator.plan.experiment_plan import ExperimentPlan, collector_paused
from orchestrator.plan.jobs import Action, EvaluationJob, StageJob
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.files import is_there
from orchestrator.plan.memory import GIB, memory_documents
from orchestrator.plan.reasons import Reasons
from orchestrator.plan.status import CellStatus, TreeStatus, failure_reason
from orchestrator.plan.step_history import last_metrics, read_metrics
from orchestrator.plan.tree import StageTree
from orchestrator.spec.budgets import mean_layer_average, tokens_by_layer
from orchestrator.spec.components import CompressorSpec, adapts
from orchestrator.spec.controls import AXIS, compressing_variants
from orchestrator.spec.infrastructure import ClusterSpec
from orchestrator.spec.loaded import LoadedExperiment
from orchestrator.spec.model_facts import ModelFacts


def variant_documents(
    cells: Sequence[Cell], rows_of: Callable[[Cell], MeasuredRows | None] = lambda cell: None
) -> list[dict[str, Any]]:
    """Return one entry for each distinct variant the cells use.

    Args:
        cells: The cells.
        rows_of: Measured rows of a cell's data, where images vary in size.

    Returns:
        `name`, `control` (the method of a control arm, or None), `points` (`kind`, `layer`, `kept_tokens`),
        `layer_average_tokens`, `compression_ratio` and, where it is known, `kv_cache_bytes`; figures are of one image.
        Where its tokens vary `kept_tokens` is None, and the other two are means over the measured images, None where
        none were measured. With `at_most` they are bounds: how many tokens a method leaves depends on the image.
    """
    found: dict[str, dict[str, Any]] = {}
    seen: set[tuple[Any, ...]] = set()  # cells often hold the very same points
    for cell in cells:
        for name in compressing_variants(cell.spec):
            points = cell.spec.compressors.get(name)
            if points is None:
                continue
            dtype = cell.spec.model.dtype
            key = (name, *map(id, points), id(cell.facts), dtype, cell.axes.get(AXIS))
            if key in seen:
                continue
            seen.add(key)
            rows = rows_of(cell) if cell.facts is not None and cell.facts.visual_grid is None else None
            entry = _entry(name, points, cell.facts, cell.axes.get(AXIS), rows, _NUMBER_BYTES.get(dtype))
            found.setdefault(repr(sorted(entry.items(), key=lambda item: item[0])), entry)
    return list(found.values())


def _entry(
    name: str, points: Sequence[CompressorSpec], facts: ModelFacts | None, control: Any, rows: MeasuredRows | None,
    number_bytes: int | None,
) -> dict[str, Any]:  # fmt: skip
    grid = facts.visual_grid if facts is not None else None
    if facts is None or grid is None:
        shown = [{"kind": point.kind, "layer": point.layer, "kept_tokens": None} for point in points]
        figures: dict[str, Any] = {"layer_average_tokens": None, "compression_ratio": None}
        if facts is not None and rows is not None and rows.images:
            figures |= _mean_figures(points, facts, rows)
    else:
        resolved = resolve_points(points, facts.num_layers, grid, facts.vision_depth)
        solved = [type(point).model_validate(fields) for point, fields in zip(points, resolved, strict=True)]
        total = sum(tokens_by_layer(solved, facts.num_layers, grid))
        figures = {
            "layer_average_tokens": total / facts.num_layers,
            "compression_ratio": compression_ratio(grid, total, facts.num_layers),
        }
        if number_bytes and not facts.tiled and (size := kv_cache_bytes(facts, resolved, number_bytes)) is not None:
            figures["kv_cache_bytes"] = size
        shown, left = [], grid
        for point in solved:
            left = point.kept_grid(left)
            layer = point.resolved_layer(facts.num_layers, facts.vision_depth)
            shown.append({"kind": point.kind, "layer": layer, "kept_tokens": left.tokens})
    return {"name": name, "control": control, "points": shown, **figures, **_bound(adapts(points))}


def _mean_figures(points: Sequence[CompressorSpec], facts: ModelFacts, rows: MeasuredRows) -> dict[str, float]:
    """Return a variant's figures over measured images; none where some are too small for its amount."""
    try:
        resolved = resolve_points(points, facts.num_layers, None, facts.vision_depth, rows.units)
        solved = [type(point).model_validate(fields) for point, fields in zip(points, resolved, strict=True)]
        average = mean_layer_average(solved, facts.num_layers, rows.units)
    except ValueError:
        return {}
    return {"layer_average_tokens": average, "compression_ratio": rows.image_tokens / average}


def _bound(is_bound: bool) -> dict[str, bool]:
    """Return the key that says of figures that they are bounds; none where they are exact."""
    return {"at_most": True} if is_bound else {}


_NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BYTES_WEIGHT = 4  # safetensors in float32
_BYTES_TRAINED = 12  # float32 master weights and two Adam states
_UNKNOWN_WEIGHTS = 10**10  # what a model of unknown sizes is taken for where a limit goes by them


@collector_paused()
def plan_document(
    loaded: LoadedExperiment,
    cells: Sequence[Cell],
    tree: StageTree,
    ledger: Ledger,
    text_tokens: float | None = None,
) -> dict[str, Any]:
    """Return what `plan --json` prints.

    Args:
        loaded: The experiment.
        cells: Its cells.
        tree: Their stage tree.
        ledger: Says what is done.
        text_tokens: Text tokens a sample for the cost figures; None takes the data's measured means.

    Returns:
        `experiment`, `cells`, `stage_runs`, `totals` and `memory` as in docs/reference/json.md, `variants` and
        `notices`. Costs are None where the model's facts are not known. A stage run's `of` is the other experiment that
        a cell starts from and whose stage run it is; None for the cells' own.
    """
    costs, status = Costs(text_tokens), TreeStatus(tree, ledger)
    reasons = Reasons(status, cells, loaded.spec.name)
    runs = []
    own = {state for path in tree.path_of.values() for state in path}
    for job, cell, plan in with_plans(cells, tree):
        price = costs.stage_run(cell, plan, job.first_step, job.last_step)
        of = cell.spec.name if job.id not in own else None
        price |= _bound(costs.at_most(plan, job.first_step, job.last_step))
        runs.append({**stage_run_document(job, plan, status), "of": of, "cost": price})
    alone: dict[str, float | None] = {}
    shown = []
    for cell in cells:
        price = costs.cell(cell)
        alone[cell.id] = _sum([price["train_tflops"], *(costs.cell(each)["train_tflops"] for each in cell.origins())])
        price |= _bound(any(map(costs.at_most, cell.phases)))
        shown.append(_cell(cell, price, status, reasons))
    variants = variant_documents(cells, costs.rows)
    bounds = [
        f"{one['name']}: how many tokens it leaves depends on the image; its costs count the most, and "
        "train/visual_tokens is what ran"
        for one in variants
        if "at_most" in one
    ]
    notices = dict.fromkeys(
        (
            *loaded.notices,
            *(n for cell in cells for n in cell.notices),
            *costs.notices,
            *tested_differently(cells),
            *bounds,
            *_to_promote(loaded, cells),
        )
    )
    return {
        "experiment": loaded.spec.name,
        "cells": shown,
        "stage_runs": runs,
        "variants": variants,
        "memory": memory_documents(cells, loaded.spec.cluster, costs.rows),
        "totals": _totals(loaded, cells, status, alone, runs),
        "notices": list(notices),
    }


def _to_promote(loaded: LoadedExperiment, cells: Sequence[Cell]) -> list[str]:
    """Return a sentence on the cells that a search adds once its trials have ended; none where it has."""
    promote = loaded.spec.search.promote if loaded.spec.search is not None else None
    if promote is None or any(PROMOTED in cell.axes for cell in cells):
        return []
    seeds = len(promote.seeds or loaded.cells)
    beside = "" if promote.baseline is None else f" beside {promote.baseline}"
    return [
        f"search.promote: once the trials have ended, at most {promote.top} of them are run again{beside}, "
        f"{(promote.top + bool(beside)) * seeds} cells ({seeds} of each), which no budget limits"
    ]


def _totals(
    loaded: LoadedExperiment, cells: Sequence[Cell], status: TreeStatus, alone: Mapping[str, float | None],
    runs: Sequence[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    tree, cluster, distinct = status.tree, loaded.spec.cluster, distinct_cells(cells)
    cost_alone, cost_shared = _sum(alone.values()), _sum(run["cost"]["train_tflops"] for run in runs)
    totals = {
        "cells": len(cells),
        "stage_runs": len(runs),
        "stage_runs_alone": sum(map(len, tree.cells_of.values())),
        "stage_runs_done": sum(run["state"] == "done" for run in runs),
        "evaluations": len(tree.evaluations),
        "evaluations_alone": sum(len({job.id for job in cell.tests}) for cell in distinct),
        "evaluations_done": sum(status.evaluation(job) == "done" for job in tree.evaluations),
        "train_tflops_alone": cost_alone,
        "train_tflops_shared": cost_shared,
        "disk_peak_gib": disk_peak_gib(cells, tree),
    }
    bounds = {run["id"] for run in runs if "at_most" in run["cost"]}
    if cost_alone and cost_shared is not None and not bounds:
        totals["train_ratio"] = cost_shared / cost_alone
    return totals | hours_document(status, {run["id"]: run["cost"]["train_tflops"] for run in runs}, cluster, bounds)


def with_plans(cells: Sequence[Cell], tree: StageTree) -> list[tuple[StageJob, Cell, PhasePlan]]:
    """Return the stage runs in order of execution, each with some cell and phase that go through it."""
    plans: dict[str, tuple[Cell, PhasePlan]] = {}
    for cell in cells:
        for owner in (*cell.origins(), cell):
            for plan in owner.phases:
                plans.setdefault(plan.end, (owner, plan))
    children: dict[str, str] = {}
    for job in tree.stage_runs.values():
        children.setdefault(job.parent, job.id)
    for state in reversed(tree.order):
        if state in tree.stage_runs and state not in plans:
            # A state inside a phase always has a child in the same phase, which comes after it in the order.
            plans[state] = plans[children[state]]
    return [(job, *plans[job.id]) for job in tree.stage_runs.values()]


def stage_run_document(job: StageJob, plan: PhasePlan, status: TreeStatus) -> dict[str, Any]:
    """Return a stage run as `plan` and `status` list it, but for its cost."""
    actions = _steps_from(job.table, job.first_step)
    variants = list(dict.fromkeys(action[2] for action in actions))
    return {
        "id": job.id,
        "parent": job.parent if job.parent in status.tree.stage_runs else None,
        "phase": job.phase,
        "variant": variants[0] if len(variants) == 1 else plan.schedule.kind,
        "first_step": job.first_step,
        "last_step": job.last_step,
        "actions": actions,
        "cells": list(status.tree.cells_of[job.id]),
        "state": status.state(job.id),
        "keep": job.keep,
    }


def _steps_from(table: Sequence[Action], first: int) -> list[list[Any]]:
    """Return `[first_step, last_step, variant]` of what is done from a step on, 0-based and half open."""
    return [[max(a.first_step, first), a.last_step, a.variant] for a in table if a.last_step > first]


def _cell(cell: Cell, price: dict[str, float | None], status: TreeStatus, reasons: Reasons) -> dict[str, Any]:
    why = reasons.of(cell)
    return {
        "id": cell.id,
        "name": cell.name,
        "axes": cell.axes,
        "state": "stopped" if cell.rung is not None and status.cell(cell) == "done" else status.cell(cell),
        "stage_runs": list(status.tree.path_of[cell.id]),
        "cost": price,
        "phases": [
            {
                "phase": plan.name,
                "total_steps": plan.total_steps,
                "seed": plan.seed,
                "schedule": _steps_from(plan.table, 0),
                "start_from": start_text(plan.recipe),
            }
            for plan in cell.phases
        ],
        "evaluations": [
            {"name": job.label, "under": job.under, "id": job.id, "state": status.evaluation(job.id)}
            for job in cell.evaluations
        ]
        + [
            {
                "name": each.job.label,
                "under": each.job.under,
                "id": each.job.id,
                "state": status.evaluation(each.job.id),
                "step": each.last_step,
            }
            for each in cell.along
        ],
        "reasons": why,
        "reason": "; ".join(why),
    }


def _sum(values: Any) -> float | None:
    found = list(values)
    return None if None in found else float(sum(found))


def most_checkpoint_bytes(facts: ModelFacts | None) -> float:
    """Return the bytes of a full checkpoint of a model whose weights are all trained, by parameter counts."""
    weights = _UNKNOWN_WEIGHTS if facts is None else sum(parameter_count(facts).values())
    return float((_BYTES_WEIGHT + _BYTES_TRAINED) * weights)


def disk_peak_gib(cells: Sequence[Cell], tree: StageTree) -> float | None:
    """Return an upper bound of what an experiment's ledger holds, by parameter counts; None where they are unknown.

    Weights are float32. A full checkpoint adds master weights and two Adam states of what trains, 12 bytes each.
    Counted: all weights that training starts from, all finished stage runs by what is kept of them, and two checkpoints
    inside a stage run on every lane, at most one a cell.
    """
    counts_of = {cell.id: parameter_count(cell.facts) for cell in cells if cell.facts is not None}
    if any(cell.id not in counts_of for cell in cells):
        return None
    starts: dict[str, Mapping[str, int]] = {}
    for cell in cells:
        for owner in (*cell.origins(), cell):
            starts |= dict.fromkeys((owner.root.id, *(start.id for start in owner.starts)), counts_of[cell.id])
    total = float(_BYTES_WEIGHT * sum(sum(counts.values()) for counts in starts.values()))
    checkpoints = []
    for job in tree.stage_runs.values():
        counts = counts_of[tree.cells_of[job.id][0]]
        weights = _BYTES_WEIGHT * sum(counts.values())
        full = weights + _BYTES_TRAINED * sum(counts.get(part, 0) for part in job.recipe["train"])
        total += {"full": weights + full, "weights": weights, "none": 0.0}[job.keep]
        checkpoints.append(full)
    lanes = len(counts_of) if tree.cluster is None or tree.cluster.lanes == "auto" else tree.cluster.lanes
    return (total + 2 * sum(heapq.nlargest(lanes, checkpoints))) / GIB


# Only ratios between variants count here; the data's real lengths need not be read.
_TEXT_TOKENS = 64.0


def status_document(plan: ExperimentPlan) -> dict[str, Any]:
    """Return the cells, stage runs and evaluations as they stand, who works on what, and the time spent and left.

    A job is `running` where a living driver holds it, `interrupted` where it was begun and nobody does, `waiting`
    where it was begun and a driver of this experiment is busy elsewhere. A cell is `trained` where only evaluations
    are missing, `stopped` where a search stopped it at a rung.
    """
    status, with_phases = TreeStatus(plan.tree, plan.ledger), with_plans(plan.cells, plan.tree)
    busy = not status.holders.keys().isdisjoint((*plan.tree.order, *plan.tree.evaluations))
    runs = [_stage_run_status(status, job, phase, busy) for job, _, phase in with_phases]
    wanted: dict[str, list[str]] = {}
    for cell in plan.cells:
        for test in dict.fromkeys(job.id for job in cell.tests):
            wanted.setdefault(test, []).append(cell.id)
    tests = [_evaluation_status(status, job, wanted[job.id]) for job in plan.tree.evaluations.values()]
    reasons = Reasons(status, plan.cells, None)
    steps = {run["id"]: run["steps_done"] for run in runs}
    costs = Costs(_TEXT_TOKENS)
    work = {
        job.id: costs.stage_run(cell, phase, job.first_step, job.last_step)["train_tflops"]
        for job, cell, phase in with_phases
    }
    bounds = {job.id for job, _, phase in with_phases if costs.at_most(phase, job.first_step, job.last_step)}
    # The work is not exact here, so that hours come from what was measured alone.
    cluster = plan.loaded.spec.cluster.model_copy(update={"device_tflops": None})
    return {
        "experiment": plan.loaded.spec.name,
        "storage": plan.ledger.url,
        "cells": [_cell_status(status, cell, steps, reasons, busy, plan.status) for cell in plan.cells],
        "stage_runs": runs,
        "evaluations": tests,
        "roots": [
            {"id": root, "state": status.state(root), **_about(status, root, status.state(root))}
            for root in (*plan.tree.roots, *plan.tree.starts)
        ],
        "totals": {
            "cells": len(plan.cells),
            "stage_runs": len(runs),
            "stage_runs_done": sum(run["state"] == "done" for run in runs),
            "evaluations": len(tests),
            "evaluations_done": sum(test["state"] == "done" for test in tests),
            **hours_document(status, work, cluster, bounds),
        },
    }


def _cell_status(
    status: TreeStatus, cell: Cell, steps: Mapping[str, int], reasons: Reasons, busy: bool,
    judged: Callable[[Cell], CellStatus],
) -> dict[str, Any]:  # fmt: skip
    path = status.tree.path_of[cell.id]
    done, state = sum(steps[run] for run in path), str(status.cell(cell))
    if state == "new" and (done or any(status.evaluation(job.id) == "done" for job in cell.tests)):
        state = "waiting" if busy else "interrupted" if status.needed_of(cell) else "trained"
    if state == "done":
        state = "finished" if cell.rung is None else judged(cell)
    failure = status.failure(cell)
    return {
        "name": cell.name,
        "id": cell.id,
        "state": state,
        "steps_done": done,
        "steps": sum(plan.last_step for plan in cell.phases),
        "stage_runs": list(path),
        "evaluations": [job.id for job in cell.tests],
        "error": failure[1] if failure else None,
        "log": str(status.ledger.log_file(failure[0])) if failure else None,
        "reasons": reasons.of(cell),
    }


def _stage_run_status(status: TreeStatus, job: StageJob, phase: PhasePlan, busy: bool) -> dict[str, Any]:
    about = stage_run_document(job, phase, status)
    state = about["state"]
    metrics = last_metrics(status.ledger.metrics_file(job.id)) if job.id in status.begun else None
    done = job.last_step - job.first_step if state == "done" else steps_done(job, metrics)
    if state == "new" and done:
        state = "waiting" if busy else "interrupted"
    figures = {key: metrics.get(key) for key in ("step", "loss", "samples_per_second")} if metrics else {}
    return {
        **about,
        "state": state,
        "steps_done": done,
        **({} if state == "done" else figures),
        **_about(status, job.id, state),
    }


def _evaluation_status(status: TreeStatus, job: EvaluationJob, cells: list[str]) -> dict[str, Any]:
    state = status.evaluation(job.id)
    about = {"id": job.id, "name": job.label, "under": job.under, "of": job.state, "state": state, "cells": cells}
    return {**about, **_about(status, job.id, state)}


def _about(status: TreeStatus, identity: str, state: str) -> dict[str, Any]:
    """Return who works on a job, why it failed, and where its log is."""
    holder = status.holders.get(identity) if state == "running" else None
    failure = status.ledger.failure(identity) if state == "failed" else None
    log = status.ledger.log_file(identity) if state != "new" else None
    return {
        "holder": holder and {"lane": holder.lane, "host": holder.host, "pid": holder.pid, "owner": holder.owner},
        "error": failure_reason(failure) if failure else None,
        "log": str(log) if log is not None and is_there(log) else None,
    }


# What platform.processor() or platform.machine() call a CPU; a GPU's name is its product's.
_CPU = re.compile(r"x86_64|amd64|i[3-6]86|aarch64|arm\w*|ppc64\w*|s390x|riscv\w*|.*\b(intel|cpu|processor)\b.*", re.I)


def steps_done(job: StageJob, metrics: Mapping[str, Any] | None) -> int:
    """Return the steps of a stage run under way, from the last line of its metrics."""
    step = job.first_step if metrics is None else int(metrics.get("step", job.first_step - 1)) + 1
    return min(max(step, job.first_step), job.last_step) - job.first_step


def is_gpu(device: str) -> bool:
    """Return whether a fingerprint's `device` is a GPU."""
    return bool(device) and _CPU.fullmatch(device) is None


@dataclass
class _Speed:
    """Seconds and work measured of one kind of stage run at one number of workers."""

    seconds: float = 0.0
    work: float = 0.0
    workers: int = 1


def hours_document(
    status: TreeStatus, work: Mapping[str, float | None], cluster: ClusterSpec, bounds: Collection[str] = ()
) -> dict[str, float]:
    """Return the keys for `totals`; empty where nothing was measured yet and no device's speed is given.

    `gpu_hours_done` (or `worker_hours_done`): hours of all workers, stored work and work under way. Where a speed is
    known also `gpu_hours_left` and `seconds_left` (until the last job is done, evaluations included), and
    `device_tflops` where any of that is estimated by it.

    Args:
        status: What is done, and of which tree.
        work: Stage run to its work in any one unit (TFLOPs); None where that is not known.
        cluster: Lanes, their workers, and the speed of a device, which counts where no stage run of it was measured.
        bounds: Stage runs whose work is an upper bound: their speed says nothing of the others'.
    """
    tree = status.tree
    # Lanes that hold something say more than the spec, which may say `auto`.
    working = {(holder.owner, holder.lane) for holder in status.holders.values()}
    lanes = len(working) or (cluster.lanes if isinstance(cluster.lanes, int) else 1)
    workers = cluster.least_workers
    speeds: dict[tuple[str, tuple[str, bool]], _Speed] = {}
    devices: set[str] = set()
    done, rest = 0.0, dict[str, float]()
    for job in tree.stage_runs.values():
        seconds, share, number = _measured(job, status, workers, devices)
        amount = work[job.id] or float((job.last_step - job.first_step) * job.recipe["global_batch_size"])
        done += seconds * number
        if seconds and share:
            speed = speeds.setdefault((job.phase, _alike(job, bounds)), _Speed())
            speed.seconds, speed.work = speed.seconds + seconds, speed.work + share * amount
            speed.workers = number
        if job.id in status.needed and job.id not in status.blocked:
            rest[job.id] = amount if job.id in status.trained else amount * (1 - share)
    if not done and cluster.device_tflops is None:
        return {}
    unit = "gpu" if (all(map(is_gpu, devices)) if devices else cluster.use_gpu is True) else "worker"
    found = {f"{unit}_hours_done": done / 3600}
    left: dict[str, tuple[float, int]] = {}
    given: dict[str, float] = {}
    for run, amount in rest.items():
        known = _seconds(tree.stage_runs[run], amount, speeds, bounds)
        if known is None and cluster.device_tflops is not None and work[run]:
            known = amount / (cluster.device_tflops * workers), workers
            given = {"device_tflops": cluster.device_tflops}
        if known is None:
            return found
        left[run] = known
    found[f"{unit}_hours_left"] = sum(seconds * number for seconds, number in left.values()) / 3600
    found["seconds_left"] = _until_the_end(status, {run: seconds for run, (seconds, _) in left.items()}, lanes)
    return found | given


def _measured(job: StageJob, status: TreeStatus, workers: int, devices: set[str]) -> tuple[float, float, int]:
    """Return the seconds trained, the share of the stage run that they are for, and the workers they were spent on."""
    result = status.ledger.result(job.id) if job.id in status.trained else None
    if result is not None:
        mark = result.get("fingerprint") or {}
        devices.add(str(mark.get("device", "")))
        return float(result.get("train_seconds") or 0.0), 1.0, int(mark.get("world_size") or workers)
    lines = read_metrics(status.ledger.metrics_file(job.id)) if job.id in status.begun else []
    seconds = sum(float(line.get("step_seconds", 0.0)) for line in lines)
    share = steps_done(job, lines[-1] if lines else None) / (job.last_step - job.first_step)
    return seconds, share, workers


def _seconds(
    job: StageJob, amount: float, speeds: Mapping[tuple[str, tuple[str, bool]], _Speed], bounds: Collection[str]
) -> tuple[float, int] | None:
    """Return the seconds and workers for some work, by the speed of its phase, else of its model's other phase."""
    alike = _alike(job, bounds)
    same_model = (speed for (_, other), speed in speeds.items() if other == alike)
    speed = speeds.get((job.phase, alike)) or next(same_model, None)
    return None if speed is None else (speed.seconds / speed.work * amount, speed.workers)


def _alike(job: StageJob, bounds: Collection[str]) -> tuple[str, bool]:
    """Return what stage runs of comparable speeds share: the model, and that their work is exact or a bound."""
    return str(job.model.get("model_name_or_path")), job.id in bounds


def _until_the_end(status: TreeStatus, seconds_of: Mapping[str, float], lanes: int) -> float:
    """At least the longest way through what is left, and at least all of it divided by the lanes."""
    tree = status.tree
    done = (job for job in tree.evaluations if status.evaluation(job) == "done")
    measured = [status.ledger.evaluation(job) or {} for job in done]
    each = sum(float(r.get("seconds") or 0.0) for r in measured) / len(measured) if measured else 0.0
    total = longest = 0.0
    ends: dict[str, float] = {}
    for state in tree.order:
        job = tree.stage_runs.get(state)
        begin = ends.get(job.parent, 0.0) if job is not None else 0.0
        tests = [job.id for job in tree.evaluations_of.get(state, ()) if status.evaluation(job.id) != "done"]
        tests = [job for job in tests if job not in status.blocked]
        total += seconds_of.get(state, 0.0) + each * len(tests)
        ends[state] = begin + seconds_of.get(state, 0.0)
        longest = max(longest, ends[state] + each * bool(tests))
    return max(longest, total / max(1, lanes))

"""Measures what the stage tree saves: 27 schedules as a tree, and in the same kind of lane with sharing switched off.

    python tests/bench_tree.py --steps 10 --rounds 2 --output tree.json

Three stages of the quickstart model, three variants each. The arms take turns, each in a fresh storage and one lane.
Alone, every cell trains its whole path from a root of its own; data that was read stays in the lane's memory in both
arms. Evaluations run when the clock has stopped. Then every cell's losses, final weights and accuracies are compared,
bit by bit. Times are those the ledger holds: each step's, and the manifest that seals a stage run.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.documents import plan_document
from orchestrator.plan.experiment_plan import ExperimentPlan, prepare
from orchestrator.plan.jobs import EvaluationJob, Job, StageJob
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.tree import StageTree, build_stage_tree

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "experiments" / "quickstart.yaml"
GRID = """
extends: {quickstart}
name: tree
data: {{test: {{max_samples: {test_samples}}}}}
schedules:
  four_stage: null
  three: {{kind: stages, stages: [{{share: 1/3, compressor: heavy}}, {{share: 1/3, compressor: heavy}}, {{}}]}}
phases: {{finetune: {{schedule: three, max_steps: {max_steps}}}}}
cluster: {{storage_path: {storage}}}
report: null
matrix:
  phases.finetune.schedule: null
  schedules.three.stages.0.compressor: [heavy, wide, light]
  schedules.three.stages.1.compressor: [heavy, wide, light]
  schedules.three.stages.2.compressor: [heavy, wide, light]
"""


@dataclass(frozen=True)
class Grove:
    """A tree and the ledger it grows in; `name` stands before its jobs' ids where there are several."""

    name: str
    tree: StageTree
    ledger: Ledger


@dataclass(frozen=True)
class StageTimes:
    """Where the seconds of one stage run in a lane went.

    Attributes:
        came_from: `memory` where the lane held the parent's state, else `ledger`.
        begin: From the seal of the job before to the start of the first step: asking for work, loading.
        steps: Sum of the steps' seconds.
        between: Between the steps: waiting for data, writing metrics.
        save: From the last step to the seal: weights, checkpoint, result.
    """

    came_from: str
    begin: float
    steps: float
    between: float
    save: float

    @property
    def overhead(self) -> float:
        """Seconds beyond steps and checkpoint."""
        return self.begin + self.between


def alone(job: Job, ledger: Ledger, memory: dict[str, Any], should_stop: Callable[[], bool]) -> str:
    """Executor of the arm without sharing: a job named `CELL-ID` is done in the cell's own ledger, as `ID`."""
    from orchestrator.dispatch.run_job import execute

    cell = job.id.partition("-")[0]
    own = Ledger(ledger.storage / cell)
    return execute(renamed(job, lambda name: name.partition("-")[2]), own, memory, should_stop)


def renamed(job: Job, rename: Callable[[str], str]) -> Job:
    """The same job between states of other names."""
    return replace(job, **{key: rename(getattr(job, key)) for key in ("id", "parent", "state") if hasattr(job, key)})


def make_grid(folder: Path, steps: int, test_samples: int) -> ExperimentPlan:
    """The 27 cells with a storage of their own."""
    text = GRID.format(
        quickstart=QUICKSTART, max_steps=3 * steps, test_samples=max(1, test_samples), storage=folder / "runs"
    )
    folder.mkdir(parents=True)
    (folder / "grid.yaml").write_text(text)
    return prepare(folder / "grid.yaml")


def groves_of(walk: ExperimentPlan, shared: bool) -> list[Grove]:
    """One tree of all cells, or one of each."""
    if shared:
        return [Grove("", walk.tree, walk.ledger)]
    return [
        Grove(f"cell{number:02d}", build_stage_tree([cell]), Ledger(walk.ledger.storage / f"cell{number:02d}"))
        for number, cell in enumerate(walk.cells)
    ]


def dispatch(walk: ExperimentPlan, groves: Sequence[Grove], evaluations: bool, local: bool = False) -> dict[str, float]:
    """Does what is missing, either trainings or evaluations, in one lane; returns when each job was begun."""
    from orchestrator.dispatch.driver import Hooks, run_local
    from orchestrator.dispatch.ray.session import run_on_ray
    from orchestrator.dispatch.worker import DEFAULT_EXECUTOR

    begun: dict[str, float] = {}

    class Begun(Hooks):
        def on_event(self, event: Any) -> None:
            if event["event"] == "started":
                begun[event["id"]] = time.time()
            if event["event"] in ("failed", "retried"):
                raise RuntimeError(f"{event['id']}: {event['error']}")

    work: list[Job] = []
    for grove in groves:
        jobs = [job for job in grove.tree.work(grove.ledger) if isinstance(job, EvaluationJob) == evaluations]
        work += [renamed(job, lambda name, g=grove.name: f"{g}-{name}") if grove.name else job for job in jobs]
    executor = "bench_tree:alone" if groves[0].name else DEFAULT_EXECUTOR
    run = run_local if local else run_on_ray
    run(work, walk.ledger, walk.loaded.spec.cluster, Begun(), executor=executor)
    return begun


def run_arm(walk: ExperimentPlan, groves: Sequence[Grove], evaluate: bool) -> dict[str, Any]:
    """Trains an arm and measures it, then evaluates it."""
    start = time.time()
    begun = dispatch(walk, groves, evaluations=False)
    end = time.time()
    jobs = [(job, grove) for grove in groves for job in (*grove.tree.roots.values(), *grove.tree.stage_runs.values())]
    jobs.sort(key=lambda pair: sealed(*pair))
    if evaluate:
        dispatch(walk, groves, evaluations=True)
    return {
        "stage_runs": sum(len(grove.tree.stage_runs) for grove in groves),
        "run_seconds": end - start,
        "lane_seconds": sealed(*jobs[-1]) - min(begun.values()),
        "stages": stage_times(jobs),
    }


def sealed(job: Job, grove: Grove) -> float:
    """When a state was finished: its manifest is written last."""
    return (grove.ledger.state_folder(job.id) / "manifest.json").stat().st_mtime


def stage_times(jobs: Sequence[tuple[Job, Grove]]) -> list[StageTimes]:
    """Times of each stage run of a lane but the first, which waits for the data to be read."""
    found = []
    for (before, owner), (job, grove) in pairwise(jobs[1:]):
        if not isinstance(job, StageJob):
            continue
        lines = steps_of(job, grove)
        first, last = lines[0]["timestamp_ms"] / 1000, lines[-1]["timestamp_ms"] / 1000
        seconds = [line["step_seconds"] for line in lines]
        in_memory = before.id == job.parent and owner is grove and not job.starts_phase
        found.append(
            StageTimes(
                "memory" if in_memory else "ledger",
                begin=first - seconds[0] - sealed(before, owner),
                steps=sum(seconds),
                between=last - first - sum(seconds[1:]),
                save=sealed(job, grove) - last,
            )
        )
    return found


def steps_of(job: Job, grove: Grove) -> list[dict[str, Any]]:
    """Metric lines of a stage run."""
    return [json.loads(line) for line in grove.ledger.metrics_file(job.id).read_text().splitlines()]


def outcome_of(cell: Cell, grove: Grove) -> dict[str, Any]:
    """What must not depend on sharing: losses and rates step by step, final weights, evaluations."""
    states = [grove.tree.stage_runs[state] for state in grove.tree.path_of[cell.id]]
    lines = [line for job in states for line in steps_of(job, grove)]
    notes = [grove.ledger.evaluation(job.id) for job in cell.evaluations]
    return {
        "curves": [(line["step"], line["loss"], line["learning_rate"]) for line in lines],
        "weights": (grove.ledger.state_folder(states[-1].id) / "weights" / "model.safetensors").read_bytes(),
        "evaluations": [None if note is None else note["metrics"] for note in notes],
    }


def compare(cells: Sequence[Cell], shared: Grove, separate: Sequence[Grove]) -> dict[str, int]:
    """How many cells are equal to themselves trained alone."""
    counts = {"cells": len(cells), "curves": 0, "weights": 0, "evaluations": 0}
    for cell, grove in zip(cells, separate, strict=True):
        one, other = outcome_of(cell, shared), outcome_of(cell, grove)
        for key in one:
            counts[key] += one[key] == other[key] and (key != "evaluations" or None not in one[key])
    return counts


def plan_totals(walk: ExperimentPlan) -> dict[str, Any]:
    """What `plan` says of the grid before anything runs."""
    totals = plan_document(walk.loaded, walk.cells, walk.tree, walk.ledger)["totals"]
    share = totals["train_tflops_shared"] / totals["train_tflops_alone"]
    return {**totals, "train_tflops_share": share, "stage_runs_alone": sum(map(len, walk.tree.path_of.values()))}


def summary(rounds: Sequence[dict[str, Any]], plan: dict[str, Any], equal: dict[str, int]) -> dict[str, Any]:
    """All rounds as one JSON document."""
    arms: dict[str, Any] = {}
    for name in ("tree", "alone"):
        runs = [one[name] for one in rounds]
        stages = [stage for run in runs for stage in run["stages"]]
        arms[name] = {
            "stage_runs": runs[0]["stage_runs"],
            **{key: [round(run[key], 2) for run in runs] for key in ("lane_seconds", "run_seconds")},
            "steps_seconds": round(median(stage.steps for stage in stages), 3),
            "save_seconds": round(median(stage.save for stage in stages), 3),
            "overhead_seconds": {
                kind: _spread([s.overhead for s in stages if kind in ("all", s.came_from)])
                for kind in ("all", "memory", "ledger")
            },
            "stages": [asdict(stage) for stage in stages],
        }
    ratio = {
        key: round(median(one["tree"][key] / one["alone"][key] for one in rounds), 3)
        for key in ("lane_seconds", "run_seconds")
    }
    return {"plan": plan, "ratio": ratio, "arms": arms, "equal": equal}


def _spread(values: Sequence[float]) -> dict[str, float]:
    ends = {"median": median(values), "most": max(values)} if values else {}
    return {"count": len(values), **{key: round(value, 3) for key, value in ends.items()}}


def show(found: dict[str, Any]) -> None:
    """Prints the document as a small table."""
    plan, equal = found["plan"], found["equal"]
    print(
        f"plan: {plan['cells']} cells, {plan['stage_runs']} stage runs for {plan['stage_runs_alone']}, train TFLOPs",
        f"{plan['train_tflops_shared']:.2f} / {plan['train_tflops_alone']:.2f} = {plan['train_tflops_share']:.3f}",
    )
    for name, arm in found["arms"].items():
        beyond = arm["overhead_seconds"]
        print(
            f"{name:5}  {arm['stage_runs']} stage runs, lane {arm['lane_seconds']} s, with Ray's start and end",
            f"{arm['run_seconds']} s\n       a stage run (median): steps {arm['steps_seconds']:.2f} s, checkpoint",
            f"{arm['save_seconds']:.2f} s, beyond: {beyond['all']} from memory {beyond['memory']} from the ledger",
            f"{beyond['ledger']}",
        )
    print(f"wall-clock tree / alone (median of rounds): {found['ratio']}")
    print(f"equal to the cell trained alone: {equal}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of a stage")
    parser.add_argument("--rounds", type=int, default=1, help="how often the arms take turns")
    parser.add_argument("--test-samples", type=int, default=100, help="questions a cell is tested on; 0: none")
    parser.add_argument("--output", type=Path, help="JSON file with all numbers")
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        rounds = []
        for number in range(given.rounds):
            walks = {
                name: make_grid(Path(folder) / f"{name}{number}", given.steps, given.test_samples)
                for name in ("tree", "alone")
            }
            groves = {name: groves_of(walk, name == "tree") for name, walk in walks.items()}
            evaluate = number == 0 and given.test_samples > 0
            rounds.append({name: run_arm(walk, groves[name], evaluate) for name, walk in walks.items()})
            if number == 0:
                plan = plan_totals(make_grid(Path(folder) / "plan", given.steps, given.test_samples))
                equal = compare(walks["tree"].cells, groves["tree"][0], groves["alone"])
        found = summary(rounds, plan, equal)
    show(found)
    if given.output is not None:
        given.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

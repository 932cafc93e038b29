"""Measures what `prefer_shared` is worth: the front that a search has reached for the training operations it spent.

    python tests/bench_search.py --seeds 0 1 2 --figure search.png

Each search of `experiments/search_easy_vqa.yaml` runs with and without it, once for each seed of the sampler, one trial
after the other, all in the storage of $LLAVOLTA_STORAGE: what they have in common is trained once, and a second start
goes on. What a search spent is counted as if it were alone, from its trials in order. The front is measured by its
hypervolume (Zitzler and Thiele 1999) beyond the worst accuracy that any trial has and the cost of full tokens, as a
share of that of all searches' trials together.
"""

from __future__ import annotations

import argparse
import json
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orchestrator as llv
from orchestrator.plan.cell_costs import Costs
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.plan.experiment_plan import prepare
from orchestrator.plan.identity import canonical_json
from orchestrator.report.statistics import mean_interval
from orchestrator.search.shared_work import SharedWork

SEARCH = Path(__file__).resolve().parent.parent / "experiments" / "search_easy_vqa.yaml"
ARMS = {"TPE": "false", "TPE, prefer_shared": "true"}
ACCURACY, COST = "eval/vqa/accuracy", "cost/train_tflops"


@dataclass(frozen=True)
class Point:
    """A finished trial: all that its search had spent once it ended, and its objectives."""

    spent: float
    accuracy: float
    cost: float


@dataclass(frozen=True)
class Search:
    """One search: its trials in their order, and its seconds, of which those for what is stored are saved."""

    arm: str
    seed: int
    seconds: float
    points: tuple[Point, ...]


def hypervolume(points: Sequence[Point], worst: float, dearest: float) -> float:
    """Return the area that points reach beyond a worst accuracy and a highest cost."""
    area, best = 0.0, worst
    for point in sorted(points, key=lambda point: (point.cost, -point.accuracy)):
        if point.accuracy > best and point.cost < dearest:
            area, best = area + (point.accuracy - best) * (dearest - point.cost), point.accuracy
    return area


def searched(arm: str, seed: int, given: Sequence[str]) -> Search:
    """Run a search to its end, and return its trials."""
    overrides = [
        "search.promote=null", f"search.algorithm.prefer_shared={ARMS[arm]}", f"search.algorithm.seed={seed}",
        "cluster.lanes=1", *given,
    ]  # fmt: skip
    started = time.monotonic()
    llv.load(SEARCH, overrides).search(local=True)
    seconds = time.monotonic() - started
    plan, spent, trained = prepare(SEARCH, overrides), 0.0, list[str]()
    shared, points = SharedWork(plan.loaded), list[Point]()
    for trial in plan.trials:
        recipe = canonical_json(trial.values)
        spent += shared.added(recipe, trained)
        trained.append(recipe)
        if trial.state == "finished":
            points.append(Point(spent, trial.objectives[ACCURACY], trial.objectives[COST]))
    return Search(arm, seed, seconds, tuple(points))


def draw(searches: Sequence[Search], reached: dict[tuple[str, int], list[float]], path: Path) -> None:
    """Draw the share of the hypervolume over the operations spent, a line a search, one colour an arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    panel = figure.subplots()
    for search in searches:
        number = list(ARMS).index(search.arm)
        spent = [point.spent for point in search.points]
        panel.step(
            spent, reached[search.arm, search.seed], where="post", color=("tab:blue", "tab:orange")[number], alpha=0.8,
            linestyle=("-", "--", ":")[search.seed % 3], marker=".", label=f"{search.arm}, seed {search.seed}",
        )  # fmt: skip
    panel.set_xlabel("training operations that the search spent (TFLOPs)")
    panel.set_ylabel("hypervolume, share of all searches' together")
    panel.grid(alpha=0.25)
    panel.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the searches, print what each reached, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the sampler")
    parser.add_argument("--set", action="append", default=[], help="of the file, as for `llavolta`")
    parser.add_argument("--output", type=Path, help="every trial as JSON")
    parser.add_argument("--figure", type=Path, help="PNG")
    args = parser.parse_args()
    searches = [searched(arm, seed, args.set) for seed in args.seeds for arm in ARMS]
    every = [point for search in searches for point in search.points]
    worst = min(point.accuracy for point in every)
    (full,) = expand_cells(prepare(SEARCH, ["search=null", *args.set]).loaded)
    dearest = float(Costs().cell(full)["train_tflops"] or 0)
    whole = hypervolume(every, worst, dearest)
    reached = {
        (search.arm, search.seed): [
            hypervolume(search.points[: n + 1], worst, dearest) / whole for n in range(len(search.points))
        ]
        for search in searches
    }
    most = min(search.points[-1].spent for search in searches)
    print(
        f"{len(every)} trials; hypervolume beyond accuracy {worst:.3f} and {dearest:.3f} TFLOPs; at {most:.2f} TFLOPs"
    )
    print(f"{'arm':<20}{'seed':>5}{'trials':>8}{'spent':>9}{'reached':>9}{'at equal spending':>19}")
    at_equal: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for search in searches:
        values = reached[search.arm, search.seed]
        there = bisect_right([point.spent for point in search.points], most * (1 + 1e-9))
        at_equal[search.arm].append(values[there - 1])
        spent = search.points[-1].spent
        print(
            f"{search.arm:<20}{search.seed:>5}{len(values):>8}{spent:>9.2f}{values[-1]:>9.3f}{values[there - 1]:>19.3f}"
        )
    plain, shared = at_equal.values()
    gain = mean_interval([with_it - without for with_it, without in zip(shared, plain, strict=True)])
    reach = "" if gain.high is None else f" ± {gain.high - gain.mean:.3f} (95%, {gain.count} seeds)"
    print(f"prefer_shared at equal spending: {gain.mean:+.3f}{reach}")
    if args.figure is not None:
        draw(searches, reached, args.figure)
    if args.output is not None:
        args.output.write_text(json.dumps([asdict(search) for search in searches], indent=1) + "\n")


if __name__ == "__main__":
    main()

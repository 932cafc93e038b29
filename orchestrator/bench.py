"""bench_experiment(): the step of every variant on this machine, beside what the cost formula says it should take."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import StorageError, UsageError
from orchestrator.plan import cost
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.cells.identity_fields import resolve_points
from orchestrator.plan.cost import Sample
from orchestrator.plan.experiment_plan import ExperimentPlan, prepare
from orchestrator.report.figures import bench_figure
from orchestrator.spec.controls import control_points
from orchestrator.spec.loaded import Source
from orchestrator.spec.model_facts import ModelFacts
from orchestrator.spec.phase import PhaseSpec

if TYPE_CHECKING:
    from orchestrator.training.bench import Timing

NamedPoints = tuple[str, tuple[dict[str, Any], ...] | None]
FULL, PLAIN = "full", "plain transformers"
_CONTROL = "stride at the budget of "


def bench_experiment(
    source: Source,
    overrides: Sequence[str] = (),
    *,
    text_tokens: int = 64,
    rows: int | None = None,
    repeats: int = 7,
    chart: Path | None = None,
    on_round: Callable[[int], None] = lambda number: None,
) -> dict[str, Any]:
    """Time the variants of an experiment's first cell and compare them with the cost formula.

    Args:
        source: The experiment: its file, a mapping, or a loaded one.
        overrides: `--set` settings.
        text_tokens: Text tokens of a sample, all labelled; beside them one image.
        rows: Samples of the micro-batch; None takes the phase's.
        repeats: Rounds in which every variant is timed once; at least 7.
        chart: A PNG to draw it into; None: `STORAGE/bench/NAME.png`.
        on_round: Called before each round, 0 for the one that is not counted.

    Returns:
        The document `bench --json` prints, also written to `STORAGE/bench/NAME.json`.

    Raises:
        UsageError: the experiment has no phase, or its model's images are of no fixed size.
        StorageError: the document cannot be written.
    """
    walk = prepare(source, overrides)
    cell = walk.cells[0]
    recipe, facts = _what(walk.loaded.path, cell)
    from orchestrator.training.bench import Arm, measure

    arms = _arms(cell, facts)
    rows = rows or (recipe.per_device_train_batch_size if isinstance(recipe.per_device_train_batch_size, int) else 1)
    timings = measure(
        cell.spec.model, recipe, facts, [Arm(*arm) for arm in arms],
        rows=rows, text_tokens=text_tokens, repeats=repeats, on_round=on_round,
    )  # fmt: skip
    document = {
        "experiment": cell.spec.name,
        **_machine(),
        **cell.spec.model.model_dump(include={"dtype", "attn_implementation"}),
        "rows": rows,
        "visual_tokens": facts.image_grid.tokens,
        "text_tokens": text_tokens,
        "repeats": repeats,
        "variants": _rows(arms, timings, facts, recipe, rows, text_tokens),
    }
    _write(walk, cell, document, chart)
    return document


def _what(path: Path, cell: Cell) -> tuple[PhaseSpec, ModelFacts]:
    recipe = cell.spec.phases.finetune or cell.spec.phases.pretrain
    if recipe is None:
        raise UsageError(f"{path}: bench times the steps of a phase, and there is none")
    if cell.facts is None or not cell.facts.priced:
        raise UsageError(
            f"model.model_name_or_path: {cell.spec.model.model_name_or_path} has no fixed number of visual tokens an "
            "image, so its batch cannot be made up; bench takes models whose images are of one size"
        )
    return recipe, cell.facts


def _arms(cell: Cell, facts: ModelFacts) -> list[NamedPoints]:
    """Return the plain transformers, full tokens, every variant, and a plain drop at the budget of each variant that
    selects.
    """
    arms: list[NamedPoints] = [(PLAIN, None), (FULL, ())]
    for name, points in cell.spec.compressors.items():
        arms.append((name, resolve_points(points, facts.num_layers, facts.image_grid)))
    known = {_budget(points, facts) for _, points in arms if points and points[0]["kind"] == "stride"}
    for name, points in cell.spec.compressors.items():
        control = resolve_points(control_points("stride", points, facts), facts.num_layers, facts.image_grid)
        if _budget(control, facts) not in known:
            known.add(_budget(control, facts))
            arms.append((_CONTROL + name, control))
    return arms


def _rows(
    arms: Sequence[NamedPoints],
    timings: Mapping[str, Timing],
    facts: ModelFacts,
    recipe: PhaseSpec,
    rows: int,
    text_tokens: int,
) -> list[dict[str, Any]]:
    tokens, what = rows * (facts.image_grid.tokens + text_tokens), recipe.model_dump()

    def tflops(points: tuple[dict[str, Any], ...] | None) -> float:
        # The plain model computes logits for every token.
        labels = text_tokens if points is not None else text_tokens + facts.image_grid.tokens
        return rows * cost.train_tflops_per_sample(facts, points or (), Sample(text_tokens, labels), what)

    full_seconds, full_tflops = timings[FULL].median_seconds, tflops(())
    controls = {_budget(points, facts): name for name, points in arms if points and points[0]["kind"] == "stride"}

    def row(name: str, points: tuple[dict[str, Any], ...] | None) -> dict[str, Any]:
        timing, seconds = timings[name], timings[name].median_seconds
        control = controls.get(_budget(points, facts)) if points else None
        speedup, predicted = full_seconds / seconds, full_tflops / tflops(points)
        return {
            "name": name,
            "points": None if points is None else list(points),
            "step_seconds": seconds,
            "all_seconds": timing.seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gib": timing.peak_memory_gib,
            "train_tflops": tflops(points),
            "visual_layer_tokens": cost.visual_layer_tokens(facts.image_grid, points or (), facts.num_layers),
            "speedup_measured": speedup,
            "speedup_predicted": predicted,
            "ratio": speedup / predicted,
            # What choosing costs: the same tokens dropped by position, in the same rounds.
            "overhead": None
            if control in (None, name)
            else (seconds - timings[str(control)].median_seconds) / full_seconds,
        }

    return [row(name, points) for name, points in arms]


def _budget(points: Sequence[dict[str, Any]], facts: ModelFacts) -> tuple[int, ...]:
    return tuple(cost.visual_tokens_by_layer(facts.image_grid, points, facts.num_layers))


def _machine() -> dict[str, Any]:
    import torch

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _write(walk: ExperimentPlan, cell: Cell, document: dict[str, Any], chart: Path | None) -> None:
    folder = walk.ledger.storage / "bench"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{cell.spec.name}.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
        bench_figure(document, chart or folder / f"{cell.spec.name}.png")
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error}") from error

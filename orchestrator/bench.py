"""bench_experiment(): the step of every variant on this machine, beside what the cost formula says it should take."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.compression import attach
from orchestrator.data.processing.encode import IGNORED_LABEL, collate
from orchestrator.data.processing.encode import Sample as Encoded
from orchestrator.data.processing.processor import load_processor
from orchestrator.data.records.row_index import open_rows
from orchestrator.data.rows import ImageRef
from orchestrator.errors import DataError, StorageError, UsageError
from orchestrator.machine import processor_name, reset_peak_memory, resident_peak_bytes
from orchestrator.models.build import compute_dtype, model_from_config
from orchestrator.models.parts import COMPRESSOR, set_trainable
from orchestrator.plan import cost
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.cells.identity_fields import resolve_points
from orchestrator.plan.cost import MeasuredRow, MeasuredRows, Sample
from orchestrator.plan.experiment_plan import ExperimentPlan, prepare
from orchestrator.report.figures import bench_figure
from orchestrator.spec.components import CompressorSpec, adapts
from orchestrator.spec.controls import control_points
from orchestrator.spec.image_units import ImageUnits
from orchestrator.spec.loaded import Source
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.model_facts import ModelFacts, UnitRules, find_config
from orchestrator.spec.phase import PhaseSpec
from orchestrator.training.engine import checkpoint_activations

Points = tuple[dict[str, Any], ...]
MIN_REPEATS = 7
FULL, PLAIN = "full", "plain transformers"
_PICTURE_ROWS = 500
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
        text_tokens: Text tokens of a sample, all labelled; beside them one image: made up, or where images vary in size
            the image or video of median tokens among the data's.
        rows: Samples of the micro-batch; None takes the phase's.
        repeats: Rounds in which every variant is timed once; at least 7.
        chart: A PNG to draw it into; None: `STORAGE/bench/NAME.png`.
        on_round: Called before each round, 0 for the one that is not counted.

    Returns:
        The document `bench --json` prints, also written to `STORAGE/bench/NAME.json`.

    Raises:
        UsageError: the experiment has no phase, its model's costs are not known, or its images vary in size and none of
            the data can be taken.
        StorageError: the document cannot be written.
    """
    walk = prepare(source, overrides)
    cell = walk.cells[0]
    recipe, facts = _what(walk.loaded.path, cell)
    picture = None if facts.priced else _picture(cell, recipe)
    arms = _arms(cell, facts, picture)
    rows = rows or (recipe.per_device_train_batch_size if isinstance(recipe.per_device_train_batch_size, int) else 1)
    timings = measure(
        cell.spec.model, recipe, facts, arms,
        rows=rows, text_tokens=text_tokens, repeats=repeats, on_round=on_round, picture=picture,
    )  # fmt: skip
    document = {
        "experiment": cell.spec.name,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **cell.spec.model.model_dump(include={"dtype", "attn_implementation"}),
        "rows": rows,
        "visual_tokens": _tokens(facts, picture),
        **({} if picture is None else {"image_size": list(picture.size), "frames": picture.frames or None}),
        "text_tokens": text_tokens,
        "repeats": repeats,
        "variants": _rows(arms, timings, facts, recipe, rows, text_tokens, picture),
    }
    _write(walk, cell, document, chart)
    return document


def _what(path: Path, cell: Cell) -> tuple[PhaseSpec, ModelFacts]:
    recipe = cell.spec.phases.finetune or cell.spec.phases.pretrain
    if recipe is None:
        raise UsageError(f"{path}: bench times the steps of a phase, and there is none")
    facts, name = cell.facts, cell.spec.model.model_name_or_path
    if facts is None or (reason := cost.unpriced(facts, recipe)) is not None:
        why = "its sizes are not known" if facts is None else reason
        raise UsageError(f"model.model_name_or_path: what a step of {name} should take is not known: {why}")
    return recipe, facts


@dataclass(frozen=True)
class Picture:
    """An image or video of the data, for models whose images vary in size.

    Attributes:
        image: The file.
        size: Height and width in pixels.
        frames: Frames that are taken of a video; 0 of an image.
        units: What it becomes, alone in its row.
    """

    image: ImageRef
    size: tuple[int, int]
    frames: int
    units: ImageUnits

    def sample(self, text_tokens: int, label_tokens: int) -> Sample:
        """Return a row of it and some text."""
        text = text_tokens + self.units.markers
        rows = MeasuredRows((MeasuredRow(1.0, text, label_tokens, (self.units,)),))
        return Sample(text, label_tokens, 1.0, rows)


def _picture(cell: Cell, recipe: PhaseSpec) -> Picture:
    """Return the image or video of median tokens among those of up to 500 rows of the phase's first data set."""
    name, revision = cell.spec.model.model_name_or_path, cell.spec.model.revision
    first = recipe.data if isinstance(recipe.data, str) else next(iter(recipe.data))
    config = find_config(name, revision)
    try:
        if config is None:
            raise ValueError(f"{name} is not here")
        rules, rows = UnitRules(config.parent), open_rows(cell.spec.data[first]).spread(_PICTURE_ROWS)
        images = [image for row in rows for image in row.images]
        shapes = dict(zip(images, map(tuple, rows.image_shapes.tolist()), strict=True))
        found = [
            Picture(image, (height, width), frames, rules.units((frames, height, width), True))
            for image, (frames, height, width) in shapes.items()
        ]
        if not found:
            raise ValueError(f"data.{first} has no image and no video")
    except (ValueError, OSError, DataError) as error:
        raise UsageError(
            f"model.model_name_or_path: {name} has no fixed number of visual tokens an image, and bench can take none "
            f"of the data: {error}"
        ) from error
    return sorted(found, key=lambda one: one.units.tokens)[len(found) // 2]


def _tokens(facts: ModelFacts, picture: Picture | None) -> int:
    return facts.image_grid.tokens if picture is None else picture.units.tokens


def _resolved(points: Sequence[CompressorSpec], facts: ModelFacts, picture: Picture | None) -> Points:
    if picture is None:
        return resolve_points(points, facts.num_layers, facts.image_grid, facts.vision_depth)
    images = [(1.0, picture.units.grids)]
    return resolve_points(points, facts.num_layers, facts.visual_grid, facts.vision_depth, images)


def _arms(cell: Cell, facts: ModelFacts, picture: Picture | None) -> dict[str, Points | None]:
    """Return the plain transformers, full tokens, every variant, and a plain drop at the budget of each variant that
    selects.
    """
    if unsure := [name for name, points in cell.spec.compressors.items() if adapts(points)]:
        raise UsageError(
            f"compressors.{unsure[0]}: how many tokens it leaves depends on the image, and bench makes its images up; "
            f"take it out (--set compressors.{unsure[0]}=null) and time it in a run"
        )
    arms: dict[str, Points | None] = {PLAIN: None, FULL: ()}
    for name, points in cell.spec.compressors.items():
        arms[name] = _resolved(points, facts, picture)
    known = {_budget(points, facts, picture) for points in arms.values() if points and points[0]["kind"] == "stride"}
    for name, points in cell.spec.compressors.items():
        try:
            control = _resolved(control_points("stride", points, facts), facts, picture)
        except ValueError:
            continue  # it has none
        if _budget(control, facts, picture) not in known:
            known.add(_budget(control, facts, picture))
            arms[_CONTROL + name] = control
    return arms


def _rows(
    arms: Mapping[str, Points | None],
    timings: Mapping[str, Timing],
    facts: ModelFacts,
    recipe: PhaseSpec,
    rows: int,
    text_tokens: int,
    picture: Picture | None,
) -> list[dict[str, Any]]:
    beside = 0 if picture is None else picture.units.markers
    tokens, what = rows * (_tokens(facts, picture) + text_tokens + beside), recipe.model_dump()

    def sample(labels: int) -> Sample:
        return Sample(text_tokens, labels) if picture is None else picture.sample(text_tokens, labels)

    def tflops(points: Points | None) -> float:
        # The plain model computes logits for every token.
        labels = text_tokens if points is not None else tokens // rows
        return rows * cost.train_tflops_per_sample(facts, points or (), sample(labels), what)

    def run_tflops(name: str, points: Points | None) -> float:
        one = sample(text_tokens)
        unread = cost.unread_tflops_per_sample(facts, points or (), one, what) if timings[name].trims_last_layer else 0
        return tflops(points) + rows * (cost.unused_tower_tflops_per_sample(facts, points or (), one) - unread)

    full, full_tflops = timings[FULL].seconds, run_tflops(FULL, ())
    dropped = {name: points for name, points in arms.items() if points and points[0]["kind"] == "stride"}
    controls = {_budget(points, facts, picture): name for name, points in dropped.items()}

    def row(name: str, points: Points | None) -> dict[str, Any]:
        timing, seconds = timings[name], timings[name].median_seconds
        control = controls.get(_budget(points, facts, picture)) if points else None
        # Round by round, since a machine's speed drifts by more than what is to be told.
        speedup = median(one / own for one, own in zip(full, timing.seconds, strict=True))
        predicted = full_tflops / run_tflops(name, points)
        return {
            "name": name,
            "points": None if points is None else list(points),
            "step_seconds": seconds,
            "all_seconds": timing.seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gib": timing.peak_memory_gib,
            "train_tflops": tflops(points),
            "run_tflops": run_tflops(name, points),
            "visual_layer_tokens": round(cost.image_layer_tokens(facts, points or (), sample(0).rows)),
            "speedup_measured": speedup,
            "speedup_predicted": predicted,
            "ratio": speedup / predicted,
            # What choosing costs: the same tokens dropped by position, in the same rounds.
            "overhead": None
            if control in (None, name)
            else median(
                (own - dropping) / one
                for own, dropping, one in zip(timing.seconds, timings[str(control)].seconds, full, strict=True)
            ),
        }

    return [row(name, points) for name, points in arms.items()]


def _budget(points: Sequence[dict[str, Any]], facts: ModelFacts, picture: Picture | None) -> tuple[int, ...]:
    """Return an image's tokens in each layer, those of the vision tower as points inside of it leave them."""
    if picture is not None:
        return cost.image_tokens_by_layer(picture.units.grids, points, facts.num_layers)
    inside = [point for point in points if str(point["layer"]).startswith("tower:")]
    tower = cost.tower_tokens_by_layer(facts, inside)
    return (*tower, *cost.visual_tokens_by_layer(facts.image_grid, points, facts.num_layers))


def _write(walk: ExperimentPlan, cell: Cell, document: dict[str, Any], chart: Path | None) -> None:
    folder = walk.ledger.storage / "bench"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{cell.spec.name}.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
        bench_figure(document, chart or folder / f"{cell.spec.name}.png")
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error}") from error


@dataclass
class Timing:
    """Time and memory of an arm.

    Attributes:
        seconds: Wall-clock time of each forward and backward.
        peak_memory_gib: Largest GPU memory, or resident memory on the CPU, over its repeats.
        trims_last_layer: The last decoder layer ran only for tokens whose logits a label needs.
    """

    seconds: list[float] = field(default_factory=list)
    peak_memory_gib: float = 0.0
    trims_last_layer: bool = False

    @property
    def median_seconds(self) -> float:
        """Median of the repeats."""
        return median(self.seconds)


def synthetic_batch(
    facts: ModelFacts, config: Any, rows: int, text_tokens: int, device: torch.device
) -> dict[str, Any]:
    """Return rows of one image and then `text_tokens` labelled text tokens, drawn at random."""
    vision = config.vision_config
    size = vision.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    visual = facts.image_grid.tokens
    generator = torch.Generator().manual_seed(0)
    image_token = int(config.image_token_id)
    other_token = 0 if image_token else 1
    text_BT = torch.randint(0, facts.vocab_size, (rows, text_tokens), generator=generator)
    text_BT = text_BT.masked_fill(text_BT == image_token, other_token)
    input_ids = torch.cat([torch.full((rows, visual), image_token), text_BT], dim=1)
    batch: dict[str, Tensor] = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.cat([torch.full((rows, visual), IGNORED_LABEL), text_BT], dim=1),
        "pixel_values": torch.randn(rows, vision.num_channels, int(height), int(width), generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def processed_batch(
    model_spec: ModelSpec, picture: Picture, vocab_size: int, rows: int, text_tokens: int, device: torch.device
) -> dict[str, Any]:
    """Return rows of one image or video, as the model's own processor gives it, then `text_tokens` labelled text tokens
    drawn at random.

    Raises:
        UsageError: the processor makes something else of the image than the cost formula counts.
    """
    processor = load_processor(model_spec)
    (text,) = processor.images.texts([picture.image])
    written = np.asarray(processor.tokenizer.encode(text.text, add_special_tokens=False))
    placeholders = np.isin(written, processor.placeholder_ids)
    if placeholders.sum() != len(text.runs) or text.num_visual_tokens != picture.units.tokens:
        raise UsageError(
            f"bench: the processor writes {text.num_visual_tokens} visual tokens for {picture.image.path}, "
            f"{picture.size[0]} x {picture.size[1]} pixels, and the cost formula counts {picture.units.tokens}"
        )
    repeats = np.ones(len(written), dtype=np.int64)
    repeats[placeholders] = text.runs
    shown = np.repeat(written, repeats)
    drawn = np.random.default_rng(0)
    other = next(token for token in range(vocab_size) if token not in processor.placeholder_ids)
    samples = []
    for _ in range(rows):
        spoken = drawn.integers(0, vocab_size, text_tokens)
        spoken[np.isin(spoken, [*processor.placeholder_ids, *written])] = other
        ids = np.concatenate([shown, spoken]).astype(np.int32)
        labels = np.concatenate([np.full(len(shown), IGNORED_LABEL), spoken]).astype(np.int32)
        samples.append(Encoded(ids, labels, (picture.image,), text.num_visual_tokens))
    return {name: tensor.to(device) for name, tensor in collate(samples, processor).items()}


def measure(
    model_spec: ModelSpec,
    recipe: PhaseSpec,
    facts: ModelFacts,
    arms: Mapping[str, Points | None],
    *,
    rows: int,
    text_tokens: int,
    repeats: int,
    on_round: Callable[[int], None] = lambda number: None,
    picture: Picture | None = None,
) -> dict[str, Timing]:
    """Time every arm once in each of `repeats` rounds, in another order each round, after a warm-up round.

    A step is the forward and backward pass of one micro-batch of a randomly initialised model under the phase's
    recipe (what trains, checkpointing, dtype); optimizer, communication and data loading are excluded.

    Args:
        model_spec: The model.
        recipe: The phase.
        facts: The model's facts.
        arms: Points by name; None is the plain transformers model without an attachment.
        rows: Samples of the micro-batch, one image each.
        text_tokens: Text tokens of a sample, all labelled.
        repeats: Rounds, at least 7.
        on_round: Called before each round with its number, 0 for the warm-up.
        picture: Each sample's image where images vary in size; else one is made up.

    Returns:
        Timings by name.

    Raises:
        UsageError: too few repeats, or the model cannot be built.
    """
    if repeats < MIN_REPEATS:
        raise UsageError(f"bench: {repeats} repeats are too few for a median; give at least {MIN_REPEATS}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(model_spec, recipe, device)
    if picture is None:
        batch = synthetic_batch(facts, model.config, rows, text_tokens, device)
    else:
        batch = processed_batch(model_spec, picture, facts.vocab_size, rows, text_tokens, device)
    batch |= {name: value.to(model.dtype) for name, value in batch.items() if name.startswith("pixel_values")}
    timings = {name: Timing() for name in arms}
    for number in range(repeats + 1):
        on_round(number)
        # Another order each round: the state an arm leaves the allocator in costs the next one time.
        for name in random.Random(number).sample(list(arms), len(arms)):
            seconds, peak_gib, timings[name].trims_last_layer = _step(model, arms[name], batch, device)
            if number:
                timings[name].seconds.append(seconds)
                timings[name].peak_memory_gib = max(timings[name].peak_memory_gib, peak_gib)
    return timings


def _model(model_spec: ModelSpec, recipe: PhaseSpec, device: torch.device) -> Any:
    """Return the model with random weights, set up as the phase trains it."""
    torch.manual_seed(0)
    model: Any = model_from_config(model_spec).to(device, getattr(torch, compute_dtype(model_spec))).train()
    parts = [part for part in recipe.train if part != COMPRESSOR]  # learned modules come with their points
    if parts:
        set_trainable(model, parts, lora=False)
    else:
        model.requires_grad_(False)
    if recipe.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def _step(
    model: nn.Module, points: Points | None, batch: dict[str, Any], device: torch.device
) -> tuple[float, float, bool]:
    attachment = None if points is None else attach(model, list(points))
    try:
        model.zero_grad(set_to_none=True)
        _wait(device)
        reset_peak_memory()
        start = time.perf_counter()
        model(**batch, use_cache=False).loss.backward()
        _wait(device)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_peak_bytes()
        return seconds, peak / 2**30, attachment is not None and attachment.trims_last_layer
    finally:
        if attachment is not None:
            attachment.detach()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()

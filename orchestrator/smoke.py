"""`run --smoke`: an experiment made small enough for a minute or two, in a storage of its own that begins empty."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.plan.cell_costs import Costs
from orchestrator.plan.cells.cell import Cell, PhasePlan
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.plan.cells.identity_fields import resolve_points
from orchestrator.plan.experiment_plan import ExperimentPlan, storage_path
from orchestrator.plan.identity import digest
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.tree import build_stage_tree
from orchestrator.spec.components import Points, ScheduleSpec
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.infrastructure import ClusterSpec
from orchestrator.spec.loaded import LoadedExperiment, resolved_yaml
from orchestrator.spec.phase import PhaseSpec

ROWS = 64
LEAST_STEPS, MOST_STEPS = 8, 64
MOST_LAYERS = 16
_MICRO_BATCH = 2
_LIMITS = {"batch_size": 16, "max_new_tokens": 8}


@dataclass(frozen=True)
class Machine:
    """What a trial run may use here.

    Attributes:
        attentions: Attention implementations that work.
        dtypes: Compute types that work.
    """

    cpus: int
    gpus: int
    attentions: frozenset[str]
    dtypes: frozenset[str]


@dataclass(frozen=True)
class LayerMap:
    """Where layers of a deep model lie in a shallow one: in order, and apart from each other where they can be.

    Attributes:
        depth: Layers of the deep model.
        small_depth: Layers of the shallow one.
        at: Layer in use to its place.
        tower_depth: Layers of the deep model's vision tower; None where no variant acts inside of it.
        tower: Layer of the vision tower in use to its place.
    """

    depth: int
    small_depth: int
    at: dict[int, int]
    tower_depth: int | None = None
    tower: dict[int, int] = field(default_factory=dict)

    def place(self, layer: int | str) -> int | str:
        """Return the place of a resolved `layer` of a point."""
        if isinstance(layer, int):
            return self.at.get(layer, 0)
        inside = layer.startswith("tower:") and layer.removeprefix("tower:")
        return f"tower:{self.tower[int(inside)]}" if inside else layer


@dataclass(frozen=True)
class SmallModel:
    """A model as a trial run takes it: its folder and where its layers lie now."""

    folder: Path
    layers: LayerMap


def map_layers(depth: int, used: Iterable[int]) -> LayerMap:
    """Return the four layers, or so many that those in use stay apart, at most 16; layer 0 stays 0, and no other
    becomes 0.
    """
    wanted = sorted({layer for layer in used if 0 <= layer < depth})
    small = min(depth, max(4, min(len(wanted) + 1, MOST_LAYERS)))
    places = {layer: layer * small // depth for layer in wanted}
    if len(wanted) < small < depth:
        below = -1
        for number, layer in enumerate(wanted):
            room = small - len(wanted) + number  # those above need a place each
            places[layer] = below = min(max(places[layer], below + 1, min(layer, 1)), room)
    return LayerMap(depth, small, places)


def layers_in_use(spec: ExperimentSpec, depth: int) -> set[int]:
    """Return the decoder layers at which a cell's variants act, those a ramp moves between included."""
    points = [point for variant in _variants(spec).values() for point in variant]
    found = {point.layer_index(depth) for point in points if point.place == "decoder"}
    schedules = [*spec.schedules.values(), *(p.schedule for p in (spec.phases.pretrain, spec.phases.finetune) if p)]
    for schedule in schedules:
        fields = schedule.model_dump() if isinstance(schedule, ScheduleSpec) else {}
        if fields.get("kind") == "ramp" and fields["key"] == "layer":
            found |= {value for value in (fields["start"], fields["end"]) if isinstance(value, int)}
    return found


def tower_layers_in_use(spec: ExperimentSpec, tower_depth: int) -> set[int]:
    """Return the layers of a vision tower of `tower_depth` at which a cell's variants act."""
    found = (point.tower_index(tower_depth) for variant in _variants(spec).values() for point in variant)
    return {layer for layer in found if layer is not None}


def map_tower_layers(used: Iterable[int]) -> dict[int, int]:
    """Return where each layer in use of a vision tower lies in a small one: 0 stays 0, the others follow without
    gaps.
    """
    return {layer: number for number, layer in enumerate(sorted({0, *used}))}


def smoke_spec(cell: Cell, small: SmallModel, machine: Machine, storage: str, local: Path) -> ExperimentSpec:
    """Return a cell's experiment made small.

    Args:
        cell: The cell at its full size.
        small: The model in place of its own.
        machine: What there is.
        storage: Where the trial run stores.
        local: Folder that takes the first rows of data files and MLflow's database.

    Raises:
        DataError: a data file cannot be read.
    """
    spec = cell.spec
    values = spec.model_dump(mode="json")
    cluster = _cluster(spec.cluster, machine)
    workers = int(cluster["num_workers"])
    values["cluster"] = {**values["cluster"], **cluster, "storage_path": storage}
    values["tracking"] = {"tracking_uri": f"sqlite:///{local / 'mlflow.db'}"}
    values["model"] |= _model(values["model"], small, machine)
    variants = _variants(spec)
    values["compressors"] = {name: _points(cell, points, small.layers) for name, points in variants.items()}
    for plan in cell.phases:
        values["phases"][plan.name] = _phase(spec, plan, small.layers, workers)
    for name, entry in spec.data.items():
        values["data"][name] = entry.first_rows(ROWS, local / "data").model_dump(mode="json")
    for name, entry in values["evaluate"].items():
        entry["under"] = list(spec.evaluate[name].tested_variants)
        entry |= {name: min(entry[name], most) for name, most in _LIMITS.items() if isinstance(entry.get(name), int)}
    for grid in ("matrix", "zip", "include", "exclude", "controls", "search"):
        values.pop(grid)
    return ExperimentSpec.model_validate(values)


def changed_for(spec: ExperimentSpec, small: ExperimentSpec) -> list[str]:
    """Return what a trial run on this machine does not try, for people."""
    notes = [
        f"{name}: {before} is not possible here, {after} is tried instead"
        for name, before, after in (
            ("model.attn_implementation", spec.model.attn_implementation, small.model.attn_implementation),
            ("model.dtype", spec.model.dtype, small.model.dtype),
            ("cluster.num_workers", spec.cluster.most_workers, small.cluster.num_workers),
            ("cluster.use_gpu", spec.cluster.use_gpu, small.cluster.use_gpu),
        )
        if before != after
    ]
    for name in ("pretrain", "finetune"):
        phase = getattr(spec.phases, name)
        if phase is not None and phase.start_from is not None:
            notes.append(f"phases.{name}.start_from: full-size weights do not fit; random ones are taken")
    return notes


def _cluster(cluster: ClusterSpec, machine: Machine) -> dict[str, Any]:
    on_gpu = machine.gpus > 0 and cluster.use_gpu is not False
    places = max(1, machine.gpus if on_gpu else machine.cpus)
    workers = min(cluster.most_workers, places)
    lanes = 2 if cluster.lanes == "auto" else cluster.lanes
    each = {"CPU": 1.0, **({"GPU": 1.0} if on_gpu else {})}
    return {
        "address": None, "num_workers": workers, "lanes": max(1, min(lanes, places // workers)),
        "use_gpu": cluster.use_gpu if on_gpu or cluster.use_gpu == "auto" else False,
        "resources_per_worker": each, "checkpoint_every": min(cluster.checkpoint_every, 3),
    }  # fmt: skip


def _model(model: dict[str, Any], small: SmallModel, machine: Machine) -> dict[str, Any]:
    attention, dtype = model["attn_implementation"], model["dtype"]
    return {
        "model_name_or_path": str(small.folder), "revision": None, "weights": "random",
        "attn_implementation": attention if attention in machine.attentions else "sdpa",
        "dtype": dtype if dtype == "auto" or dtype in machine.dtypes else "float32",
    }  # fmt: skip


def _variants(spec: ExperimentSpec) -> dict[str, Points]:
    """Return the points of all variants by name, those of sweeps under evaluations included."""
    swept = {name: (point,) for test in spec.evaluate.values() for name, point in test.tested_variants.items() if point}
    return {**spec.compressors, **swept}


def _points(cell: Cell, points: Points, layers: LayerMap) -> list[dict[str, Any]]:
    """Return a variant's points at their new layers; the amounts are those of the full-size model."""
    grid = cell.facts.visual_grid if cell.facts is not None else None
    averaged = grid is None and any(point.layer_average_tokens for point in points)
    rows = Costs().rows(cell) if averaged else None
    resolved = resolve_points(points, layers.depth, grid, layers.tower_depth, "" if rows is None else rows.units)
    return [{**point, "layer": layers.place(point["layer"])} for point in resolved]


def _phase(spec: ExperimentSpec, plan: PhasePlan, layers: LayerMap, workers: int) -> dict[str, Any]:
    recipe: PhaseSpec = plan.recipe
    values = recipe.model_dump(mode="json")
    micro = recipe.per_device_train_batch_size
    accumulates = micro == "auto" or recipe.global_batch_size > micro * spec.cluster.most_workers
    size = _MICRO_BATCH * workers * (2 if accumulates else 1)
    values["global_batch_size"] = size
    values["per_device_train_batch_size"] = micro if micro == "auto" else _MICRO_BATCH
    schedule = recipe.schedule if isinstance(recipe.schedule, ScheduleSpec) else spec.schedules.get(recipe.schedule)
    if schedule is not None:
        schedule = _schedule(schedule, plan, layers)
        values["schedule"] = schedule.model_dump(mode="json")
    for name in ("num_train_epochs", "max_train_tflops", "match_train_tflops", "start_from"):
        values[name] = None
    values["max_steps"] = _steps(schedule, plan.total_steps, size)
    return values


def _schedule(schedule: ScheduleSpec, plan: PhasePlan, layers: LayerMap) -> ScheduleSpec:
    """Return a schedule whose lengths are shares of the phase and whose layers are the small model's."""
    values = schedule.model_dump(mode="json")
    if values["kind"] == "stages":
        for stage in values["stages"]:
            steps, samples = stage.pop("steps", None), stage.pop("samples", None)
            if samples is not None:
                steps = Fraction(samples, plan.recipe.global_batch_size)
            if steps is not None:
                stage["share"] = str(min(Fraction(1), Fraction(steps) / plan.total_steps))
        if all(stage.get("share") is not None for stage in values["stages"]):
            values["stages"][-1].pop("share")  # what the others leave
    if values["kind"] == "ramp" and values["key"] == "layer":
        for end in ("start", "end"):
            values[end] = layers.at.get(values[end], values[end])
        if values["start"] == values["end"]:
            return schedule
    return type(schedule).model_validate(values)


def _steps(schedule: ScheduleSpec | None, total_steps: int, global_batch_size: int) -> int:
    """So few steps that every stage has one."""
    least = min(LEAST_STEPS, total_steps)
    if schedule is None:
        return least
    for steps in range(least, MOST_STEPS + 1):
        try:
            schedule.compile(steps, global_batch_size)
            return steps
        except ValueError:
            continue
    return least


MARK = "smoke.yaml"


def prepare_smoke(loaded: LoadedExperiment) -> tuple[ExperimentPlan, list[str]]:
    """Make an experiment small and plan it.

    Returns:
        The walk, and what the user should know of it.

    Raises:
        UsageError: it is a search; a model has no config or processor at hand; `smoke` in the storage is not ours.
        DataError: a data file cannot be read.
    """
    if loaded.spec.search is not None:
        raise UsageError("a trial run (smoke) tries the cells of a grid; take `search` out: search=null")
    storage, local = _fresh(storage_path(loaded.spec.cluster.storage_path))
    full = expand_cells(loaded)
    models = _small_models(full, local / "models")
    machine = _machine()
    specs = [smoke_spec(cell, models[_model_key(cell)], machine, storage, local) for cell in full]
    notes = list(dict.fromkeys(note for a, b in zip(full, specs, strict=True) for note in changed_for(a.spec, b)))
    small = tuple(replace(cell, spec=spec) for cell, spec in zip(loaded.cells, specs, strict=True))
    loaded = replace(loaded, spec=specs[0], cells=small)
    (local / MARK).write_text(resolved_yaml(loaded, with_sources=False), encoding="utf-8")
    cells, ledger = expand_cells(loaded), Ledger(storage)
    return ExperimentPlan(loaded, cells, build_stage_tree(cells, ledger), ledger), notes


def _fresh(storage: str | Path) -> tuple[str, Path]:
    """Return the trial run's storage, emptied, and a folder of this machine beside or in it."""
    if isinstance(storage, str):
        url = f"{storage.rstrip('/')}/smoke"
        local = Ledger(url).storage
        local.mkdir(parents=True, exist_ok=True)
        return url, local
    folder = storage / "smoke"
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise UsageError(f"{folder} holds something that no trial run wrote; move it away, or name another storage")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()  # so that a trial run that stops here is known as ours
    return str(folder), folder


def _model_key(cell: Cell) -> str:
    return digest([cell.spec.model.model_name_or_path, cell.spec.model.revision])


def _small_models(cells: Sequence[Cell], folder: Path) -> dict[str, SmallModel]:
    """Return each model of the grid, as deep as its variants need."""
    # Late: they load torch and transformers.
    from orchestrator.models.build import load_config
    from orchestrator.models.shrink import shrink_model

    found: dict[str, SmallModel] = {}
    for key in dict.fromkeys(map(_model_key, cells)):
        some = [cell.spec for cell in cells if _model_key(cell) == key]
        config: Any = load_config(some[0].model)
        depth = int(config.get_text_config().num_hidden_layers)
        layers = map_layers(depth, {layer for spec in some for layer in layers_in_use(spec, depth)})
        if any(point.place == "tower" for spec in some for points in _variants(spec).values() for point in points):
            tower_depth = int(getattr(getattr(config, "vision_config", None), "num_hidden_layers", 0))
            used = {layer for spec in some for layer in tower_layers_in_use(spec, tower_depth)}
            layers = replace(layers, tower_depth=tower_depth, tower=map_tower_layers(used))
        target = folder / f"{Path(some[0].model.model_name_or_path).name}-{key[:8]}"
        shrink_model(some[0].model, layers.small_depth, target, tower_layers=len(layers.tower))
        found[key] = SmallModel(target, layers)
    return found


def _machine() -> Machine:
    import torch

    gpus = torch.cuda.device_count()
    attentions, dtypes = {"eager", "sdpa"}, {"float32", "bfloat16"}
    if gpus:
        dtypes.add("float16")
        attentions.add("flex_attention")
        if not torch.cuda.is_bf16_supported():
            dtypes.discard("bfloat16")
        if importlib.util.find_spec("flash_attn") is not None:
            attentions.add("flash_attention_2")
    return Machine(len(os.sched_getaffinity(0)), gpus, frozenset(attentions), frozenset(dtypes))

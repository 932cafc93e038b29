"""`run --smoke`: an experiment made small enough for a minute or two, in a storage of its own that begins empty."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.errors import UsageError
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.plan.experiment_plan import ExperimentPlan, storage_path
from orchestrator.plan.identity import digest
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.smoke_spec import Machine, SmallModel, changed_for, layers_in_use, map_layers, smoke_spec
from orchestrator.plan.tree import build_stage_tree
from orchestrator.spec.loaded import Source, resolved_yaml
from orchestrator.spec.loader import load_experiment

MARK = "smoke.yaml"


def prepare_smoke(source: Source, overrides: Sequence[str] = ()) -> tuple[ExperimentPlan, list[str]]:
    """Load an experiment, make it small and plan it.

    Returns:
        The walk, and what the user should know of it.

    Raises:
        SpecError: the file has faults.
        UsageError: it is a search; a model has no config or processor at hand; `smoke` in the storage is not ours.
        DataError: a data file cannot be read.
    """
    loaded = load_experiment(source, overrides)
    if loaded.spec.search is not None:
        raise UsageError("--smoke tries the cells of a grid; take `search` out: --set search=null")
    storage, local = _fresh(storage_path(loaded))
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
        raise UsageError(f"{folder} holds something that --smoke did not write; move it away, or name another storage")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()  # so that a trial run that stops here is known as ours
    return str(folder), folder


def _model_key(cell: Cell) -> str:
    return digest([cell.spec.model.model_name_or_path, cell.spec.model.revision])


def _small_models(cells: Sequence[Cell], folder: Path) -> dict[str, SmallModel]:
    """Return each model of the grid, as deep as its variants need."""
    from orchestrator.models.build import load_config
    from orchestrator.models.shrink import shrink_model

    found: dict[str, SmallModel] = {}
    for key in dict.fromkeys(map(_model_key, cells)):
        some = [cell.spec for cell in cells if _model_key(cell) == key]
        depth = int(load_config(some[0].model).get_text_config().num_hidden_layers)
        layers = map_layers(depth, {layer for spec in some for layer in layers_in_use(spec, depth)})
        target = folder / f"{Path(some[0].model.model_name_or_path).name}-{key[:8]}"
        shrink_model(some[0].model, layers.small_depth, target)
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

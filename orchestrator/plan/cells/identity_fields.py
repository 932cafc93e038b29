"""What of a spec a cell reaches, as plain values to hash: model, data, points, recipe (docs/concepts/identity.md)."""

from __future__ import annotations

import fnmatch
import os
import re
import stat
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.plan.identity import content_digest, digest, files_digest
from orchestrator.plan.io_retry import ABSENT, retry_io, stat_or_none
from orchestrator.spec.base import Component, Spec
from orchestrator.spec.budgets import Images, solve_layer_average, solve_mean_layer_average
from orchestrator.spec.components import ADDED_LATER, CompressorSpec, DataSpec, EvaluationSpec, Grid
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.model_facts import hub_repository
from orchestrator.spec.phase import PhaseSpec

_SETTINGS = (
    "config.json", "generation_config.json", "*tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "*.spm", "spiece.model", "*processor*.json", "chat_template*", "*.py",
)  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json"), ("*.bin", "*.bin.index.json", "*.pt", "*.pth")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Fields of a phase that other values stand for: the table of steps, the data's content, the number of steps, the
# state it starts from.
RESOLVED = frozenset(
    {"data", "schedule", "seed", "start_from"}
    | {"max_steps", "num_train_epochs", "max_train_tflops", "match_train_tflops"}
)


def reached(value: Any, leave: frozenset[str] = frozenset()) -> Any:
    """Return a spec as a mapping of the values that decide what it does.

    Fields named by `not_identity` or `leave` are left out; a component carries its version, and one that came from a
    plug-in file the digest of that file.
    """
    if isinstance(value, Spec):
        names = type(value).model_fields.keys() - type(value).not_identity - leave - value.as_before()
        if isinstance(value, CompressorSpec):
            names -= set(ADDED_LATER) - set(value.model_dump())
        fields = {name: reached(getattr(value, name)) for name in names}
        if isinstance(value, Component):
            fields["@version"] = type(value).version
            if (source := plugin_file(type(value))) is not None:
                fields["@source"] = content_digest(source)
        return fields
    if isinstance(value, Mapping):
        return {key: reached(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [reached(item) for item in value]
    return value


def plugin_file(cls: type[Component]) -> str | None:
    """Return the file of a component that came from a plug-in file; None of any other."""
    module = sys.modules.get(cls.__module__)
    return getattr(module, "__file__", None) if cls.__module__.startswith("llavolta_plugin_") else None


def hub_commit(repo_id: str, revision: str | None) -> str | None:
    """Return the commit a hub revision stands for in the local cache; None where it was never downloaded."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    ref = hub_repository(repo_id) / "refs" / (revision or "main")
    try:
        commit = retry_io(ref.read_text).strip()
    except (*ABSENT, ValueError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def _source(name: str, revision: str | None, parts: Sequence[Sequence[str]]) -> Any:
    """Return a folder or file by content, a hub id by commit (by revision until it is downloaded)."""
    about = stat_or_none(name)
    if about is not None and stat.S_ISDIR(about.st_mode):
        found = retry_io(lambda: sorted(entry.name for entry in os.scandir(name) if entry.is_file()))
        chosen: list[str] = []
        for patterns in parts:
            chosen += [n for n in found if any(fnmatch.fnmatchcase(n, p) for p in patterns) and n not in chosen]
        return {"files": files_digest(name, chosen)}
    if about is not None and stat.S_ISREG(about.st_mode):
        return {"file": content_digest(name)}
    commit = hub_commit(name, revision)
    return {"hub": name, "commit": commit} if commit else {"hub": name, "revision": revision or "main"}


def _weight_patterns(name: str) -> tuple[str, ...]:
    # As transformers chooses: safetensors where there are any.
    about = stat_or_none(name)
    if about is None or not stat.S_ISDIR(about.st_mode):
        return _WEIGHTS[0]
    return _WEIGHTS[0] if fnmatch.filter(retry_io(lambda: os.listdir(name)), _WEIGHTS[0][0]) else _WEIGHTS[1]


def model_identity(model: ModelSpec) -> dict[str, Any]:
    """Return the config, tokenizer and processor by content, weights by content or `random`; not the folder's name.

    Weights by part: a part that is not listed comes from the model's own weights, so these count too.
    """
    name, weights = model.model_name_or_path, model.weights
    whole = weights == "pretrained" or (isinstance(weights, dict) and len(weights) < 3)
    parts: list[Sequence[str]] = [_SETTINGS] + ([_weight_patterns(name)] if whole else [])
    sources: Any = weights
    if isinstance(weights, dict):
        sources = {
            part: "random" if source == "random" else _source(source, None, [_SETTINGS, _weight_patterns(source)])
            for part, source in weights.items()
        }
    fields = reached(model, leave=frozenset({"model_name_or_path", "revision", "weights"}))
    return {**fields, "source": _source(name, model.revision, parts), "weights": sources}


def settings_identity(model: ModelSpec) -> dict[str, Any]:
    """Return what of a model is not its weights: config, tokenizer and processor by content, and the compute type."""
    fields = reached(model, leave=frozenset({"model_name_or_path", "revision", "weights"}))
    return {**fields, "source": _source(model.model_name_or_path, model.revision, [_SETTINGS])}


def processor_identity(model: ModelSpec) -> dict[str, Any]:
    """Return a model's tokenizer and processor by content, those of a hub id by commit."""
    files = [pattern for pattern in _SETTINGS if pattern not in ("config.json", "generation_config.json", "*.py")]
    found: dict[str, Any] = _source(model.model_name_or_path, model.revision, [files])
    return found


def data_digest(data: DataSpec, content: str | None, left_out: Sequence[int]) -> str:
    """Return the digest of the rows of a data set that was read: its content and the fields that change rows."""
    fields = reached(data, leave=frozenset(type(data).path_fields))
    return digest({**fields, "content": content, "left_out": list(left_out)})


def folder_identity(folder: str) -> dict[str, Any]:
    """Return a folder of weights by content."""
    identity: dict[str, Any] = _source(folder, None, [_SETTINGS, _weight_patterns(folder)])
    return identity


def draws_weights(model: ModelSpec) -> bool:
    """Return True where a part of the initial weights is drawn from the seed."""
    return model.weights == "random" or (isinstance(model.weights, dict) and "random" in model.weights.values())


def data_identity(data: DataSpec) -> tuple[dict[str, Any], str | None]:
    """Content and the fields that change rows; and a notice where the content cannot be read here.

    Data that is not here is identified by its fields, paths included, until it is. A storage that fails is another
    thing: it says nothing of the data, and raises.

    Raises:
        OSError: the storage fails.
    """
    paths = frozenset(type(data).path_fields)
    try:
        return {**reached(data, leave=paths), "content": data.content_digest()}, None
    except ABSENT as error:  # any other error says nothing of what is there, and must not change identities
        where = error.filename or error
        notice = f"data of kind {data.kind} cannot be read here ({where}): cells are identified by its path for now"
        return {**reached(data), "content": None}, notice


def resolve_points(
    points: Sequence[CompressorSpec],
    num_layers: int | None,
    grid: Grid | None,
    tower_layers: int | None = None,
    images: Images | str = "",
) -> tuple[Any, ...]:
    """Return the points as mappings for `attach`: `layer` without shares, `layer_average_tokens` solved for
    `keep_tokens`.

    Without model facts both stay as written; without `tower_layers`, a share of the vision tower's depth.

    Args:
        points: The variant's.
        num_layers: Decoder layers.
        grid: An image's visual tokens; None where they vary with its size.
        tower_layers: Layers of the vision tower.
        images: Where images vary in size, those that were measured, over which the mean is taken, for a share of each;
            or why there are none.

    Raises:
        ValueError: no number of tokens gives the wanted mean.
    """
    resolved: list[dict[str, Any]] = []
    for point in points:
        fields = point.model_dump(mode="json")
        if num_layers is not None and (point.place != "tower" or tower_layers is not None):
            fields["layer"] = point.resolved_layer(num_layers, tower_layers or 0)
        if point.layer_average_tokens is not None and num_layers is not None:
            if grid is None and (isinstance(images, str) or not images):
                because = f" ({images})" if images else ""
                raise ValueError(
                    "layer_average_tokens needs images of one size, or data whose images are measured here"
                    f"{because}; give keep_ratio or stride instead"
                )
            if any(other.takes_amount for other in points if other is not point):
                raise ValueError("layer_average_tokens is for a variant of one amount; give the other amounts instead")
            if grid is not None:
                fields["keep_tokens"] = solve_layer_average(point, num_layers, grid, points).keep_tokens
                fields["layer_average_tokens"] = None
            else:
                assert not isinstance(images, str)
                solved = solve_mean_layer_average(point, num_layers, images, points).model_dump(mode="json")
                fields |= {name: solved[name] for name in ("keep_tokens", "keep_ratio", "layer_average_tokens")}
        resolved.append(fields)
    return tuple(resolved)


def points_identity(points: Sequence[CompressorSpec], resolved: Sequence[Mapping[str, Any]]) -> str:
    """Return the digest of a variant: resolved fields that count, component versions, plug-in sources; not its name."""
    names = ("layer", "keep_tokens", "layer_average_tokens")

    def fields(point: CompressorSpec, solved: Mapping[str, Any]) -> dict[str, Any]:
        found = {**reached(point), **{name: solved[name] for name in names}}
        # A share that a mean over measured images was solved for.
        return found if point.keep_ratio is not None else found | _given({"keep_ratio": solved["keep_ratio"]})

    return digest([fields(point, solved) for point, solved in zip(points, resolved, strict=True)])


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def recipe_identity(recipe: PhaseSpec) -> dict[str, Any]:
    """Return the phase's own fields that decide what a step does, given its table, data, seed and number of steps."""
    fields: dict[str, Any] = reached(recipe, leave=RESOLVED)
    fields["train"] = sorted(set(recipe.train))
    if recipe.lora is not None:
        fields["lora"]["target_modules"] = sorted(set(recipe.lora.target_modules))
    if isinstance(recipe.learning_rate, dict):
        fields["learning_rate"] = {part: lr for part, lr in recipe.learning_rate.items() if part in recipe.train}
    return fields


def evaluation_identity(evaluation: EvaluationSpec) -> dict[str, Any]:
    """Return the evaluation's own fields; its data, points and length are hashed beside it."""
    beside = frozenset({"data", "under", "model_max_length", "at", "cells"})
    fields: dict[str, Any] = reached(evaluation, leave=beside | frozenset(type(evaluation).path_fields))
    if (code := evaluation.source_digest()) is not None:
        fields["@code"] = code
    return fields

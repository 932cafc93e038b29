"""Weights that a run or a phase starts from: pretrained, random, or combined from the parts of several sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from orchestrator.errors import StageRunError, UsageError, first_line
from orchestrator.models.build import (
    WEIGHTS_FILE,
    check_names_and_shapes,
    check_source,
    check_values,
    copy_weights,
    model_from_config,
    quiet_loading,
    save_weights,
    shapes_of,
    weight_tensors,
)
from orchestrator.models.parts import COMPRESSOR, LANGUAGE_MODEL, PROJECTOR, VISION_TOWER, part_module, part_of_or_none
from orchestrator.models.weight_files import Shapes, WeightsFile, check_tensors, load_tensors, open_weights
from orchestrator.plan.jobs import RootJob, StartJob
from orchestrator.spec.model import ModelSpec


def write_start_weights(job: StartJob, base: Path | None, source: Path | None, folder: Path) -> None:
    """Write the weights that a phase starts from to `weights/model.safetensors` below `folder`.

    They are a folder's, or those of one state with some parts from another state or a folder.

    Args:
        job: The parts and their sources.
        base: Weights file of the base state; None if all weights come from the job's folder.
        source: Weights file of the source state; None if the parts come from the job's folder.
        folder: The job's own folder; the caller commits it.

    Raises:
        UsageError: the job's folder holds no weights.
        StageRunError: names or shapes do not match, or a part has no weights.
        StorageError: a file cannot be read or written.
    """
    if base is None:
        assert job.folder is not None
        save_weights(_whole(job, job.folder), folder / WEIGHTS_FILE)
        return
    with open_weights(base) as rest:
        if source is None:
            assert job.folder is not None
            given = _folder_weights(Path(job.folder), rest.shapes())
            merged = _merged(job.parts, rest, given, f"{job.folder} (start_from)")
        else:
            with open_weights(source) as state:
                merged = _merged(job.parts, rest, state, f"{source} (start_from)")
        save_weights(merged, folder / WEIGHTS_FILE)


def _whole(job: StartJob, folder: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"), no_init_weights():
        model = model_from_config(ModelSpec.model_validate(job.model))
    expected = shapes_of(weight_tensors(model))
    given = _folder_weights(Path(folder), expected)
    check_names_and_shapes(shapes_of(given), expected, f"{folder} (start_from)")
    check_values(given, f"{folder} (start_from)")
    return {name: tensor.float() for name, tensor in given.items()}


def _merged(
    parts: tuple[str, ...], rest: WeightsFile, given: Mapping[str, torch.Tensor], source: str
) -> dict[str, torch.Tensor]:
    shapes = rest.shapes()
    merged = {name: rest[name] for name in shapes if part_of_or_none(name) not in parts}
    for part in parts:
        found = {name: given[name] for name in given if part_of_or_none(name) == part}
        check_values(found, source)
        theirs = {name: tensor.float() for name, tensor in found.items()}
        if not theirs:
            raise StageRunError(f"{source}: there are no weights of {part}; remove it from `parts`")
        if part != COMPRESSOR:  # each phase may have other learned compressors: all of them are taken
            expected = {name: shapes[name] for name in shapes if part_of_or_none(name) == part}
            check_names_and_shapes(shapes_of(theirs), expected, source)
        merged |= theirs
    return merged


def _folder_weights(folder: Path, expected: Shapes) -> Mapping[str, torch.Tensor]:
    """Return the weights of a Hugging Face model, of a ledger's weights file, or of LLaVA's `mm_projector.bin`."""
    if (folder / "config.json").is_file():
        return weight_tensors(load_pretrained(str(folder), "start_from"))
    for file in (folder / "model.safetensors", folder / WEIGHTS_FILE):
        if file.is_file():
            with open_weights(file) as found:
                return dict(found)
    if (folder / PROJECTOR_FILE).is_file():
        ours = [name for name in expected if part_of_or_none(name) == PROJECTOR]
        projector = projector_weights(folder, "start_from")
        return {next((name for name in ours if name.endswith(f".{key}")), key): projector[key] for key in projector}
    raise UsageError(
        f"start_from: {folder} holds no weights; give a Hugging Face model's folder, one with model.safetensors as "
        f"`llavolta path` names it, or one with {PROJECTOR_FILE}"
    )


RANDOM = "random"
PROJECTOR_FILE = "mm_projector.bin"  # LLaVA's own
_MODEL_PARTS = (VISION_TOWER, PROJECTOR, LANGUAGE_MODEL)
# LLaVA's own projector is a Sequential of linear, GELU, linear.
_LLAVA_NAMES = {"0": "linear_1", "2": "linear_2"}


def write_initial_weights(job: RootJob, folder: Path) -> None:
    """Write `weights/model.safetensors` below `folder`: float32, the same bytes for the same (model, seed).

    Args:
        job: Model and seed.
        folder: Folder for unsealed files of the root; the caller commits it.

    Raises:
        UsageError: a folder or file named in `model` is missing, or `weights` lacks a part.
        StageRunError: weights do not fit the model; names and shapes are listed.
        StorageError: the disk is full.
    """
    spec = ModelSpec.model_validate(job.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        if spec.weights == "pretrained":
            options = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
            model = load_pretrained(spec.model_name_or_path, "model.model_name_or_path", **options)
        else:
            model = model_from_config(spec)
        if isinstance(spec.weights, dict):
            _load_parts(model, spec.weights)
    save_weights(weight_tensors(model), folder / WEIGHTS_FILE)


def load_pretrained(
    source: str, key: str, loader: Any = AutoModelForImageTextToText, **options: Any
) -> PreTrainedModel:
    """Return a Hugging Face model in float32, every weight of it from `source`.

    Args:
        source: Folder or hub id.
        key: The key that names it, for messages.
        loader: The class that loads it; by default a vision-language model.
        options: Further arguments of `from_pretrained`.

    Raises:
        UsageError: it cannot be loaded.
        StageRunError: it lacks weights, or they are no finite numbers.
    """
    check_source(source, key)
    try:
        with quiet_loading():
            model, report = loader.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
    except Exception as error:  # for damaged or malicious files torch, safetensors and transformers raise many kinds
        files = sorted(Path(source).glob("*.bin")) + sorted(Path(source).glob("*.safetensors"))
        raise UsageError(f"{key}: {source} cannot be loaded: {_reason(error, files)}") from error
    if missing := sorted(report["missing_keys"]):
        raise StageRunError(
            f"{key}: {source} lacks {len(missing)} weights of {type(model).__name__}: {', '.join(missing[:5])}; "
            "write `weights: random` for a fresh model"
        )
    check_values(weight_tensors(model), f"{key}: {source}")
    return model


def _reason(error: Exception, files: Sequence[Path]) -> str:
    """Return why weights were refused; of a folder's files, name the first that does not hold plain tensors."""
    if "Unrecognized configuration class" in str(error):
        return "its `model_type` is not of the kind that is needed here"
    if not isinstance(error, ImportError | NotImplementedError):
        for file in files:
            try:
                check_tensors(file)
            except ValueError as reason:
                return f"{file.name}: {reason}"
    return first_line(error)


def _load_parts(model: PreTrainedModel, sources: Mapping[Any, str]) -> None:
    if missing := [part for part in _MODEL_PARTS if part not in sources]:
        raise UsageError(f"model.weights: {', '.join(missing)} is not named; give a folder, a hub id or `random`")
    loaders = {VISION_TOWER: _load_vision_tower, PROJECTOR: _load_projector, LANGUAGE_MODEL: _load_language_model}
    for part in _MODEL_PARTS:
        if sources[part] != RANDOM:
            loaders[part](model, sources[part], f"model.weights.{part}")


def _load_vision_tower(model: PreTrainedModel, source: str, key: str) -> None:
    """Load the vision tower, by its class, from a complete CLIP too; or all towers of a model of the same type."""
    if _type_of(source) == model.config.model_type:
        loaded = load_pretrained(source, key)
        for name in _outermost(model, VISION_TOWER):
            copy_weights(weight_tensors(loaded.get_submodule(name)), model.get_submodule(name), f"{key}: {source}")
        return
    _check_alone(model, VISION_TOWER, key)
    _, tower = part_module(model, VISION_TOWER)
    copy_weights(weight_tensors(load_pretrained(source, key, type(tower))), tower, f"{key}: {source}")


def _check_alone(model: PreTrainedModel, part: str, key: str) -> None:
    """Refuse a file with one module where a part has several: the others would stay random.

    Raises:
        UsageError: the part has several modules.
    """
    if len(names := _outermost(model, part)) > 1:
        raise UsageError(
            f"{key}: the model has several modules there ({', '.join(names)}), of which this would give one and leave "
            f"the others random; give `random`, or for the vision tower a complete model of type "
            f"{model.config.model_type}"
        )


def _type_of(source: str) -> str | None:
    """Return the type of the model that a folder or hub id holds; None where it says none."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(source)
    except OSError:
        return None
    return config.get("model_type")


def _outermost(model: PreTrainedModel, part: str) -> list[str]:
    """Return the names of a part's modules that lie in no other of its modules."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{each}.") for each in found)
        if name and not inside and part_of_or_none(name) == part and next(module.parameters(), None) is not None:
            found.append(name)
    return found


def _load_language_model(model: PreTrainedModel, source: str, key: str) -> None:
    """Load a causal language model's decoder and head; rows of new tokens are the mean of the known rows."""
    loaded = load_pretrained(source, key, AutoModelForCausalLM)
    _, target = part_module(model, LANGUAGE_MODEL)
    name = f"{key}: {source}"
    weights = weight_tensors(loaded.get_decoder())
    embedding = next(k for k, v in target.named_modules() if v is model.get_input_embeddings()) + ".weight"
    weights[embedding] = _resized(weights[embedding], len(model.get_input_embeddings().weight), name)
    copy_weights(weights, target, name)
    head, source_head = model.get_output_embeddings(), loaded.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        copy_weights({"weight": _resized(source_head.weight.detach(), len(head.weight), name)}, head, name)


def _resized(rows_VD: torch.Tensor, num_rows: int, name: str) -> torch.Tensor:
    if len(rows_VD) > num_rows:
        raise StageRunError(
            f"{name} has {len(rows_VD)} tokens, more than the model's {num_rows}; raise text_config.vocab_size in the "
            "model's config.json"
        )
    new = num_rows - len(rows_VD)
    return torch.cat([rows_VD, rows_VD.mean(dim=0, keepdim=True).expand(new, -1)]) if new else rows_VD


def _load_projector(model: PreTrainedModel, source: str, key: str) -> None:
    check_source(source, key)
    _check_alone(model, PROJECTOR, key)
    _, projector = part_module(model, PROJECTOR)
    weights = projector_weights(Path(source), key)
    check_values(weights, f"{key}: {source}")
    copy_weights(weights, projector, f"{key}: {source}")


def projector_weights(path: Path, key: str) -> dict[str, torch.Tensor]:
    """Return a projector's weights from LLaVA's `mm_projector.bin`, a safetensors file, or a folder with either.

    Names are those inside the projector, or the file's own if none of them belongs to a projector.

    Raises:
        UsageError: there is no such file, or it does not hold plain weights; the message says what it is.
    """
    if path.is_dir():
        known = [path / PROJECTOR_FILE, path / "model.safetensors", path / WEIGHTS_FILE]
        path = next((file for file in known if file.is_file()), path / PROJECTOR_FILE)
    if not path.is_file():
        raise UsageError(f"{key}: there is no file {path}; give LLaVA's mm_projector.bin or a safetensors file")
    try:
        weights = load_tensors(path)
    except ValueError as error:
        raise UsageError(f"{key}: {path} holds no plain weights: {error}") from error
    found = {}
    for name, tensor in weights.items():
        if "mm_projector." in name:
            layer, _, rest = name.rpartition("mm_projector.")[2].partition(".")
            found[f"{_LLAVA_NAMES.get(layer, layer)}.{rest}"] = tensor
        elif part_of_or_none(name) == PROJECTOR:
            found[name.partition("projector.")[2] or name] = tensor
    return found or dict(weights)

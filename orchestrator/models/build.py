"""Build an experiment's model from its config, with float32 weights from a safetensors file; write such files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as hf_logging

from orchestrator.errors import StageRunError, StorageError, UsageError, first_line
from orchestrator.models.parts import COMPRESSOR, part_of_or_none, plain_name
from orchestrator.models.weight_files import Shapes, WeightsFile, open_weights
from orchestrator.plan.ledger.files import storage_error
from orchestrator.spec.model import ModelSpec

WEIGHTS_FILE = "weights/model.safetensors"


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Suppress transformers' progress bars and loading report; errors are raised by the caller instead."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def check_source(source: str, key: str) -> None:
    """Refuse a missing local path, which transformers would take for a hub id.

    Raises:
        UsageError: it looks like a path and does not exist.
    """
    looks_local = Path(source).is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    if looks_local and not Path(source).exists():
        raise UsageError(f"{key}: there is no {source}; give a folder with config.json, or a hub id such as org/name")


def load_config(model: ModelSpec) -> Any:
    """Return the model's transformers config.

    Raises:
        UsageError: no such folder, no config in it, or the hub cannot be reached.
    """
    check_source(model.model_name_or_path, "model.model_name_or_path")
    try:
        return AutoConfig.from_pretrained(
            model.model_name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"model.model_name_or_path: no config can be read from {model.model_name_or_path}: {first_line(error)}"
        ) from error


def compute_dtype(model: ModelSpec) -> str:
    """Return `float32`, `bfloat16` or `float16`; `auto` is the config's type, or float32 if it names none."""
    if model.dtype != "auto":
        return model.dtype
    named = str(getattr(load_config(model), "dtype", None)).removeprefix("torch.")
    return named if named in ("float32", "bfloat16", "float16") else "float32"


def build_model(model: ModelSpec, weights_file: Path | None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the model on the CPU with the weights of a file that `save_weights` wrote.

    Args:
        model: Which model, which attention.
        weights_file: safetensors with exactly the model's parameters (learned compressors in it are skipped); None
            keeps transformers' random init.
        dtype: Type of the parameters; they are cast as they are read. Buffers stay as they are.

    Raises:
        UsageError: the model's folder or config is missing or of no vision-language type.
        StorageError: the weights file is missing or unreadable.
        StageRunError: its names or shapes are not the model's.
    """
    if weights_file is None:
        built = model_from_config(model)
        cast_parameters(built, dtype)
        return built
    built = empty_model(model)
    for _ in filled_parameters(built, weights_file, dtype):
        pass
    return built


def empty_model(model: ModelSpec) -> PreTrainedModel:
    """Return the model without values: memory that is not written is not taken."""
    with no_init_weights():
        built = model_from_config(model)
    built.tie_weights()  # part of the skipped init
    return built


def filled_parameters(
    model: nn.Module, weights_file: Path, dtype: torch.dtype, *, read: bool = True
) -> Iterator[nn.Parameter]:
    """Give an empty model its weights; yield each parameter when it has its own, before the next is read.

    Args:
        model: Of `empty_model`, perhaps with LoRA adapters, which keep the values they have.
        weights_file: As for `build_model`.
        dtype: Type of the parameters, adapters included.
        read: False leaves values of parameters out: another rank has them.

    Raises:
        StorageError: the weights file is missing or unreadable.
        StageRunError: its names or shapes are not the model's.
    """
    if not weights_file.is_file():
        raise StorageError(f"the weights {weights_file} are missing; run `ledger verify` to find all damaged files")
    with open_weights(weights_file) as weights:
        expected = {
            plain_name(name): shape for name, shape in shapes_of(weight_tensors(model)).items() if "lora_" not in name
        }
        check_names_and_shapes(weights.shapes(), expected, str(weights_file))
        for name, buffer in model.named_buffers():
            if plain_name(name) in expected:
                buffer.copy_(weights[plain_name(name)])
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
            else:
                if parameter.is_floating_point() and parameter.dtype != dtype:
                    parameter.data = torch.empty_like(parameter.data, dtype=dtype)
                if read:
                    parameter.data.copy_(weights[plain_name(name)])
            yield parameter


def model_from_config(model: ModelSpec) -> PreTrainedModel:
    """Return the model with transformers' own random init, drawn from torch's global generator."""
    config = load_config(model)
    try:
        with quiet_loading():
            return AutoModelForImageTextToText.from_config(
                config,
                attn_implementation=model.attn_implementation,
                dtype=torch.float32,
                trust_remote_code=model.trust_remote_code,
            )
    except (ValueError, ImportError) as error:
        reason = first_line(error)
        if "Unrecognized configuration class" in reason:
            reason = f"`{config.model_type}` is not an image-text-to-text model of transformers"
        raise UsageError(f"model: {model.model_name_or_path} cannot be built: {reason}") from error


def weight_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters (tied ones once, under their first name) and persistent buffers, by name."""
    parameters = dict(model.named_parameters())
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {name: tensor.detach() for name, tensor in {**parameters, **buffers}.items()}


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters but not the buffers, as DeepSpeed does (`_cast_module_mixed_precision`, 0.19.8).

    With its rotary frequencies rounded to bfloat16 the model would be another one.
    """
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def save_weights(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write float32 tensors as safetensors.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clean = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        path.touch()
        mode = path.stat().st_mode  # as the umask says; safetensors leaves its files to their owner alone
        save_file(clean, path, metadata={"format": "pt"})
        path.chmod(mode)
    except (OSError, RuntimeError) as error:
        raise storage_error(path.parent, error) from error
    except Exception as error:  # safetensors raises its own SafetensorError for a full disk
        if type(error).__name__ != "SafetensorError":
            raise
        raise storage_error(path.parent, error) from error


def copy_weights(weights: Mapping[str, torch.Tensor], target: nn.Module, source: str) -> None:
    """Copy weights into a module; names and shapes must be exactly the module's.

    Raises:
        StageRunError: names or shapes differ; both are listed.
    """
    targets = weight_tensors(target)
    check_names_and_shapes(shapes_of(weights), shapes_of(targets), source)
    for name, tensor in targets.items():
        tensor.copy_(weights[name])


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    """Return the shapes of tensors by name; of an open file without reading them."""
    if isinstance(tensors, WeightsFile):
        return tensors.shapes()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_names_and_shapes(given: Shapes, expected: Shapes, source: str) -> None:
    """Compare names and shapes of weights; learned compressors are not part of a plain model and may be left over.

    Raises:
        StageRunError: they differ; the message lists missing names, unknown names and other shapes.
    """
    differences = []
    if missing := sorted(expected.keys() - given.keys()):
        differences.append(f"missing: {_shortened(missing)}")
    if unknown := sorted(name for name in given.keys() - expected.keys() if part_of_or_none(name) != COMPRESSOR):
        differences.append(f"not in the model: {_shortened(unknown)}")
    other = [
        f"{name} {list(given[name])} instead of {list(expected[name])}"
        for name in sorted(given.keys() & expected.keys())
        if given[name] != expected[name]
    ]
    if other:
        differences.append(f"other shapes: {_shortened(other)}")
    if differences:
        raise StageRunError(f"the weights of {source} do not fit the model\n    " + "\n    ".join(differences))


def check_values(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Check that weights are finite floating-point numbers.

    Raises:
        StageRunError: a tensor holds NaN or infinity, or quantised weights; the message names it.
    """
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise StageRunError(f"{source} holds NaN or infinity in {_shortened(bad)}; take another file")
    quantised = [f"{n} ({t.dtype})" for n, t in tensors.items() if n.endswith(".weight") and not t.is_floating_point()]
    if quantised:
        raise StageRunError(
            f"{source} holds quantised weights: {_shortened(quantised)}; use the model before it was quantised"
        )


def _shortened(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

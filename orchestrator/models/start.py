"""Weights a phase starts from, put together: a folder's, or one state's with some parts of another's or a folder's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.initialization import no_init_weights

from orchestrator.errors import StageRunError, StorageError, UsageError
from orchestrator.models.build import (
    WEIGHTS_FILE,
    check_names_and_shapes,
    check_values,
    model_from_config,
    save_weights,
    weight_tensors,
)
from orchestrator.models.initial import PROJECTOR_FILE, pretrained_weights, projector_weights
from orchestrator.models.parts import COMPRESSOR, PROJECTOR, part_of_or_none
from orchestrator.plan.jobs import StartJob
from orchestrator.spec.model import ModelSpec

Shapes = dict[str, tuple[int, ...]]


class _File(Mapping[str, torch.Tensor]):
    """Tensors of an open safetensors file, each read when it is asked for: two models need not fit into memory."""

    def __init__(self, handle: Any) -> None:
        self._handle, self._names = handle, tuple(handle.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._handle.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shapes(self) -> Shapes:
        """Return the name to shape, without reading a tensor."""
        return {name: tuple(self._handle.get_slice(name).get_shape()) for name in self._names}


@contextmanager
def _opened(path: Path) -> Iterator[_File]:
    try:
        with safe_open(path, framework="pt") as handle:
            yield _File(handle)
    except (OSError, RuntimeError) as error:
        raise StorageError(f"the weights {path} cannot be read: {error}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise StorageError(f"the weights {path} cannot be read: {error}") from error


def write_start_weights(job: StartJob, base: Path | None, source: Path | None, folder: Path) -> None:
    """Write `weights/model.safetensors` below `folder`.

    Args:
        job: What comes from where.
        base: Weights file of the base state; None where all comes from the job's folder.
        source: Weights file of the source state; None where a folder gives the parts.
        folder: The job's own folder; the caller commits it.

    Raises:
        UsageError: the job's folder holds no weights.
        StageRunError: names or shapes are not those wanted, or a wanted part has no weights.
        StorageError: a file cannot be read or written.
    """
    if base is None:
        assert job.folder is not None
        save_weights(_whole(job, job.folder), folder / WEIGHTS_FILE)
        return
    with _opened(base) as rest:
        if source is None:
            assert job.folder is not None
            given = _folder_weights(Path(job.folder), rest.shapes())
            merged = _merged(job.parts, rest, given, f"{job.folder} (start_from)")
        else:
            with _opened(source) as state:
                merged = _merged(job.parts, rest, state, f"{source} (start_from)")
        save_weights(merged, folder / WEIGHTS_FILE)


def _whole(job: StartJob, folder: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"), no_init_weights():
        model = model_from_config(ModelSpec.model_validate(job.model))
    expected = {name: tuple(tensor.shape) for name, tensor in weight_tensors(model).items()}
    given = _folder_weights(Path(folder), expected)
    names = [name for name in given if name in expected or part_of_or_none(name) != COMPRESSOR]
    _check({name: given[name] for name in names}, expected, f"{folder} (start_from)")
    check_values(given, f"{folder} (start_from)")
    return {name: tensor.float() for name, tensor in given.items()}


def _merged(
    parts: tuple[str, ...], rest: _File, given: Mapping[str, torch.Tensor], source: str
) -> dict[str, torch.Tensor]:
    shapes = rest.shapes()
    merged = {name: rest[name] for name in shapes if part_of_or_none(name) not in parts}
    for part in parts:
        found = {name: given[name] for name in given if part_of_or_none(name) == part}
        check_values(found, source)
        theirs = {name: tensor.float() for name, tensor in found.items()}
        if not theirs:
            raise StageRunError(f"{source}: there are no weights of {part}; take it out of `parts`")
        if part != COMPRESSOR:  # what learns may be another set in each phase: all of it is taken as it is
            _check(theirs, {name: shapes[name] for name in shapes if part_of_or_none(name) == part}, source)
        merged |= theirs
    return merged


def _check(given: Mapping[str, torch.Tensor], expected: Shapes, source: str) -> None:
    check_names_and_shapes({name: tuple(tensor.shape) for name, tensor in given.items()}, expected, source)


def _folder_weights(folder: Path, expected: Shapes) -> Mapping[str, torch.Tensor]:
    """Return a Hugging Face model's weights, those of a file as the ledger keeps it, or LLaVA's `mm_projector.bin`."""
    if (folder / "config.json").is_file():
        return pretrained_weights(str(folder), "start_from")
    for file in (folder / "model.safetensors", folder / WEIGHTS_FILE):
        if file.is_file():
            with _opened(file) as found:
                return dict(found)
    if (folder / PROJECTOR_FILE).is_file():
        ours = [name for name in expected if part_of_or_none(name) == PROJECTOR]
        projector = projector_weights(folder, "start_from")
        return {next((name for name in ours if name.endswith(f".{key}")), key): projector[key] for key in projector}
    raise UsageError(
        f"start_from: {folder} holds no weights; give a Hugging Face model's folder, one with model.safetensors as "
        f"`llavolta path` names it, or one with {PROJECTOR_FILE}"
    )

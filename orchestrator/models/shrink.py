"""Shrink a model for a smoke run: few narrow layers, the same number of visual tokens, the same tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from orchestrator.compression.shrink_config import shrunk_config
from orchestrator.errors import UsageError, first_line
from orchestrator.hub import READABLE
from orchestrator.models.build import load_config
from orchestrator.spec.model import ModelSpec

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")


def shrink_model(model: ModelSpec, layers: int, folder: Path, tower_layers: int = 0) -> None:
    """Write the config of a small model of the same type, and the processor's files, to a folder.

    Image and patch sizes stay, so that an image becomes as many visual tokens as before; so does the vocabulary.

    Args:
        model: The full-size model.
        layers: Number of decoder layers.
        folder: Folder for `config.json` and the processor's files; it gets no weights.
        tower_layers: Layers of the vision tower before which compressors act, counted from its input.

    Raises:
        UsageError: the model's config or processor cannot be read.
    """
    config = shrunk_config(load_config(model), layers, tower_layers)
    folder.mkdir(parents=True, exist_ok=True)
    copy_processor_files(model, folder)
    config.save_pretrained(folder)


def copy_processor_files(model: ModelSpec, folder: Path) -> None:
    """Copy a model's tokenizer, image processor and generation settings to a folder; its config and weights not.

    Raises:
        UsageError: the model's processor cannot be read.
    """
    source = _files_of(model)
    patterns = (*READABLE, "*.py") if model.trust_remote_code else READABLE
    for file in (file for pattern in patterns for file in source.glob(pattern)):
        if file.name != "config.json" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)


def _files_of(model: ModelSpec) -> Path:
    """Return the folder with the config's and processor's files: the model's own, or a download of them alone."""
    name = model.model_name_or_path
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            patterns = [*READABLE, "*.py"]
            folder = Path(snapshot_download(name, revision=model.revision, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            raise UsageError(f"model: the processor of {name} cannot be fetched: {first_line(error)}") from error
    if not any((folder / tokenizer).is_file() for tokenizer in _TOKENIZERS):
        raise UsageError(
            f"model: no processor in {name}: {' and '.join(_TOKENIZERS)} are missing; the tokenizer and image "
            "processor are taken as they are"
        )
    return folder

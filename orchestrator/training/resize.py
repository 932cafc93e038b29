"""A checkpoint of another number of workers: DeepSpeed's universal format is keyed by parameter, not by rank."""

from __future__ import annotations

import contextlib
import io
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError


def convert(folder: Path, tag: str, target: Path) -> None:
    """Writes a ZeRO checkpoint as a universal one, which an engine opened with `load_universal` takes at any size.

    Args:
        folder: The checkpoint; what it asks to unpickle was looked at before.
        tag: Its one tag.
        target: Folder to write; an older one is removed.

    Raises:
        StorageError: a file is missing or torn, or the disk is full.
    """
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target, ignore_errors=True)
    arguments = Namespace(
        input_folder=str(folder / tag), output_folder=str(target / tag), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=False,
    )  # fmt: skip
    said = io.StringIO()
    try:
        target.mkdir(parents=True)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            ds_to_universal.main(arguments)
    except Exception as error:  # DeepSpeed asserts, torch and the file system raise their own kinds
        shutil.rmtree(target, ignore_errors=True)
        raise StorageError(f"the checkpoint {folder} cannot be opened by another number of workers: {error}") from error


@contextlib.contextmanager
def mended_load(engine: Any) -> Iterator[None]:
    """Around an engine's load of a universal checkpoint: puts right what DeepSpeed 0.19.8 gets wrong under ZeRO-3.

    It gives all groups the first group's settings (weight decay among them), and one step count, a tensor that each
    group's step then raises anew, so that Adam's bias correction runs ahead.
    """
    optimizer = engine.optimizer.optimizer
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for state in optimizer.state.values():
        if hasattr(state.get("step"), "clone"):
            state["step"] = state["step"].clone()

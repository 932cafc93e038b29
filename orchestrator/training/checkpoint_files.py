"""What one rank writes of a checkpoint: at once, or from copies in host memory while training goes on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from typing_extensions import override

from orchestrator.plan.io_retry import retry_io
from orchestrator.plan.ledger.files import Files, seal_file, storage_error, storage_errors
from orchestrator.training import distributed

# Copies may take this share of the memory that is free on a node: training and the page cache want the rest.
_COPY_SHARE = 0.5


class RankFiles(CheckpointEngine):
    """Stands in for DeepSpeed's reader and writer of one checkpoint, and knows which files this rank writes.

    DeepSpeed's own asynchronous writer (0.19.8) needs an operator that is compiled on first use, and lets training wait
    at its next step until all is written.

    Args:
        writer: DeepSpeed's writer.
        copies: Copy what is to be written, for `finish` to write, where the memory is there; else it is written at
            once.
    """

    def __init__(self, writer: CheckpointEngine, copies: bool) -> None:
        super().__init__()
        self._writer, self._copies = writer, copies
        self._paths: list[Path] = []
        self._waiting: dict[Path, Any] = {}

    @override
    def save(self, state_dict: Any, path: str) -> None:
        self._paths.append(Path(path))
        if self._copies and sum(_sizes(state_dict)) <= _COPY_SHARE * distributed.host_memory_bytes():
            self._waiting[Path(path)] = copied(state_dict)
        else:
            self._writer.save(state_dict, path)

    def finish(self, folder: Path) -> Files:
        """Write what was copied, make this rank's files last, and return their entries for the manifest of a folder.

        It may run in another thread than training.

        Raises:
            StorageError: the disk is full or a file cannot be written.
        """
        try:
            for path in list(self._waiting):
                self._writer.save(self._waiting[path], str(path))
                del self._waiting[path]
        except (OSError, RuntimeError) as error:
            raise storage_error(folder, error) from error
        with storage_errors(folder):
            return {path.relative_to(folder).as_posix(): seal_file(path) for path in self._paths}

    @override
    def create(self, info: CheckpointCommitInfo) -> None:
        self._writer.create(info)

    @override
    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        # `os.makedirs` reports a folder that it could not look at as a file.
        retry_io(lambda: Path(path).mkdir(parents=True, exist_ok=exist_ok))

    @override
    def load(self, path: str, map_location: Any = None) -> Any:
        return retry_io(lambda: self._writer.load(path, map_location))

    @override
    def commit(self, info: CheckpointCommitInfo) -> Any:
        return self._writer.commit(info)


def copied(item: Any) -> Any:
    """Return a copy that nothing else changes: tensors on the CPU, containers and all other objects anew."""
    if isinstance(item, torch.Tensor):
        return item.detach().to("cpu", copy=True)
    if isinstance(item, dict):
        return type(item)({key: copied(value) for key, value in item.items()})
    if isinstance(item, list | tuple):
        return type(item)(copied(value) for value in item)
    return copy.deepcopy(item)


def _sizes(item: Any) -> Iterator[int]:
    if isinstance(item, torch.Tensor):
        yield item.nbytes
    elif isinstance(item, dict | list | tuple):
        for value in item.values() if isinstance(item, dict) else item:
            yield from _sizes(value)

"""Weights in files: safetensors of our own, each tensor read when it is used; files of others as plain tensors only."""

from __future__ import annotations

import pickle
import re
import tarfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from orchestrator.errors import LlavoltaError, StorageError, first_line, shorten

Shapes = dict[str, tuple[int, ...]]
_SAFE_PROTOCOLS = (2, 3)  # what torch's safe loader reads: torch.save writes 2
_HEAD_BYTES = 512


class WeightsFile(Mapping[str, torch.Tensor]):
    """Tensors of an open safetensors file, each read when it is used: two models need not fit into memory."""

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
        """Return the shapes by name, without reading a tensor."""
        return {name: tuple(self._handle.get_slice(name).get_shape()) for name in self._names}


@contextmanager
def open_weights(path: Path) -> Iterator[WeightsFile]:
    """Open a safetensors file for the block.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            yield WeightsFile(handle)
    except LlavoltaError:
        raise
    except Exception as error:  # safetensors raises its own kind, OSError and RuntimeError
        raise StorageError(f"the weights {path} cannot be read: {_reason(error)}") from error


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the named tensors of a safetensors file or of one that `torch.save` wrote; no code in it is run.

    Raises:
        ValueError: it holds anything else; the message says what, and what to do.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds for a damaged or malicious file
        raise ValueError(refusal(path, error)) from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__} instead of named tensors")
    odd = [str(name) for name, value in found.items() if not (isinstance(name, str) and torch.is_tensor(value))]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ValueError(f"it holds entries that are not tensors: {', '.join(odd[:3])}{more}; save the tensors alone")
    return found


def check_tensors(path: Path) -> None:
    """Open a file as `load_tensors` does, without reading its tensors.

    Raises:
        ValueError: it holds anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            else:
                torch.load(path, "meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise ValueError(refusal(path, error)) from error


def refusal(path: Path, error: Exception) -> str:
    """Return why a weights file was not loaded, and what to do."""
    try:
        size, head = path.stat().st_size, path.open("rb").read(_HEAD_BYTES)
    except OSError as unreadable:
        return f"it cannot be read: {unreadable.strerror or unreadable}"
    again = "download it again"
    if not size:
        return f"the file is empty; {again}"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the weights: run `git lfs pull` in its folder"
    if path.suffix == ".safetensors":
        length = int.from_bytes(head[:8], "little")
        if size < 8 or (head[8:9] == b"{" and length + 8 > size) or "incomplete" in str(error).lower():
            return f"it is truncated ({size} bytes); {again}"
    elif tarfile.is_tarfile(path):
        return f"it is of torch's old .tar format, which only its unsafe loader reads; {_convert(path)}"
    elif head.startswith((b"PK\x03\x04", b"\x80")):
        return _of_pickle(path, head, error) or f"it is truncated or damaged ({_reason(error)}); {again}"
    if _is_text(head):
        return f"it is a text file, which begins with {head[:40].decode(errors='replace')!r}; {again}"
    return _reason(error)


def _of_pickle(path: Path, head: bytes, error: Exception) -> str | None:
    """Return why a pickle is refused; None if its bytes are damaged."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    if asked := re.findall(r"GLOBAL ([\w.]+)", str(error)) or _asked_of(path):
        return (
            f"it refers to {', '.join(dict.fromkeys(asked))}, which could run any code, and was not loaded; use "
            "safetensors weights from a source that you trust"
        )
    start = head if head.startswith(b"\x80") else _start_of_zip(path)
    if len(start) > 1 and start[0] == 0x80 and start[1] not in _SAFE_PROTOCOLS:
        return f"it is a pickle of protocol {start[1]}, which torch's safe loader does not read; {_convert(path)}"
    return None


def _asked_of(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        return []


def _start_of_zip(path: Path) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as inside:
                return inside.read(2)
    except (OSError, StopIteration, zipfile.BadZipFile):
        return b""


def _convert(path: Path) -> str:
    target = path.with_suffix(".safetensors").name
    return (
        "if you trust its source (the unsafe loader runs code from the file), convert it once: "
        f'python -c "import torch; from safetensors.torch import save_file; '
        f"save_file(torch.load('{path.name}', 'cpu', weights_only=False), '{target}')\", and name {target}"
    )


def _reason(error: Exception) -> str:
    return shorten(first_line(error), 200)


def _is_text(head: bytes) -> bool:
    return all(byte >= 0x20 or byte in b"\t\n\r\f" for byte in head)

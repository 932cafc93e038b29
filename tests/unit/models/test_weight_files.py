"""Files of weights that others made: plain tensors are read, the rest is refused by what it is, and nothing is run."""

from __future__ import annotations

import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import TINY_LLAVA
from safetensors.torch import save_file

from orchestrator.errors import StorageError, UsageError
from orchestrator.models.initial_weights import load_pretrained, projector_weights
from orchestrator.models.weight_files import load_tensors, refusal
from orchestrator.training.checkpoint import _check_classes

PLAIN = {"model.mm_projector.0.weight": torch.ones(2, 3)}


class Hostile:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.mark}",))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name))


Write = Callable[[Path], Any]
# name: how it is written, what the refusal says
WRONG: dict[str, tuple[Write, str]] = {
    "protocol4.bin": (lambda p: torch.save(PLAIN, p, pickle_protocol=4), "a pickle of protocol 4.*convert it once"),
    "protocol5.pt": (lambda p: torch.save(PLAIN, p, pickle_protocol=5), "a pickle of protocol 5.*safetensors"),
    "old4.bin": (
        lambda p: torch.save(PLAIN, p, pickle_protocol=4, _use_new_zipfile_serialization=False),
        "a pickle of protocol 4",
    ),
    "bare4.bin": (lambda p: p.write_bytes(pickle.dumps({"a": [1]}, protocol=4)), "a pickle of protocol 4"),
    "hostile.bin": (lambda p: torch.save({"a": Hostile(p.parent / "MARK")}, p), "refers to posix.system.*not loaded"),
    "hostile2.bin": (
        lambda p: p.write_bytes(pickle.dumps(Hostile(p.parent / "MARK"), protocol=2)),
        "refers to posix.system",
    ),
    "hostile4.bin": (
        lambda p: p.write_bytes(pickle.dumps(Hostile(p.parent / "MARK"), protocol=4)),
        "protocol 4|refers to",
    ),
    "tar.bin": (tar, "old .tar format"),
    "page.bin": (lambda p: p.write_text("<html>404 not found</html>"), "a text file, which begins with '<html>404"),
    "pointer.bin": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
        "git lfs pull",
    ),
    "pointer.safetensors": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
        "git lfs pull",
    ),
    "empty.bin": (lambda p: p.touch(), "empty"),
    "empty.safetensors": (lambda p: p.touch(), "empty"),
    "cut.bin": (lambda p: (torch.save({"a": torch.ones(4096)}, p), cut(p)), "truncated or damaged"),
    "cut.safetensors": (lambda p: (save_file({"a": torch.ones(4096)}, p), cut(p)), "truncated"),
    "header.safetensors": (lambda p: p.write_bytes((10**6).to_bytes(8, "little") + b'{"a"'), "truncated"),
    "list.bin": (lambda p: torch.save([torch.ones(2)], p), "a list instead of named tensors"),
    "nested.bin": (lambda p: torch.save({"state_dict": PLAIN, "epoch": 3}, p), "not tensors: state_dict, epoch"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_file_of_plain_tensors_is_refused_by_what_it_is(name: str, tmp_path: Path) -> None:
    write, told = WRONG[name]
    path = tmp_path / name
    write(path)
    with pytest.raises(UsageError, match=told) as caught:
        projector_weights(path, "model.weights.projector")
    message = str(caught.value)
    assert str(path) in message and message.startswith("model.weights.projector: ")
    assert "weights_only` argument" not in message and not (tmp_path / "MARK").exists()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save(PLAIN, path),
        lambda path: torch.save(PLAIN, path, _use_new_zipfile_serialization=False),
        lambda path: torch.save(PLAIN, path, pickle_protocol=3),
        lambda path: save_file(PLAIN, path),
    ],
)
def test_plain_tensors_are_read_whatever_torch_saved_them_as(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    write(path)
    if path.read_bytes()[8:9] == b"{":
        path = path.rename(path.with_suffix(".safetensors"))
    assert torch.equal(load_tensors(path)["model.mm_projector.0.weight"], torch.ones(2, 3))


@pytest.mark.parametrize("name", ["protocol4.bin", "hostile2.bin", "tar.bin", "empty.bin", "cut.bin", "page.bin"])
def test_a_checkpoint_with_such_a_file_is_refused_and_the_file_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    WRONG[name][0](path)
    with pytest.raises(StorageError, match=r"mp_rank_00_model_states\.pt was not loaded: ") as caught:
        _check_classes(tmp_path)
    assert str(caught.value).strip()[-1] != ":" and not (tmp_path / "MARK").exists()


@pytest.mark.parametrize(
    "name", ["protocol4.bin", "hostile.bin", "page.bin", "cut.bin", "empty.bin", "cut.safetensors"]
)
def test_a_models_folder_with_such_a_file_is_refused_and_the_file_named(name: str, tmp_path: Path) -> None:
    shutil.copytree(TINY_LLAVA, tmp_path, dirs_exist_ok=True)
    path = tmp_path / ("model.safetensors" if name.endswith(".safetensors") else "pytorch_model.bin")
    WRONG[name][0](path)
    with pytest.raises(UsageError, match=f"cannot be loaded: {path.name}: ") as caught:
        load_pretrained(str(tmp_path), "model.model_name_or_path")
    assert "weights_only` argument" not in str(caught.value) and not (tmp_path / "MARK").exists()


def test_a_file_that_cannot_be_read_is_told_so(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "none.bin", ValueError("x"))

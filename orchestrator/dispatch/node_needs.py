"""What a machine must have to do a run's jobs as its driver would, and what one lacks of it."""

from __future__ import annotations

import importlib.util
import itertools
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from orchestrator import registry
from orchestrator.errors import LlavoltaError, first_line
from orchestrator.plan.identity import content_digest, file_sha256
from orchestrator.plan.io_retry import stat_or_none
from orchestrator.plan.ledger import Ledger

# What numbers are made with. A GPU's build has the version of the CPU's, but for what follows the plus sign.
_PACKAGES = ("deepspeed", "numpy", "peft", "pillow", "safetensors", "tokenizers", "torch", "transformers")
_PROGRAM = ("orchestrator", "orchestrator_plugins")
_LISTED = 64
_FOLDER = -1


@dataclass(frozen=True)
class Needs:
    """What a machine must have.

    Attributes:
        storage: The storage's address, and what tells it from every other (`Ledger.mark`).
        versions: Package to its version.
        program: File of the program to its SHA-256.
        plugins: Plug-in, a path or an installed module, to the SHA-256 of its file.
        files: Path to the SHA-256 of the file there.
        folders: Path to some names in the folder there, each with its bytes; -1 for a folder.
    """

    storage: tuple[str, str]
    versions: Mapping[str, str] = field(default_factory=dict)
    program: Mapping[str, str] = field(default_factory=dict)
    plugins: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def needs_for(jobs: Sequence[Mapping[str, Any]], ledger: Ledger) -> Needs:
    """Return what machines must have to do jobs; called where all of it is there, on the driver's.

    Args:
        jobs: As `job_to_json` writes them.
        ledger: The run's.

    Raises:
        StorageError: the storage cannot be read or written.
    """
    files, folders = dict[str, str](), dict[str, dict[str, int]]()
    for path in sorted({path for job in jobs for path in _paths(job)}):
        about = stat_or_none(path)
        if about is not None and stat.S_ISDIR(about.st_mode):
            folders[path] = _some_names(path)
        elif about is not None:
            files[path] = content_digest(path)
    plugins = {name for job in jobs for name in job.get("plugins", ())}
    return Needs(
        storage=(ledger.url, ledger.mark()),
        versions={name: found for name in _PACKAGES if (found := _version(name)) is not None},
        program=_program(),
        plugins={name: file_sha256(file) for name in sorted(plugins) if (file := _plugin_file(name)) is not None},
        files=files,
        folders=folders,
    )


def lacks(needs: Needs) -> list[str]:
    """Return what this machine lacks, a sentence each, paths first; empty where it lacks nothing."""
    found: list[str] = []
    for part in (_of_program(needs), _of_plugins(needs), _of_data(needs), _of_storage(*needs.storage)):
        try:
            found += part
        except OSError as error:
            found.append(f"{error.filename}: {error.strerror}")
    return found


def _of_program(needs: Needs) -> Iterator[str]:
    program = _program()
    other = sorted(name for name in {*needs.program, *program} if needs.program.get(name) != program.get(name))
    if other:
        place = _folder_of(other[0].partition("/")[0])
        where = place.parent / other[0] if place is not None else other[0]
        more = f", nor are {len(other) - 1} more files of the program" if len(other) > 1 else ""
        yield f"{where}: it is not the driver's{more}; install the same version on all nodes"
    for name, wanted in needs.versions.items():
        found = _version(name)
        if found != wanted:
            yield f"{name} {found or 'is not installed'}: the driver has {wanted}"


def _of_plugins(needs: Needs) -> Iterator[str]:
    for name, wanted in needs.plugins.items():
        file = _plugin_file(name)
        if file is None:
            what = "no such file" if name.endswith(".py") else "no such module is installed"
            yield f"{name}: {what}, and the run uses this plug-in"
        elif file_sha256(file) != wanted:
            yield f"{file}: the plug-in's source is not the driver's"


def _of_data(needs: Needs) -> Iterator[str]:
    for path, wanted in needs.files.items():
        about = stat_or_none(path)
        if about is None:
            yield f"{path}: no such file"
        elif not stat.S_ISREG(about.st_mode):
            yield f"{path}: not a file"
        elif content_digest(path) != wanted:
            yield f"{path}: its content is not that of the driver's"
    for path, names in needs.folders.items():
        about = stat_or_none(path)
        if about is None:
            yield f"{path}: no such folder"
            continue
        for name, size in names.items():
            found = stat_or_none(f"{path}/{name}")
            if found is None:
                yield f"{path}: there is no {name} in it"
                break
            if size != _size(found):
                yield f"{path}: its {name} is not the driver's"
                break


def _of_storage(url: str, mark: str) -> Iterator[str]:
    ledger = Ledger(url)
    try:
        found = ledger.read_mark()
        if found == mark:
            probe = f"probe-{secrets.token_hex(6)}.json"
            ledger.store.write(probe, b"{}")
            ledger.store.delete(probe)
            return
        what = "empty or missing" if found is None else "another storage"
        yield f"{url}: {what} here; cluster.storage_path must be one folder that all nodes see, or s3://bucket/prefix"
    except LlavoltaError as error:
        yield f"the storage cannot be used here: {first_line(error)}"


def _paths(job: Mapping[str, Any]) -> Iterator[str]:
    """Return the paths from which a job reads."""
    if job.get("stage") is not None:  # a rehearsal
        for inner in (job["stage"], *job["evaluations"]):
            yield from _paths(inner)
        return
    model, data = job["model"], job.get("data") or ()
    places = [model.get("model_name_or_path"), job.get("folder")]
    places += model["weights"].values() if isinstance(model.get("weights"), Mapping) else ()
    for spec in (data,) if isinstance(data, Mapping) else [each["spec"] for each in data]:
        fields = registry.spec_class(registry.DATA, spec["kind"]).path_fields
        places += [spec.get(name) for name in fields]
    yield from (place for place in places if isinstance(place, str) and os.path.isabs(place))


def _some_names(folder: str) -> dict[str, int]:
    with os.scandir(folder) as entries:
        some = list(itertools.islice((entry for entry in entries if not entry.name.startswith(".")), _LISTED))
    found = {entry.name: stat_or_none(entry.path) for entry in some}
    return {name: _size(about) for name, about in found.items() if about is not None}


def _size(about: os.stat_result) -> int:
    return _FOLDER if stat.S_ISDIR(about.st_mode) else about.st_size


def _version(package: str) -> str | None:
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None


def _folder_of(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _program() -> dict[str, str]:
    found = dict[str, str]()
    for package in _PROGRAM:
        if (folder := _folder_of(package)) is None:
            continue
        for file in sorted(folder.rglob("*.py")):
            found[f"{package}/{file.relative_to(folder).as_posix()}"] = file_sha256(file)
    return found


def _plugin_file(name: str) -> Path | None:
    """Return the file of a plug-in's source; None where it is not there or has none."""
    if name.endswith(".py"):
        return Path(name) if stat_or_none(name) is not None else None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None else None

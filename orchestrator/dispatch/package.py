"""What travels to a cluster with a submitted experiment: its files and the small ones that they name, in one archive.

A relative path travels, an absolute one is the cluster's own, so that the same files are right on both sides.
"""

from __future__ import annotations

import os
import shlex
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import ErrorDetail, SpecError, UsageError
from orchestrator.plan.identity import digest, file_sha256
from orchestrator.redaction import secret_in
from orchestrator.spec.loaded import LoadedExperiment
from orchestrator.spec.yaml.file_paths import NamedPath

FOLDER = "experiment"  # Ray puts the archive on Python's path: what stands at its top could hide a module
MOST_MIB = 64  # Ray's job server takes 100
_YAML = (".yaml", ".yml")
_BY_HAND = (*_YAML, ".py")  # read for secrets, which comments may hold
_STORAGE = "cluster.storage_path"
_BY_ABSOLUTE = "put it where the cluster sees it, and name it by its absolute path there, in the file or by --set"


@dataclass(frozen=True)
class Package:
    """What travels with an experiment.

    Attributes:
        files: Name in the archive to the file; names keep the files' places to one another.
        spec: The experiment's file in the archive.
        folder: What stands for the current folder in the archive, where relative paths of `--set` start.
        elsewhere: What must be on the cluster already, as `KEY: PATH`.
        digest: SHA-256 of the content: the resolved experiment, and what travels with it.
    """

    files: Mapping[str, Path]
    spec: str
    folder: str
    elsewhere: tuple[str, ...]
    digest: str

    def write(self, archive: Path) -> None:
        """Write the archive; equal contents give equal bytes.

        Raises:
            OSError: a file cannot be read, or the archive cannot be written.
        """
        with zipfile.ZipFile(archive, "w") as opened:
            for name, file in sorted(self.files.items()):
                entry = zipfile.ZipInfo(name)
                entry.external_attr = 0o644 << 16
                opened.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)


def package_of(loaded: LoadedExperiment) -> Package:
    """Return what travels with an experiment.

    Raises:
        UsageError: it was given as a mapping.
        SpecError: what it names cannot travel, its results would not outlive the job, or a file holds a secret; all
            errors at once.
    """
    if not loaded.path.is_file():
        raise UsageError("an experiment given as a mapping cannot be submitted: write it to a file, and load that")
    found = _Search(loaded)
    errors = [*_places(loaded), *found.errors, *_secrets(found.files)]
    if errors:
        raise SpecError(list(dict.fromkeys(errors)))
    spec, here = os.path.abspath(loaded.path), os.getcwd()
    from_here = [here] if found.names_from_here else []
    root = os.path.commonpath([*(os.path.dirname(file) for file in found.files), *from_here])

    def name(path: str) -> str:
        return os.path.normpath(os.path.join(FOLDER, os.path.relpath(path, root)))

    names = {file: name(file) for file in found.files}
    moved = {path: name(path) for path in found.travelling}
    content = {
        "spec": _content(loaded, moved),
        "starts": {names[file]: _content(each, moved) for file, each in loaded.starts.items() if file in names},
        "files": {name: file_sha256(file) for file, name in names.items() if not file.endswith(_YAML)},
    }
    files = {name: Path(file) for file, name in names.items()}
    folder = name(here) if from_here else FOLDER
    return Package(files, names[spec], folder, tuple(found.elsewhere), digest(content))


def command(package: Package, verb: str, sets: Sequence[str], options: Sequence[str]) -> str:
    """Return what the cluster's shell is to do, in the folder that the archive is unpacked into."""
    spec = os.path.relpath(package.spec, package.folder)
    settings = [word for text in (*sets, "cluster.address=auto") for word in ("--set", text)]
    # In the shell's place, so that a signal reaches the run and the exit code is the run's own.
    return f"cd {shlex.quote(package.folder)} && exec {shlex.join(['llavolta', verb, spec, *settings, *options])}"


@dataclass
class _Search:
    """Finds what an experiment's file names, and what the files that travel name in turn."""

    loaded: LoadedExperiment
    files: dict[str, None] = field(default_factory=dict)
    travelling: dict[str, None] = field(default_factory=dict)
    elsewhere: dict[str, None] = field(default_factory=dict)
    errors: list[ErrorDetail] = field(default_factory=list)
    names_from_here: bool = False
    _bytes: int = 0

    def __post_init__(self) -> None:
        named: dict[str | None, list[NamedPath]] = {}
        for experiment in (self.loaded, *self.loaded.starts.values()):
            modules = [each for each in experiment.spec.plugins if not each.endswith(".py")]
            self.elsewhere |= {f"plugins: the module {each}, installed": None for each in modules}
            for each in experiment.named:
                file = each.mark.file
                named.setdefault(file if file is None else os.path.abspath(file), []).append(each)
        spec = os.path.abspath(self.loaded.path)
        self.files[spec] = None
        waiting: list[str | None] = [None, spec]
        while waiting:
            for each in named.pop(waiting.pop(), ()):
                if self._travels(each) and each.path.endswith(_YAML):
                    waiting.append(each.path)

    def _travels(self, named: NamedPath) -> bool:
        if named.key == _STORAGE:
            return False
        if _is_own(named):
            self.elsewhere[f"{named.key}: {named.written}"] = None
            return False
        self.names_from_here |= named.mark.file is None
        self.travelling[named.path] = None
        if not (os.path.isfile(named.path) or os.path.isdir(named.path)):
            self._refuse(named, f"there is nothing to send at {named.path}")
            return False
        for file in _files_in(named.path):
            if file in self.files:
                continue
            size = os.stat(file).st_size
            if self._bytes + size > MOST_MIB << 20:
                self._refuse(named, f"what travels with an experiment is at most {MOST_MIB} MiB, and this exceeds it")
                return False
            self._bytes += size
            self.files[file] = None
        return True

    def _refuse(self, named: NamedPath, message: str) -> None:
        self.errors.append(ErrorDetail(message, *named.mark, named.key, named.written, None, _BY_ABSOLUTE))


def _is_own(named: NamedPath) -> bool:
    """Whether a path is the cluster's own."""
    return os.path.isabs(named.written) or named.written.startswith("~")


def _files_in(path: str) -> Iterator[str]:
    if os.path.isfile(path):
        yield path
    for folder, _, names in os.walk(path):
        yield from (os.path.join(folder, name) for name in sorted(names))


def _places(loaded: LoadedExperiment) -> Iterator[ErrorDetail]:
    """Return what is wrong with where results go: the folder of a job is removed with it."""
    storage = loaded.spec.cluster.storage_path
    named = next((each for each in reversed(loaded.named) if each.key == _STORAGE and each.path == storage), None)
    allowed = "the absolute path of a folder that all nodes see, or s3://bucket/prefix"
    hint = f"--set {_STORAGE}=/nfs/llavolta"
    if storage is None:
        yield ErrorDetail(
            "a submitted experiment says where its results go", str(loaded.path), path=_STORAGE, allowed=allowed,
            hint=hint,
        )  # fmt: skip
    elif named is not None and not os.path.isabs(named.written):
        message = "results in a relative folder would be removed with the job"
        yield ErrorDetail(message, *named.mark, _STORAGE, named.written, allowed, hint)
    uri = loaded.spec.tracking.tracking_uri or ""
    scheme, slashes, path = uri.partition(":///")
    if scheme.startswith("sqlite") and slashes and not path.startswith("/"):
        message = "a database in a relative folder would be removed with the job"
        allowed = "sqlite:////ABSOLUTE/mlflow.db, http://HOST:PORT, or null: beside the results"
        yield ErrorDetail(message, str(loaded.path), path="tracking.tracking_uri", value=uri, allowed=allowed)


def _secrets(files: Mapping[str, None]) -> Iterator[ErrorDetail]:
    for file in files:
        if file.endswith(_BY_HAND) and (what := secret_in(Path(file).read_text(encoding="utf-8", errors="replace"))):
            hint = "whoever can ask the cluster can read what was sent: give it in the environment of the nodes"
            yield ErrorDetail(f"{what} must not travel to a cluster", file, hint=hint)


def _content(loaded: LoadedExperiment, moved: Mapping[str, str]) -> Any:
    """Return the values of an experiment, what travels named by its place in the archive."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(item) for key, item in value.items()}
        if isinstance(value, list):
            return [named(item) for item in value]
        return moved.get(value, value) if isinstance(value, str) else value

    values = named(loaded.spec.model_dump(mode="json"))
    del values["cluster"]["address"]  # the cluster that it is submitted to
    return values

"""FolderBackend: a storage that is a folder, local or NFS; a state appears through one rename.

```
stage_runs/STATE/          a finished state: job.json, result.json, metrics.jsonl, weights/, checkpoint/, manifest.json
work/JOB/                  a stage run under way: metrics.jsonl, log.txt, step_000200/ (sealed in-stage checkpoints)
work/JOB/.writing-TOKEN/   what a writer has not sealed yet
NOTES/KEY.json             evaluations, failures, leases, owners, experiments, searches
```
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from typing_extensions import override

from orchestrator.errors import StorageError
from orchestrator.plan.io_retry import ABSENT, retry_io
from orchestrator.plan.ledger.backends.base import (
    ID,
    PARTS,
    Backend,
    Leftover,
    Part,
    files_of,
    step_name,
    steps_in,
    superseded,
    without,
)
from orchestrator.plan.ledger.files import (
    MANIFEST,
    Files,
    changed_files,
    cut_files,
    damaged_files,
    files_below,
    fsync_folder,
    is_there,
    make_folder,
    manifest_of,
    names_in,
    read_manifest,
    stat_of,
    storage_errors,
    write_aside,
    write_atomic,
    write_json,
    write_manifest,
)

_KEY = re.compile(r"(?!\.)[^/\\]+(/(?!\.)[^/\\]+)*")
_ASIDE = re.compile(r"\.([A-Za-z0-9_-]{1,128})\.[0-9a-f]{12}\.aside")
_LOG = re.compile(r"log(_rank.*)?\.txt")
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NOTES = (
    "evaluation_files", "evaluations", "experiments", "failures", "leases", "owners", "predictions", "searches",
)  # fmt: skip


class FolderBackend(Backend):
    """A storage in a folder; nothing is made before something is written.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        # Text: a plan of 10,000 cells asks 200,000 times for what is not there.
        self.url = self._base = str(self.folder)
        self._runs, self._work = self.folder / "stage_runs", self.folder / "work"
        self._listed: dict[str, frozenset[str]] | None = None
        self._seen: dict[str, tuple[tuple[int, ...], frozenset[str]]] = {}

    @override
    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        before, self._listed = self._listed, {}  # each folder is listed once, when it is first asked for
        try:
            yield
        finally:
            self._listed = before

    def _lacks(self, folder: str, name: str) -> bool:
        """Return True where a snapshot knows that a folder has no such name."""
        if self._listed is None:
            return False
        if folder not in self._listed:
            self._listed[folder] = frozenset(names_in(folder))
        return name not in self._listed[folder]

    # Small values --------------------------------------------------------------------------------------------------

    @override
    def read(self, key: str) -> bytes | None:
        path = f"{self._base}/{_checked_key(key)}"
        if self._lacks(*path.rsplit("/", 1)):
            return None
        if not is_there(path):  # cheaper than to open it: most notes that a plan asks for are not there
            return None
        with storage_errors(self.folder):
            try:
                return retry_io(Path(path).read_bytes)
            except ABSENT:
                return None

    @override
    def write(self, key: str, data: bytes) -> None:
        write_atomic(self.folder / _checked_key(key), data)

    @override
    def create(self, key: str, data: bytes) -> bool:
        path = self.folder / _checked_key(key)
        with storage_errors(path.parent):
            part = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
            try:
                write_aside(part, data)
                made = _link(part, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    part.unlink()
            if made:
                fsync_folder(path.parent)
            return made

    @override
    def delete(self, key: str) -> None:
        path = self.folder / _checked_key(key)
        with storage_errors(path.parent), contextlib.suppress(*ABSENT):
            path.unlink()
            with contextlib.suppress(OSError):
                path.parent.rmdir()

    @override
    def names(self, prefix: str) -> list[str]:
        return [name for name in names_in(self.folder / _checked_key(prefix.rstrip("/"))) if not name.startswith(".")]

    # Finished states -----------------------------------------------------------------------------------------------

    @override
    def states(self) -> list[str]:
        return [name for name in names_in(self._runs) if ID.fullmatch(name)]

    @override
    def is_complete(self, state: str) -> bool:
        return self._look(state)[1]

    @override
    def has(self, state: str, part: Part) -> bool:
        return part in self._look(state)[0]

    def _look(self, state: str) -> tuple[frozenset[str], bool]:
        """Return what the manifest lists, by first names, and whether all of it is there."""
        folder = f"{self._base}/stage_runs/{state}"
        if self._lacks(f"{self._base}/stage_runs", state):
            return frozenset(), False
        manifest = stat_of(f"{folder}/{MANIFEST}")
        about = stat_of(folder) if manifest is not None else None
        if manifest is None or about is None:
            return frozenset(), False
        # Of a committed folder only the manifest is written again, as a whole, when a part comes or goes.
        mark = (about.st_ino, about.st_mtime_ns, manifest.st_ino, manifest.st_mtime_ns)
        known = self._seen.get(state)
        if known is not None and known[0] == mark:
            return known[1], True
        files = _manifest_if_complete(Path(folder))
        parts = frozenset(name.partition("/")[0] for name in files or ())
        if files is not None:
            self._seen[state] = mark, parts
        return parts, files is not None

    @override
    def fetch(self, state: str, part: Part) -> list[str]:
        folder, damaged = self.state_folder(state), [MANIFEST]
        for _ in range(2):  # another commit may take its place meanwhile
            known = read_manifest(folder)
            if known is not None:
                wanted = files_of(part, known)
                damaged = changed_files(folder, wanted) if wanted else [part]
            if not damaged:
                break
        return damaged

    @override
    def small_file(self, state: str, name: str) -> Path:
        return self.state_folder(state) / name

    @override
    def write_manifest(self, folder: Path, known: Files) -> None:
        write_manifest(folder, known)

    @override
    def commit(self, state: str, sealed: Path) -> None:
        target = self.state_folder(state)
        with storage_errors(self.folder):
            make_folder(target.parent)
            for _ in range(10):
                if (known := _manifest_if_complete(target)) is not None:
                    return _add_parts(sealed, target, known)
                if take_place(sealed, target):
                    fsync_folder(target.parent)
                    return None
        raise StorageError(f"{target}: other processes keep writing it; stop all but one and run again")

    @override
    def discard(self, state: str) -> None:
        self._seen.pop(state, None)
        with storage_errors(self.folder):
            _remove_at_once(self.state_folder(state))

    @override
    def recover(self, state: str) -> bool:
        target = self.state_folder(state)
        for name in names_in(target.parent):
            aside = target.parent / name
            if _state_aside(name) == state and not is_there(target) and _manifest_if_complete(aside) is not None:
                with storage_errors(self.folder), contextlib.suppress(FileNotFoundError):
                    aside.rename(target)
                    return True
        return False

    # Stage runs under way ------------------------------------------------------------------------------------------

    @override
    def work_file(self, job_id: str, name: str) -> Path:
        return self.work_folder(job_id) / name

    @override
    def is_begun(self, job_id: str) -> bool:
        folder = f"{self._base}/work"
        return not self._lacks(folder, job_id) and is_there(f"{folder}/{job_id}")

    @override
    def seal_checkpoint(self, job_id: str, step: int, sealed: Path) -> Path:
        target = self.work_folder(job_id) / step_name(step)
        with storage_errors(self.folder):
            if not take_place(sealed, target):
                raise StorageError(f"{target}: another process writes it too; stop all but one and run again")
            fsync_folder(target.parent)
        return target

    @override
    def prune(self, job_id: str, step: int, keep: int, token: int) -> None:
        for other in superseded(self.steps(job_id), step, keep):
            self.drop_step(job_id, other)

    @override
    def steps(self, job_id: str) -> list[int]:
        return steps_in(names_in(self.work_folder(job_id)))

    @override
    def checkpoints(self, job_id: str) -> Iterator[Path]:
        for step in self.steps(job_id):
            if not self.damaged_step(job_id, step):
                yield self.work_folder(job_id) / step_name(step)

    @override
    def end_work(self, job_id: str, token: int | None = None) -> None:
        work, state = self.work_folder(job_id), self.state_folder(job_id)
        for name in names_in(work) if is_there(state) else ():
            if _LOG.fullmatch(name):  # stacks of a hung attempt among them
                with storage_errors(self.folder), contextlib.suppress(FileNotFoundError):
                    (work / name).replace(state / name)
        shutil.rmtree(work, ignore_errors=True)

    # What can be verified and deleted ---------------------------------------------------------------------------

    @override
    def files(self, state: str) -> Files | None:
        return read_manifest(self.state_folder(state))

    @override
    def when(self, state: str) -> float | None:
        about = stat_of(self.state_folder(state) / MANIFEST)
        return about.st_mtime if about is not None else None

    @override
    def damaged(self, state: str) -> list[str]:
        return damaged_files(self.state_folder(state))

    @override
    def damaged_step(self, job: str, step: int) -> list[str]:
        return damaged_files(self.work_folder(job) / step_name(step))

    @override
    def work(self) -> dict[str, int]:
        return {name: size_of(self._work / name) for name in names_in(self._work) if ID.fullmatch(name)}

    @override
    def take_out(self, state: str, is_wanted: Callable[[], bool]) -> bool:
        target = self.state_folder(state)
        aside = target.with_name(f".{state}.{secrets.token_hex(6)}.aside")
        with storage_errors(self._runs):
            try:
                target.rename(aside)
            except FileNotFoundError:
                return False
            if is_wanted():
                with contextlib.suppress(OSError):  # trained again meanwhile: then that one counts
                    aside.rename(target)
                    return False
            old = aside.with_suffix(".old")  # by this name nobody puts it back
            with contextlib.suppress(FileNotFoundError):
                aside.rename(old)
        shutil.rmtree(old, ignore_errors=True)
        return True

    @override
    def aside(self) -> list[str]:
        return sorted({state for name in names_in(self._runs) if (state := _state_aside(name)) is not None})

    @override
    def drop(self, state: str, part: Part) -> None:
        target = self.state_folder(state)
        if (files := read_manifest(target)) is None:
            return
        write_json(target / MANIFEST, manifest_of(without(part, files)))
        with storage_errors(self._runs):
            _remove_at_once(target / part)

    @override
    def drop_step(self, job: str, step: int) -> None:
        shutil.rmtree(self.work_folder(job) / step_name(step), ignore_errors=True)

    @override
    def leftovers(self, is_held: Callable[[str], bool], older_seconds: float) -> Iterator[Leftover]:
        places = [self._runs, *(self._work / job for job in self.work() if not is_held(job))]
        for note in _NOTES:
            places += [path for path, about in files_below(self.folder / note) if stat.S_ISDIR(about.st_mode)]
        places += [self._runs / state for state in self.states()]  # parts that were moved aside
        for place in places:
            for name in names_in(place):
                path = place / name
                if name.startswith(".") and time.time() - _changed(path) >= older_seconds:
                    what = path.relative_to(self.folder).as_posix()
                    yield Leftover(what, size_of(path), partial(remove, path), partial(_changed, path))


def remove(path: Path) -> None:
    """Delete a file or a folder; it need not be there."""
    about = stat_of(path)
    if about is not None and stat.S_ISDIR(about.st_mode):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    return sum(about.st_size for _, about in files_below(path) if not stat.S_ISDIR(about.st_mode))


def take_place(sealed: Path, target: Path) -> bool:
    """Rename a folder to its place, over a damaged one that was there; False where another writer was quicker."""
    old, manifest = _old(target), read_manifest(sealed)
    with contextlib.suppress(FileNotFoundError):
        target.rename(old)
    try:
        sealed.rename(target)
    except OSError as error:
        # A file server whose answer was lost is asked again by the system: then the folder is in its place.
        if error.errno == errno.ENOENT and not is_there(sealed) and None is not manifest == read_manifest(target):
            return True
        with contextlib.suppress(OSError):
            old.rename(target)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    finally:
        shutil.rmtree(old, ignore_errors=True)
    return True


def _add_parts(sealed: Path, target: Path, known: Files) -> None:
    """Move the parts that a complete state lacks into it, and list them last: it is complete at every moment."""
    new = read_manifest(sealed) or {}
    lacks = [part for part in PARTS if files_of(part, new) and not files_of(part, known)]
    for part in lacks:
        _remove_at_once(target / part)  # what a killed writer moved and did not list
        (sealed / part).rename(target / part)
    if lacks:
        fsync_folder(target)
        files = known | {name: entry for part in lacks for name, entry in files_of(part, new).items()}
        write_json(target / MANIFEST, manifest_of(files))


def _manifest_if_complete(folder: Path) -> Files | None:
    """Return the manifest of a folder without a file that is missing or cut short.

    Of weights and checkpoints no contents are read; what figures are read from may not have changed either.
    """
    files = read_manifest(folder)
    if files is None or cut_files(folder, files):
        return None
    small = {name: entry for name, entry in files.items() if name.partition("/")[0] not in PARTS}
    return None if changed_files(folder, small) else files


def _remove_at_once(folder: Path) -> None:
    """Delete a folder; it need not be there, and readers see all of it or none."""
    old = _old(folder)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.old")


def _state_aside(name: str) -> str | None:
    """Return the state whose folder a gc gave this name while it asks who wants it."""
    fit = _ASIDE.fullmatch(name)
    return fit.group(1) if fit else None


def _changed(path: Path) -> float:
    """Return when anything of a file or folder was last touched, renamed included; never yet where nothing is there."""
    return max((about.st_ctime for _, about in files_below(path)), default=math.inf)


def _checked_key(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise StorageError(f"{key!r} is no key of a store; it is names joined by `/`, none beginning with a dot")
    return key


def _link(part: Path, path: Path) -> bool:
    """Give a complete file a name that nobody has; False where somebody has it."""
    try:
        os.link(part, path)
    except FileExistsError:
        # A file server that answers late is asked again by the system: then the name is there and is ours.
        return os.stat(part).st_nlink == 2
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _copy_exclusively(part, path)
    return True


def _copy_exclusively(part: Path, path: Path) -> bool:
    """Copy, on file systems without hard links: a reader may see the file a moment before its content is there."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with open(descriptor, "wb") as file:
        file.write(part.read_bytes())
    return True

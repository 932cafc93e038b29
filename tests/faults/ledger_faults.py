"""Drives a ledger through all that it does, with one fault at the n-th step: a program of its own, forked for each n.

`python ledger_faults.py MODE URL FOLDER [FIRST [EVERY]]`: for n = FIRST, FIRST + EVERY, … a child works on a fresh
storage `URL/MODE-n` with the fault at its n-th step, until one gets through without meeting it. Then another process
looks, works, and looks again, as the next `run` and `gc` would. Prints one JSON line: how many points there were, and
what went wrong at which.

Modes: `kill` (SIGKILL before a call that changes something, or before its data is made to last), `full` (from there on
no space is left), `EIO`, `ESTALE`, `EACCES` (a look at a file or folder fails once), and `again EIO` … (the same, on a
storage where all is done). Audit hooks see every call of this process to the file system, whoever makes it.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botocore.httpsession  # noqa: F401 - imports belong before the forks
import s3transfer.manager  # noqa: F401

from orchestrator.errors import LlavoltaError
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.backends import s3
from orchestrator.plan.ledger.files import storage_errors
from orchestrator.plan.ledger.inventory import Collector, damage
from orchestrator.plan.ledger.leases import Leases

FREES = {"os.remove", "os.rmdir"}
CHANGES = {"os.rename", "os.link", "os.mkdir", *FREES}
LOOKS = {"os.listdir", "os.scandir"}
# State to what is kept of it in the end and what its stage run writes; `gone` is reached by no record.
JOBS = {"first": "weights", "richer": "full", "poorer": "weights", "gone": "none"}


class Fault:
    """Counts steps of one kind below some folders and does its harm at the n-th.

    Attributes:
        count: Steps so far.
        met: Whether the n-th came.
    """

    def __init__(self, mode: str, at: int, folders: list[str], is_remote: bool) -> None:
        self.mode, self.at, self.folders, self.count, self.met = mode, at, folders, 0, False
        self._is_read, self._is_remote = mode not in ("kill", "full"), is_remote
        sys.addaudithook(self._audit)
        real_fsync, real_stat, real_client = os.fsync, os.stat, s3.s3_client

        def fsync(descriptor: int) -> None:
            if not self._is_read and not self._is_remote:
                self.step(os.readlink(f"/proc/self/fd/{descriptor}"))
            real_fsync(descriptor)

        def stat(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
            if self._is_read:
                self.step(path)
            return real_stat(path, *arguments, **options)

        def client() -> Any:
            made = real_client()
            made.meta.events.register("before-send.s3", self._request)
            return made

        os.fsync, os.stat, s3.s3_client = fsync, stat, client

    def _request(self, request: Any, **_: Any) -> None:
        if self.mode == "kill" and request.method in ("PUT", "POST", "DELETE"):
            self.step(self.folders[0])

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_remote and event != "os.rename":  # of a bucket's copy only what puts something in its place
            return
        if event == "open":
            path, _, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes != self._is_read and not flags & os.O_DIRECTORY:
                self.step(path)
        elif event in (LOOKS if self._is_read else CHANGES):
            path, *more = arguments
            if event in ("os.remove", "os.rmdir") and more[0] >= 0:  # below a folder that is open, as rmtree does it
                path = f"{os.readlink(f'/proc/self/fd/{more[0]}')}/{path}"
            if self.mode != "full" or event not in FREES:
                self.step(path)

    def step(self, path: Any) -> None:
        """One step."""
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(tuple(self.folders)):
            return
        self.count += 1
        if self.count != self.at and not (self.mode == "full" and self.count > self.at > 0):
            return
        self.met = True
        if self.mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = errno.ENOSPC if self.mode == "full" else getattr(errno, self.mode)
        raise OSError(number, os.strerror(number), os.fspath(path))


def work(url: str, owner: str, tell: Callable[[str], None]) -> None:
    """One driver's life: what is missing is made, then garbage is collected; `tell` hears what it did."""
    ledger = Ledger(url)
    leases = Leases(ledger.store, owner, beat_seconds=1e9)
    wanted = {state: keep for state, keep in JOBS.items() if state != "gone"}
    note = {"name": "one", "file": "", "when": 1.0, "states": wanted, "evaluations": ["test"], "cells": {}}
    ledger.store.write("experiments/one.json", json.dumps(note).encode())
    for state in JOBS:
        if state != "gone" or ledger.evaluation("test") is None:
            for parts in (["weights"], ["weights", "checkpoint"]) if state == "richer" else (["weights"],):
                parts = ["weights", "checkpoint"] if state == "poorer" else parts
                train(ledger, leases, state, parts, tell)
    if ledger.evaluation("test") is None:
        ledger.write_failure("test", {"error": "it failed once"})
        tell("evaluate test")
        ledger.write_evaluation("test", {"metrics": {"accuracy": 0.5}})
    ledger.clear_failure("test")
    leases.close()
    collect(ledger)


def train(ledger: Ledger, leases: Leases, state: str, parts: list[str], tell: Callable[[str], None]) -> None:
    """As a lane does: the lease, a look, in-stage checkpoints, the commit."""
    token = leases.acquire(state)
    assert token is not None, "the driver before is dead"
    enough = ["weights"] if state == "poorer" else parts
    if not (ledger.is_done(state) or ledger.recover(state)) or not all(ledger.has(state, part) for part in enough):
        ledger.fences = {state: token}
        ledger.begin(state)
        tell(f"train {state}")
        for step in (2, 4, 6) if state == "first" else ():
            if step not in ledger.checkpoint_steps(state):
                folder = ledger.writing_folder(state) / f"step_{step:06d}"
                write(folder, {"model.pt": f"after step {step}"})
                ledger.share(folder)
                ledger.seal_checkpoint(state, step, folder)
        writing = ledger.writing_folder(state)
        write(ledger.work_folder(state), {"log.txt": f"{state} said this\n", "metrics.jsonl": '{"step": 0}\n'})
        write(writing, {f"{part}/model.safetensors": f"{part} of {state}" for part in parts})
        write(writing, {"job.json": json.dumps({"type": "stage", "last_step": 6}), "result.json": "{}"})
        ledger.share(writing)
        ledger.commit(state)
    if ledger.last_checkpoint(state) is not None:  # what a driver does that was killed between a commit and its end
        ledger.end_work(state)
    ledger.fetch(state, "weights")
    tell(f"done {state} {' '.join(parts)}")
    leases.forget(state)


def write(folder: Path, files: dict[str, str]) -> None:
    """As the training writes: plainly, and what goes wrong is told."""
    with storage_errors(folder):
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)


def collect(ledger: Ledger) -> None:
    """`ledger gc --delete`, where nothing is too young."""
    for step in Collector(ledger, leftover_seconds=-1e9, pause=lambda _: None).steps():
        step.remove()


def look(url: str) -> dict[str, Any]:
    """All that a reader sees, and whether it is whole."""
    ledger = Ledger(url)
    states = {}
    for state in ledger.store.states():
        for part in ("weights", "checkpoint"):
            if ledger.has(state, part):
                assert (ledger.fetch(state, part) / "model.safetensors").read_text() == f"{part} of {state}"
        kept = [part for part in ("weights", "checkpoint") if ledger.has(state, part)]
        log, metrics = ledger.log_file(state), ledger.metrics_file(state)
        states[state] = [kept, log.read_text(), metrics.read_text(), ledger.result(state), ledger.job(state)]
    offered = [(step.kind, step.name) for step in Collector(ledger, leftover_seconds=-1e9, sure=False).steps()]
    notes = {key: ledger.store.names(key) for key in ("evaluations", "failures", "owners", "work", "aside")}
    notes["leases"] = [name for name in ledger.store.names("leases") if ledger.store.names(f"leases/{name}")]
    return {"states": states, "damage": damage(ledger), "offered": offered, "notes": notes}


def child(
    act: Callable[..., Any], *given: Any, fault: tuple[str, int, list[str], bool] | None = None
) -> tuple[int, list[str]]:
    """Does something in a fork, with a fault; its end (0: done, 1: a clear error, 2: none, -9: killed) and its tale."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 2

        def tell(line: str) -> None:
            os.write(writer, f"{line}\n".encode())

        injected = Fault(*fault) if fault is not None else None
        try:
            act(*given, tell)
            code = 0
        except LlavoltaError as error:
            tell("error " + str(error).replace("\n", " "))
            code = 1
        except BaseException:
            tell("traceback " + traceback.format_exc().replace("\n", " | "))
        if injected is not None:
            injected.at = -1
            tell(f"steps {injected.count} {'met' if injected.met else 'unmet'}")
        os._exit(code)
    os.close(writer)
    with open(reader) as pipe:
        told = pipe.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), told


def points(mode: str, url: str, folder: Path, first: int = 1, every: int = 1) -> dict[str, Any]:
    """Each point in turn: how many there were, the ends of the disturbed children, and what was not as it should be."""
    mode, again = mode.removeprefix("again "), mode.startswith("again ")
    bad: list[str] = []
    ends: Counter[int] = Counter()
    errors: Counter[str] = Counter()

    def seen(where: str) -> dict[str, Any]:
        _, told = child(lambda tell: tell(json.dumps(look(where))))
        return dict(json.loads(told[0])) if told[0].startswith("{") else {"failed": told}

    def place(name: str) -> tuple[str, list[str]]:
        cache = folder / "cache" / name
        os.environ["XDG_CACHE_HOME"] = str(cache)
        where = f"{url}/{name}"
        return where, [where if "://" not in where else str(cache)]

    if "://" in url:
        s3.s3_client()  # what it imports and reads is kept; each child would do it anew
    where, _ = place("undisturbed")
    code, tale = child(work, where, "driver")
    assert code == 0, tale
    expected = seen(where)
    assert expected["damage"] == expected["offered"] == [] and len(expected["states"]) == 3, expected
    made = [line for line in tale if line.startswith(("train", "evaluate"))]
    for at in itertools.count(first, every):
        if not again:
            where, below = place(f"{mode}-{at}")
        else:
            below = [where if "://" not in where else str(folder / "cache" / "undisturbed")]
        code, told = child(work, where, f"driver{at}", fault=(mode, at, below, "://" in where))
        ends[code] += 1
        errors.update(line[:300].replace(str(folder), "") for line in told if line.startswith("error"))
        trained = [line for line in told if line.startswith(("train", "evaluate"))]
        done = {line.split()[1]: line.split()[2:] for line in told if line.startswith("done")}
        if code == 2 or (code == 1 and mode == "full" and "no space left" not in " ".join(told)):
            bad.append(f"{at}: ended with {told}")
        if trained and (again or (code == 0 and trained != made)):
            bad.append(f"{at}: trained {trained}")
        met = code == -signal.SIGKILL or told[-1].endswith(" met")
        _, looked = child(tell_kept, where)
        now = json.loads(looked[0]) if looked[0].startswith("{") else looked
        for state, parts in done.items():
            parts = ["weights"] if state == "poorer" else parts
            if state != "gone" and not (isinstance(now, dict) and set(parts) <= set(now.get(state, ()))):
                bad.append(f"{at}: {state} was finished and is not: {now}")
        second, more = child(work, where, f"next{at}")
        twice = [line for line in more if line.startswith("train") and line.split()[1] in done and "gone" not in line]
        twice = [line for line in twice if line != "train richer" or done.get("richer") == ["weights", "checkpoint"]]
        if second != 0 or twice or seen(where) != expected:
            bad.append(f"{at}: then {second} {twice} {more} {seen(where)}")
        if not met:
            return {
                "points": (at - first) // every,
                "ends": ends,
                "errors": errors,
                "bad": bad[:5],
                "number_bad": len(bad),
            }
    raise AssertionError("unreachable")


def tell_kept(url: str, tell: Callable[[str], None]) -> None:
    """Tells whole states and their parts, as a plan sees them."""
    ledger = Ledger(url)
    names = [state for state in JOBS if ledger.is_done(state)]
    kept = {state: [part for part in ("weights", "checkpoint") if ledger.has(state, part)] for state in names}
    tell(json.dumps(kept))


if __name__ == "__main__":
    print(json.dumps(points(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:]))))

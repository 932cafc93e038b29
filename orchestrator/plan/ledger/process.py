"""Processes: their identity across machines, and whether one still runs."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Process:
    """The identity of a process: where it runs, its number there and when it began.

    Attributes:
        machine: Boot and namespaces; equal only where process numbers and starts mean the same.
        host: Name of the machine, for people.
        started: Clock ticks from the machine's boot to its start, which no setting of the clock moves; -1 where the
            system does not say.
        began: When it began by its machine's clock, in seconds since the epoch: never used to identify processes.
    """

    machine: str
    host: str
    pid: int
    started: int
    began: float = 0.0

    def is_gone(self) -> bool | None:
        """Return True or False for a process of this machine; None for another machine's, or where it is not known."""
        if self.machine != machine_id():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):  # another user's: it is there
            pass
        found = _stat(str(self.pid))
        if found is None or self.started < 0:
            return None  # the number is in use, by this process or a later one
        state, started = found
        return state in "ZX" or started != self.started


@functools.cache
def machine_id() -> str:
    """Return one text for all processes that see the same process numbers and start ticks until the next boot."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        spaces = [os.readlink("/proc/self/ns/pid")]
    except OSError:  # not Linux: where the boot time moves with the clock, processes before are another machine's
        boot, spaces = f"{psutil.boot_time():.0f}-{uuid.getnode():012x}", []
    with contextlib.suppress(OSError):  # a time namespace of its own counts from another start; old kernels have none
        spaces.append(os.readlink("/proc/self/ns/time"))
    return " ".join([boot, *spaces, socket.gethostname()])


def start_ticks(pid: int | None = None) -> int:
    """Return the clock ticks from boot to the start of a process (None: the calling one); -1 where not known."""
    found = _stat("self" if pid is None else str(pid))
    return found[1] if found is not None else -1


def _stat(name: str) -> tuple[str, int] | None:
    """Return the state and start ticks of a process (`man 5 proc`, fields 3 and 22 of `stat`); None if unreadable."""
    try:
        # Another namespace's /proc, as in a container that mounts its host's, has other processes under these numbers.
        if os.readlink("/proc/self") != str(os.getpid()):
            return None
        fields = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def this_process() -> Process:
    """Return the calling process."""
    began = psutil.Process().create_time()
    return Process(machine_id(), socket.gethostname(), os.getpid(), start_ticks(), began)

"""What this process runs on: its device and processor, the memory it took, and what others do beside it."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil
import torch


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def processor_name() -> str:
    """Return the CPU model, which decides how kernels round; the architecture where the system does not report it."""
    return _field_of("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def reset_peak_memory() -> None:
    """Reset the peak, so that a stage run is not charged for the one before it in the same process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is then the process's
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident_peak_bytes() -> int:
    """Return the largest resident memory of this process since `reset_peak_memory`."""
    if peak := _field_of("/proc/self/status", "VmHWM"):
        return int(peak.split()[0]) * 1024
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def available_memory_bytes() -> int:
    """Return the main memory that can still be taken: the machine's, or what a limit on this container or job leaves.

    Limits of control groups, of version 1 and 2, at any level above this process: Kubernetes, Docker and SLURM set
    them, and the machine's own figure does not know them. Pages of files that could be dropped count as free there too.
    """
    return min([psutil.virtual_memory().available, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, own = line.split(":", 2)
            if controllers not in {"", "memory"}:
                continue
            root, limit, used, cache = _MEMORY_FILES[controllers]
            group = PurePosixPath(own.lstrip("/"))
            for folder in (root / group, *(root / parent for parent in group.parents)):
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit here
                    left = int((folder / limit).read_text()) - int((folder / used).read_text())
                    yield max(0, left + int(_field_of(str(folder / "memory.stat"), cache, " ") or 0))


# Of each version: where groups lie, and the names of the limit, of what is used, and of what of it can be dropped.
_MEMORY_FILES = {
    "": (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    "memory": (
        Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
    ),
}  # fmt: skip


def peak_bytes(model: torch.nn.Module, work: Callable[[], object]) -> int:
    """Return the most bytes that torch held at once while some work ran, the model's weights included.

    On a GPU that is the allocator's own count. On the CPU it is the weights and the largest sum of what torch's
    allocator gave and took back during the work, as its profiler records them: unlike resident memory it has nothing of
    what else the process holds or does not return to the system.

    Args:
        model: Whose weights are held.
        work: Runs once, slower than it would alone.
    """
    weights = {tensor.untyped_storage().data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    device = next(iter(weights.values())).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells standard error that it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    recorded = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]")
    held = sum(tensor.untyped_storage().nbytes() for tensor in weights.values())
    return held + max(0, *itertools.accumulate(nbytes for _, nbytes in changes), 0)


@dataclass(frozen=True)
class Load:
    """How much this machine has worked so far, and for whom.

    Attributes:
        seconds: On the clock.
        used_seconds: Time of all processors together, in this container where it is one.
        own_seconds: What of it was this process's.
        foreign_gpu_bytes: Memory of the GPU that other processes hold.
    """

    seconds: float
    used_seconds: float | None
    own_seconds: float
    foreign_gpu_bytes: int = 0

    @classmethod
    def now(cls, device: torch.device) -> Load:
        """Return the machine's load up to now.

        Args:
            device: The device that is measured.
        """
        foreign = 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            free, total = torch.cuda.mem_get_info(device)
            foreign = total - free - torch.cuda.memory_reserved(device)
        return cls(time.monotonic(), _used_seconds(), time.process_time(), foreign)

    def others_since(self, before: Load) -> str | None:
        """Return what other processes took of the machine meanwhile, where it may have slowed this one; else None."""
        found = []
        if self.used_seconds is not None and before.used_seconds is not None:
            theirs = self.used_seconds - before.used_seconds - (self.own_seconds - before.own_seconds)
            busy = theirs / max(1e-9, self.seconds - before.seconds)
            if busy >= _BUSY_PROCESSORS:
                found.append(f"{busy:.1f} processors")
        if self.foreign_gpu_bytes >= _FOREIGN_GPU_BYTES:
            found.append(f"{self.foreign_gpu_bytes / 2**30:.1f} GiB of the GPU")
        return " and ".join(found) or None


_BUSY_PROCESSORS = 0.5
_FOREIGN_GPU_BYTES = 2 * 2**30  # more than this process's own context takes beside torch's memory


def _used_seconds() -> float | None:
    """Return the time that all processors have worked; None where the system does not say."""
    if (used := _field_of("/sys/fs/cgroup/cpu.stat", "usage_usec", " ")) is not None:
        return int(used) / 1e6
    if (fields := _field_of("/proc/stat", "cpu ", "cpu ")) is not None:
        user, nice, system, _, _, irq, softirq, *rest = map(int, fields.split())
        return (user + nice + system + irq + softirq + sum(rest[:1])) / os.sysconf("SC_CLK_TCK")
    return None


def _field_of(file: str, name: str, mark: str = ":") -> str | None:
    """Return what follows the mark in the first line that begins with a name; None where the system has none."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            if line.startswith(name):
                return line.partition(mark)[2].strip()
    return None

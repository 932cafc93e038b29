"""The memory that is free, under the limits of control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ASK = "from orchestrator.machine import available_memory_bytes; print(available_memory_bytes())"
LIMIT = 2**30


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A control group of at most 1 GiB, and within it one without a limit of its own."""
    own = dict(line.split(":")[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    root = Path("/sys/fs/cgroup/memory") if "memory" in own else Path("/sys/fs/cgroup")
    outer = root / own.get("memory", own.get("", "/")).lstrip("/") / f"llavolta-test-{os.getpid()}"
    inner = outer / "inner"
    try:
        inner.mkdir(parents=True)
        (outer / ("memory.limit_in_bytes" if "memory" in own else "memory.max")).write_text(str(LIMIT))
    except OSError as error:
        for folder in (inner, outer):
            if folder.is_dir():
                folder.rmdir()
        pytest.skip(f"no control group with a limit can be made here: {error}")
    yield inner
    inner.rmdir()
    outer.rmdir()


def _asked(group: Path | None = None) -> int:
    enter = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0'); " if group else ""
    done = subprocess.run([sys.executable, "-c", enter + ASK], check=True, capture_output=True, text=True)
    return int(done.stdout)


def test_a_limit_above_this_process_counts(limited_group: Path) -> None:
    left = _asked(limited_group)
    assert 0 < left < LIMIT < _asked()


def test_without_a_limit_it_is_the_machines() -> None:
    assert _asked() <= psutil.virtual_memory().total

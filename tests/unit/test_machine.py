"""What this process runs on: memory that is kept, so that a step takes no page faults, and given back afterwards."""

import platform
import resource

import pytest
import torch

from orchestrator.machine import freed_memory_kept

MANY = 10_000


def faults() -> int:
    """Page faults of filling 64 MiB that were filled and freed before."""
    for _ in range(3):
        torch.ones(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_freed_memory_is_kept_meanwhile_and_not_after() -> None:
    assert faults() > MANY
    with freed_memory_kept():
        assert faults() < MANY / 100
    assert faults() > MANY

"""Ties go to the first under every set of CPU kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from choices_of_all import chosen
from repository import SUPPORT

SETTINGS = [
    {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ATEN_CPU_CAPABILITY": "avx512", "MKL_ENABLE_INSTRUCTIONS": "AVX512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
]


@pytest.fixture(scope="module")
def wanted():
    return chosen()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting["ATEN_CPU_CAPABILITY"])
def test_kernels(wanted, setting):
    kernels = setting["ATEN_CPU_CAPABILITY"]
    if kernels != "default" and kernels not in Path("/proc/cpuinfo").read_text():  # avx512 is told as avx512f and more
        pytest.skip(f"the processor has no {kernels}")
    path = os.pathsep.join([str(SUPPORT), *sys.path])
    environment = os.environ | setting | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "choices_of_all.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["chosen"] == wanted
    if setting["ATEN_CPU_CAPABILITY"] == "default":
        assert told["capability"] in ("DEFAULT", "NO AVX")  # the setting is heard

"""The contract kit as a command."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_command():
    command = [sys.executable, "-m", "orchestrator.compression.testing", "stride", "--families", "llava"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "stride\n  llava: proven\n"), done.stderr

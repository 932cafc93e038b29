"""The process that tests fork programs from: it imports all it should, and starts no thread."""

from __future__ import annotations

import subprocess
import sys

from program import PRELOADED


def test_what_is_imported_beforehand_is_there_and_starts_no_thread() -> None:
    code = (
        "import importlib, sys, threading\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print([thread.name for thread in threading.enumerate()])"
    )
    done = subprocess.run([sys.executable, "-c", code, *PRELOADED], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['MainThread']"

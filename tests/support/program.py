"""Starts the program: anew as a user does, or forked from a process that has imported the frameworks already."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROGRAM = [sys.executable, "-m", "orchestrator"]

# Imports are half of what a short run costs: one process a session does them, and runs and worker groups are forked
# from it before any thread has started. A module that is not there is passed over without a word: see test_program.py.
PRELOADED = [
    *("deepspeed", "mlflow", "peft", "easy_vqa", "orchestrator.cli", "orchestrator.run", "orchestrator.storage"),
    *("orchestrator.dispatch.run_job", "orchestrator.evaluation.evaluate"),
    *("orchestrator.data.check", "orchestrator.search.search", "orchestrator.compression.families.llava"),
    *("transformers.models.llava.modeling_llava", "transformers.models.llava.processing_llava"),
    *("transformers.models.clip.modeling_clip", "transformers.models.llama.modeling_llama"),
    *("mlflow.store.tracking.sqlalchemy_store", "alembic.command", "matplotlib.pyplot", "torch.utils.cpp_extension"),
]
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(PRELOADED)


def environment(**more: str) -> dict[str, str]:
    """The environment of a program that is started: nothing of the user's own settings, one thread."""
    own = ("MLFLOW", "LLAVOLTA", "RAY_", "HF_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    # Ray's workers step back behind everything else on the machine: beside another test they would stand still.
    quick = {"RAY_worker_niceness": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    return {**kept, "OMP_NUM_THREADS": "1", **quick, **more}


def wait_until(
    condition: Callable[[], Any], process: subprocess.Popen[bytes] | None = None, seconds: float = 120
) -> Any:
    """Polls until `condition` holds; fails where the process ends before."""
    limit = time.monotonic() + seconds
    while not (found := condition()):
        assert process is None or process.poll() is None, "it ended first"
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)
    return found


def run_anew(
    arguments: Sequence[str | Path], folder: Path, timeout: float = 300, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the program in a folder as a script would, without a terminal."""
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)], cwd=folder, env=environment(**more), capture_output=True, text=True,
        timeout=timeout, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def run_forked(
    arguments: Sequence[str | Path],
    folder: Path,
    timeout: float = 300,
    *,
    program: str = "llavolta",
    merged: bool = False,
    **more: str,
) -> subprocess.CompletedProcess[str]:
    """Run the program like `run_anew`; what it imports is there already.

    Args:
        arguments: Its arguments.
        folder: Where it runs.
        timeout: Seconds.
        program: `llavolta`; or `python`, whose arguments are a file and its own, or `-c` and a text.
        merged: Whether standard output has the errors too, in the order in which they were printed.
        **more: Of its environment.
    """
    words = [program, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as printed:
        output = Path(printed) / "output"
        errors = output if merged else Path(printed) / "errors"
        process = forks.Process(target=_program, args=(words, folder, environment(**more), output, errors))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout, output.read_text(), errors.read_text())
        assert process.exitcode is not None
        return subprocess.CompletedProcess(
            words, process.exitcode, output.read_text(), "" if merged else errors.read_text()
        )


def _program(words: list[str], folder: Path, env: dict[str, str], output: Path, errors: Path) -> None:
    gc.freeze()  # what was imported beforehand is looked through at no collection
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for descriptor, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.path.insert(0, str(folder))
    program, *sys.argv = words
    try:
        if program == "llavolta":
            from orchestrator.cli import main

            sys.argv.insert(0, program)
            main()
        elif sys.argv[0] == "-c":
            sys.modules["__main__"] = module = types.ModuleType("__main__")
            exec(compile(sys.argv.pop(1), "<string>", "exec"), vars(module))
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process leaves them out
        sys.stdout.flush()
        sys.stderr.flush()

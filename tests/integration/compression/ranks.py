"""Starts a script as one worker or several of a process group and gives what rank 0 prints as its result."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from repository import SUPPORT

# A C++ op that sums over the ranks of one machine: it would be compiled for a minute on the first start.
BEGIN = """
import json, os, sys, torch, deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
sys.path.insert(0, {folder!r})
deepspeed.init_distributed("gloo")
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
"""


def result_of_rank_0(script: str, world: int, folder: Path, *arguments: str):
    """The JSON that rank 0 prints after RESULT; a worker that fails shows its output.

    Args:
        script: Python; `rank` and `world` are set, DeepSpeed is initialised, this folder can be imported from.
        world: Number of workers.
        folder: Where the script is written.
        arguments: Command-line arguments of the script.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = folder / f"ranks_{world}.py"
    path.write_text(BEGIN.format(folder=str(SUPPORT)) + script)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    common |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(world)}
    workers = [
        subprocess.Popen(
            [sys.executable, str(path), *arguments],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [worker.communicate(timeout=600)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    lines = [line for line in outputs[0].splitlines() if line.startswith("RESULT")]
    assert lines, "\n".join(output[-3000:] for output in outputs)
    return json.loads(lines[0].removeprefix("RESULT"))

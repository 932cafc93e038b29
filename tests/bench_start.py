"""Measures the memory of this machine that a rank takes while a model is opened under ZeRO-3.

    python tests/bench_start.py --workers 2 --hidden 2048 --layers 20

A LLaVA of random weights (a billion parameters) is opened from the ledger's file on several ranks of this machine. Of
the rank that took the most are told: the peak while weights are read whole, as without ZeRO-3, and while they are read
one parameter after the other and divided; what is left of the latter, a rank's share; and the peak of the whole start,
the engine's own buffers included. Memory is what a process has alone (`RssAnon`), without pages of the file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
from bench_micro_batch import widen
from training_workers import launch, make_ledger, model_of, recipe_of, stage, write_model

from orchestrator.plan.jobs import StageJob


def own_gib() -> float:
    """Memory that this process has alone."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 2**20


def peak_of(action: Callable[[], Any]) -> tuple[float, float, float]:
    """Peak and end of the memory that an action takes beyond what was there, in GiB, and its seconds."""
    before, peak, ended = own_gib(), [0.0], threading.Event()

    def look() -> None:
        while not ended.wait(0.01):
            peak[0] = max(peak[0], own_gib() - before)

    looking = threading.Thread(target=look)
    looking.start()
    begun = time.perf_counter()
    kept = action()
    seconds = time.perf_counter() - begun
    ended.set()
    looking.join()
    left = own_gib() - before
    del kept
    return max(peak[0], left), left, seconds


def measure(folder: Path, job: StageJob) -> dict[str, tuple[float, ...]]:
    """What each way takes, the most of all ranks; every rank calls it."""
    import torch.distributed as dist

    from orchestrator.models.build import WEIGHTS_FILE, build_model
    from orchestrator.spec.model import ModelSpec
    from orchestrator.training import engine

    weights = make_ledger(folder, job.model).state_folder("root") / WEIGHTS_FILE
    found = {"whole": peak_of(lambda: build_model(ModelSpec.model_validate(job.model), weights))}
    of_parts: list[tuple[float, float, float]] = []
    read = engine._read_in_parts
    engine._read_in_parts = lambda *arguments: of_parts.append(peak_of(lambda: read(*arguments)))
    found["start"] = peak_of(lambda: engine.open_session(job, weights))
    found["in parts"] = of_parts[0]
    found["file"] = (weights.stat().st_size / 2**30, 0.0, 0.0)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    return {name: tuple(max(rank[name][at] for rank in ranks) for at in range(3)) for name in found}


def main() -> None:
    """Prints one line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = model_of(widen(write_model(folder / "model"), given.hidden, given.layers), dtype=given.dtype)
        recipe = recipe_of(deepspeed="zero3", global_batch_size=given.workers, per_device_train_batch_size=1)
        found = launch(given.workers, measure, folder / "ledger", stage(model, 1, recipe=recipe))
    print(f"weights of {found['file'][0]:.2f} GiB in float32, {given.workers} ranks, {given.dtype}; GiB of a rank")
    for name in ("whole", "in parts", "start"):
        peak, left, seconds = found[name]
        print(f"{name:9} peak {peak:5.2f}  left {left:5.2f}  {seconds:5.1f} s", flush=True)


if __name__ == "__main__":
    main()

"""Measures by hand how long training waits for a checkpoint inside a stage run: copied, and written at once.

    python tests/bench_checkpoints.py --workers 2 --rounds 5 --folder FOLDER

Both ways take turns in one process (A B A B); medians are told. `waits` is what training cannot use; `sealed` is when
the checkpoint is safe, while the copies are written beside nothing else.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
from bench_micro_batch import widen
from training_workers import launch, make_ledger, model_of, recipe_of, stage, write_model

from orchestrator.plan.jobs import StageJob


def measure(folder: Path, job: StageJob, rounds: int) -> dict[str, Any]:
    """Seconds of both ways in turns, and the bytes of a checkpoint; every rank calls it."""
    from orchestrator.machine import available_memory_bytes
    from orchestrator.models.build import WEIGHTS_FILE
    from orchestrator.training import distributed, metrics_log
    from orchestrator.training.batches import MicroBatch
    from orchestrator.training.checkpoint_writer import CheckpointWriter
    from orchestrator.training.engine import TrainingMemory, open_session
    from orchestrator.training.step import run_step

    ledger, memory = make_ledger(folder, job.model), TrainingMemory()
    data, waits, sealed = memory.data(job), {"copied": [], "at once": []}, {"copied": [], "at once": []}
    with metrics_log.stage_log(folder):
        session = open_session(job, ledger.state_folder("root") / WEIGHTS_FILE)
        session.switch(())
        size = job.recipe["per_device_train_batch_size"]
        first = distributed.rank() * size
        indices = list(range(first, first + size))
        run_step(session, job, 0, [MicroBatch(indices, data.collate(indices))], should_stop=False)  # Adam has states
        writer = CheckpointWriter(session, job, ledger, None)
        for step in range(rounds + 1):
            for way in waits:
                free = available_memory_bytes if way == "copied" else (lambda: 0)
                distributed.available_memory_bytes = free
                distributed.gather(None)
                start = perf_counter()
                writer.begin(2 * step + (way == "copied"))
                if way == "at once":
                    writer.finish()
                waited = perf_counter() - start
                writer.finish()
                if step:  # the first warms up
                    waits[way].append(waited)
                    sealed[way].append(perf_counter() - start)
        writer.close()
        newest = ledger.last_checkpoint(job.id)
        num_bytes = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    memory.release()
    return {"waits": waits, "sealed": sealed, "bytes": num_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--deepspeed", default="zero2")
    parser.add_argument("--folder", help="where checkpoints are written; a temporary folder by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        model = widen(write_model(Path(folder) / "model"), given.hidden, given.layers)
        recipe = recipe_of(
            deepspeed=given.deepspeed, global_batch_size=2 * given.workers, per_device_train_batch_size=2
        )
        found = launch(
            given.workers, measure, Path(folder) / "runs", stage(model_of(model), 6, recipe=recipe), given.rounds
        )
    print(f"{given.deepspeed}, {given.workers} workers, {found['bytes'] / 2**30:.2f} GiB, median of {given.rounds}")
    for way in ("copied", "at once"):
        waits, sealed = found["waits"][way], found["sealed"][way]
        print(
            f"  {way:8} training waits {median(waits):.2f} s ({min(waits):.2f} to {max(waits):.2f}), "
            f"sealed after {median(sealed):.2f} s"
        )
    print(f"  ratio of the waits {median(found['waits']['copied']) / median(found['waits']['at once']):.3f}")


if __name__ == "__main__":
    main()

"""Measures `per_device_train_batch_size: auto` by hand: accumulation steps and seconds of an optimizer step, ZeRO-3.

    python tests/bench_micro_batch.py --workers 2 --rounds 9

A number that fits full tokens is what one has to write for a schedule that ends with them. Under each variant optimizer
steps with that number and with the size `auto` finds in the same memory take turns (A B A B); medians are told.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
from training_workers import (
    launch,
    make_ledger,
    model_of,
    recipe_of,
    stage,
    write_model,
)

from orchestrator.plan.jobs import Action, StageJob
from orchestrator.plan.memory import activation_bytes
from orchestrator.spec.model_facts import model_facts

HEAVY = ({"kind": "average_pool", "layer": 1, "stride": 16},)


def widen(folder: Path, hidden: int, layers: int) -> Path:
    """The tests' tiny LLaVA with a wider and deeper language model."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"hidden_size": hidden, "intermediate_size": 8 * hidden // 3, "num_attention_heads": 8}
    config["text_config"] |= {"num_key_value_heads": 8, "head_dim": hidden // 8, "num_hidden_layers": layers}
    config["text_config"] |= {"initializer_range": 0.02}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measure(folder: Path, job: StageJob, fixed: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Seconds of steps under every action of the job: the fixed number and `auto` in turns; every rank calls it."""
    from orchestrator.models.build import WEIGHTS_FILE
    from orchestrator.training import distributed, metrics_log
    from orchestrator.training.batches import MicroBatch, deal
    from orchestrator.training.engine import TrainingMemory, open_session
    from orchestrator.training.micro_batch import choose, longest_of, set_accumulation
    from orchestrator.training.step import run_step

    ledger, memory = make_ledger(folder, job.model), TrainingMemory()
    data, facts = memory.data(job), model_facts(job.model["model_name_or_path"])
    assert facts is not None
    with metrics_log.stage_log(folder):
        session = open_session(job, ledger.state_folder("root") / WEIGHTS_FILE)
        batch = job.recipe["global_batch_size"]
        allowed = (fixed + 0.5) * activation_bytes(facts, Action(0, 1, "full"), longest_of(data), job.recipe, 4)
        chosen = choose(job, session, data, ledger.work_folder(job.id), int(allowed))
        found: dict[str, list[dict[str, Any]]] = {}
        for action in job.table:
            session.switch(action.points)
            seconds: dict[str, list[float]] = {"fixed": [], "auto": []}
            for round_ in range(rounds + 1):
                for name, size in (("fixed", fixed), ("auto", chosen.at(action))):
                    set_accumulation(session.engine, batch, size)
                    step = action.first_step + round_ % (action.last_step - action.first_step)
                    shares = deal(
                        data.batch_indices(job.seed, step, batch), size, distributed.rank(), distributed.world_size()
                    )
                    batches = [MicroBatch(one, data.collate(one)) for one in shares]
                    figures = run_step(session, job, step, batches, should_stop=False)
                    if round_:  # the first warms up
                        seconds[name].append(figures.step_seconds)
            found[action.variant] = [
                {"name": name, "size": size, "accumulation": len(deal(range(batch), size, 0, distributed.world_size())),
                 "seconds": seconds[name]}
                for name, size in (("fixed", fixed), ("auto", chosen.at(action)))
            ]  # fmt: skip
    memory.release()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=24, help="samples of an optimizer step")
    parser.add_argument("--fixed", type=int, default=2, help="micro-batch that fits full tokens")
    parser.add_argument("--deepspeed", default="zero3")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = widen(write_model(Path(folder) / "model"), given.hidden, given.layers)
        recipe = recipe_of(
            deepspeed=given.deepspeed, train=("projector", "language_model"), global_batch_size=given.batch,
            per_device_train_batch_size="auto", learning_rate=1e-5, group_by_modality_length=False,
        )  # fmt: skip
        table = (Action(0, 3, "heavy", HEAVY), Action(3, 6, "full"))
        job = stage(model_of(model), 6, table=table, recipe=recipe)
        found = launch(given.workers, measure, Path(folder) / "runs", job, given.fixed, given.rounds)
    print(f"{given.deepspeed}, {given.workers} workers, {given.batch} samples a step, median of {given.rounds}")
    for variant, (fixed, auto) in found.items():
        for one in (fixed, auto):
            print(
                f"  {variant:6} {one['name']:6} micro-batch {one['size']:3},",
                f"{one['accumulation']:3} accumulation steps:",
                f"{median(one['seconds']):.3f} s a step ({min(one['seconds']):.3f} to {max(one['seconds']):.3f})",
            )
        print(f"  {variant:6} speed-up {median(fixed['seconds']) / median(auto['seconds']):.2f}x")


if __name__ == "__main__":
    main()

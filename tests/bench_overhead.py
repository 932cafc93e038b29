"""Measures what the orchestrator adds to an optimizer step, beside a plain DeepSpeed loop and transformers' Trainer.

    python tests/bench_overhead.py --output overhead.json

Arms: `plain` (a process of its own: the same model, weights, batches and rates, `deepspeed.initialize`, a loop),
`trainer` (transformers' Trainer on the unmodified model, torch's AdamW, the same batches), `run` (`llavolta run` with
Ray, metrics, live view and MLflow, as a user starts it) and `local` (`run --local`). They take turns, each in fresh
processes; with `--busy` other processes keep so many cores busy meanwhile. Told are medians of the seconds inside a
step and from step to step, which counts what happens between them as well. The losses must be equal, or the arms did
not do the same work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from orchestrator.plan.experiment_plan import prepare
from orchestrator.plan.jobs import StageJob

QUICKSTART = Path(__file__).resolve().parent.parent / "experiments" / "quickstart.yaml"
SCRIPTS = ("plain", "trainer")
ARMS = (*SCRIPTS, "run", "local")
LEFT_OUT = 5  # steps at the start, where caches are cold
SPEC = """
extends: {quickstart}
name: overhead
schedules: {{four_stage: null}}
phases: {{finetune: {{max_steps: {steps}, deepspeed: {deepspeed}}}}}
evaluate: {{vqa: null}}
cluster: {{resources_per_worker: {{CPU: {threads}}}}}
report: null
matrix: {{phases.finetune.schedule: [{variant}]}}
"""


def plain(job: StageJob, weights: Path, metrics: Path, threads: int) -> None:
    """The loop without Ray and orchestrator; data, model and DeepSpeed configuration are built by the same code."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from orchestrator.compression import attach
    from orchestrator.models.build import build_model
    from orchestrator.models.parts import parameter_groups, set_trainable
    from orchestrator.spec.model import ModelSpec
    from orchestrator.spec.phase import PhaseSpec
    from orchestrator.training.batches import BatchFeed
    from orchestrator.training.deepspeed_config import deepspeed_config
    from orchestrator.training.engine import TrainingMemory
    from orchestrator.training.step import rate_factor

    torch.set_num_threads(threads)
    dist.init_process_group("gloo")
    recipe = PhaseSpec.model_validate(job.recipe)
    size = recipe.global_batch_size
    model = build_model(ModelSpec.model_validate(job.model), weights)
    attach(model, list(job.table[0].points))  # without points too: it computes logits only where a label needs them
    set_trainable(model, recipe.train, lora=False)
    groups = parameter_groups(model, recipe.learning_rate, recipe.weight_decay)
    rates = [group["lr"] for group in groups]
    model.train()
    config = deepspeed_config(recipe, "float32", size, 1, 1, on_gpu=False)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    data = TrainingMemory().data(job)
    feed = BatchFeed(
        lambda step: data.batch_indices(job.seed, step, size, recipe.group_by_modality_length),
        data.collate, lambda _: size, job.last_step,
    )  # fmt: skip
    with metrics.open("w") as spool:
        for step in range(job.last_step):
            (batch,) = feed.get(step)
            start = time.perf_counter()
            factor = rate_factor(recipe.lr_scheduler_type, step, job.total_steps, recipe.warmup_ratio)
            for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            loss = engine(**batch.tensors, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            line = {"step": step, "loss": loss.item(), "step_seconds": time.perf_counter() - start}
            spool.write(json.dumps({**line, "timestamp_ms": time.time() * 1000}) + "\n")
    feed.close()
    dist.destroy_process_group()


def trainer(job: StageJob, weights: Path, metrics: Path, threads: int) -> None:
    """The same rows, tokens and recipe by transformers' Trainer; the model is as transformers makes it."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from orchestrator.models.build import build_model
    from orchestrator.models.parts import set_trainable
    from orchestrator.spec.model import ModelSpec
    from orchestrator.spec.phase import PhaseSpec
    from orchestrator.training.engine import TrainingMemory

    torch.set_num_threads(threads)
    recipe = PhaseSpec.model_validate(job.recipe)
    size = recipe.global_batch_size
    model = build_model(ModelSpec.model_validate(job.model), weights)
    set_trainable(model, recipe.train, lora=False)
    data = TrainingMemory().data(job)
    steps = range(job.last_step)
    rows = [i for step in steps for i in data.batch_indices(job.seed, step, size, recipe.group_by_modality_length)]
    lines: list[dict[str, Any]] = []

    class Clock(TrainerCallback):
        start = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds = time.perf_counter() - self.start
            lines.append({"step": len(lines), "step_seconds": seconds, "timestamp_ms": time.time() * 1000})

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                lines[-1]["loss"] = logs["loss"]

    arguments = TrainingArguments(
        output_dir=str(metrics.parent / "trainer"),
        max_steps=job.last_step,
        per_device_train_batch_size=size,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        lr_scheduler_type=recipe.lr_scheduler_type,
        warmup_steps=recipe.warmup_ratio,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=job.seed,
    )
    Trainer(model, arguments, data_collator=data.collate, train_dataset=rows, callbacks=[Clock()]).train()
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def script_entry(arm: str, spec: Path, weights: Path, metrics: Path, threads: int) -> None:
    """What the process of an arm without orchestrator does."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    (job,) = prepare(spec).tree.stage_runs.values()
    if arm == "trainer":
        trainer(job, weights, metrics, threads)
        return
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    plain(job, weights, metrics, threads)


class Bench:
    """The arms in their folders."""

    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        self.folder, self.threads = folder, given.threads
        self.spec = folder / "overhead.yaml"
        self.spec.write_text(SPEC.format(quickstart=QUICKSTART, **vars(given)))
        (self.state,) = prepare(self.spec).tree.stage_runs
        (self.root,) = prepare(self.spec).tree.roots
        self.first = folder / "run0"

    def run(self, arm: str, number: int) -> list[dict[str, Any]]:
        """Runs one arm in fresh processes; returns its step lines."""
        storage = self.folder / f"{arm}{number}"
        metrics = storage / "stage_runs" / self.state / "metrics.jsonl"
        if arm in SCRIPTS:
            metrics = self.folder / f"{arm}{number}.jsonl"
            weights = self.first / "stage_runs" / self.root / "weights" / "model.safetensors"
            paths = map(str, (self.spec, weights, metrics))
            command = [__file__, "--threads", str(self.threads), "--script", arm, *paths]
        else:
            if storage != self.first:  # what is known of the rows is read once
                shutil.copytree(self.first / "cache", storage / "cache")
            command = ["-m", "orchestrator", "run", str(self.spec), *(["--local"] if arm == "local" else [])]
        threads = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        done = subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env={**os.environ, **threads, "LLAVOLTA_STORAGE": str(storage)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{arm}: {done.stdout}")
        return [json.loads(line) for line in metrics.read_text().splitlines()]


def seconds_of(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians of one arm's turn: inside a step, and from the end of a step to the end of the next."""
    kept = lines[LEFT_OUT:]
    return {
        "in_step": median(line["step_seconds"] for line in kept),
        "step_to_step": median((b["timestamp_ms"] - a["timestamp_ms"]) / 1000 for a, b in pairwise(kept)),
    }


def summary(turns: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds, and of each round's ratio to the scripts of that round."""
    found: dict[str, Any] = {}
    for arm, rounds in turns.items():
        found[arm] = {
            key: {
                "seconds": round(median(one[key] for one in rounds), 4),
                "rounds": [round(one[key], 4) for one in rounds],
                **{
                    f"of_{script}": round(
                        median(a[key] / b[key] for a, b in zip(rounds, turns[script], strict=True)), 4
                    )
                    for script in SCRIPTS
                    if script in turns
                },
            }
            for key in ("in_step", "step_to_step")
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["trainer", "local", "run"], choices=ARMS)
    parser.add_argument("--steps", type=int, default=45, help="optimizer steps of one turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each arm")
    parser.add_argument("--threads", type=int, default=2, help="of a worker")
    parser.add_argument("--variant", default="full", choices=("full", "heavy", "wide", "light"))
    parser.add_argument("--deepspeed", default="zero0", choices=("zero0", "zero1", "zero2"))
    parser.add_argument("--output", type=Path, help="JSON file with all numbers")
    parser.add_argument("--busy", type=int, default=0, help="processes that keep a core busy each")
    parser.add_argument("--script", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.script is not None:
        arm, *paths = given.script
        script_entry(arm, *map(Path, paths), given.threads)
        return
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(given.busy)]
    try:
        measure(given)
    finally:
        for process in busy:
            process.kill()


def measure(given: argparse.Namespace) -> None:
    """Runs the arms in turns and prints what they took."""
    turns: dict[str, list[dict[str, float]]] = {arm: [] for arm in given.arms}
    losses: dict[str, set[tuple[float, ...]]] = {arm: set() for arm in given.arms}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), given)
        bench.run("run", 0)  # warms the file cache and writes the root
        for number in range(1, given.rounds + 1):
            for arm in given.arms if number % 2 else given.arms[::-1]:
                lines = bench.run(arm, number)
                losses[arm].add(tuple(line["loss"] for line in lines))
                turns[arm].append(seconds_of(lines))
                print(f"round {number} {arm:7} {turns[arm][-1]}", flush=True)
    ours = set().union(*(losses[arm] for arm in given.arms if arm not in SCRIPTS))
    scripts = set().union(*(losses[arm] for arm in given.arms if arm in SCRIPTS))
    apart = max(
        (abs(a - b) / b for one in scripts for other in ours for a, b in zip(other, one, strict=True)), default=0
    )
    found = {"losses_equal": len(ours) <= 1, "apart": apart, "arms": summary(turns)}
    print(f"losses of all our runs equal: {len(ours) <= 1}; those of scripts {apart:.1e} apart from them")
    for arm, values in found["arms"].items():
        for key, value in values.items():
            ratios = [f"{value[f'of_{script}']:.3f} of {script}" for script in SCRIPTS if script in turns]
            print(f"{arm:7} {key:12} {value['seconds']:.4f} s  {', '.join(ratios)}")
    if given.output is not None:
        given.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

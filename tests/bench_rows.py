"""Measures what a large data file costs: the first look, each look after it, a rank's start, verbs on a finished file.

    python tests/bench_rows.py --rows 665000 --images 20000 --folder /tmp/rows

Writes a deterministic mixture like LLaVA-1.5's (conversations of one to ten turns, one row in ten without an image) and
small JPEGs, unless the folder has them; then runs the program's verbs in processes of their own and tells wall and CPU
seconds and peak memory of each. The finished file is one whose ledger was written by this script. `--try-rows N` also
tries N rows with the model's tokenizer and image processor, as `run` does with all before it trains.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "experiments" / "models" / "tiny-llava"
WORDS = "the a of in on picture shows red blue small large person dog street table what where why because left right"
SPEC = """
name: rows
model: {{model_name_or_path: {model}, weights: random}}
data:
  mix:
    {{kind: llava_json, data_path: {folder}/mix.json, image_folder: {folder}/images, conversation_template: vicuna_v1}}
compressors: {{heavy: {{kind: average_pool, layer: 2, stride: 8}}}}
phases:
  finetune: {{data: mix, schedule: heavy, num_train_epochs: 1, global_batch_size: 128, learning_rate: 1.0e-3}}
cluster: {{storage_path: {folder}/storage}}
"""
RANK = """
import json, resource, sys, time
import torch, transformers, pyarrow
from pathlib import Path
from orchestrator.data.processing.processor import load_processor
from orchestrator.data.train_data import build_train_data
from orchestrator.plan.identity import share_caches
from orchestrator.spec.model import ModelSpec
job = json.loads(Path(sys.argv[1]).read_text())
share_caches(Path(job["cache"]))
processor = load_processor(ModelSpec.model_validate(job["model"]))
processor.fixed_image_tokens
def rss(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
before, wall, cpu = rss(), time.monotonic(), time.process_time()
data = build_train_data(job["data"], processor, 2048)
data.batch_indices(0, 0, 128, True)
print(json.dumps({"rank_wall_s": round(time.monotonic() - wall, 2), "rank_cpu_s": round(time.process_time() - cpu, 2),
    "rank_mb_beyond": round(rss() - before), "rank_peak_mb_beyond":
    round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)}))
"""
TRY = """
import json, sys, time
from pathlib import Path
from orchestrator.data.check import RowCheck, check_rows
from orchestrator.plan.identity import share_caches
from orchestrator.spec.model import ModelSpec
from orchestrator_plugins.data.llava_json import LlavaJsonSpec
job = json.loads(Path(sys.argv[1]).read_text())
share_caches(Path(job["cache"]))
spec = LlavaJsonSpec.model_validate({**job["data"][0]["spec"], "max_samples": int(sys.argv[2])})
wall, cpu = time.monotonic(), time.process_time()
found = check_rows(RowCheck(spec, ModelSpec.model_validate(job["model"]), 2048, False))
print(json.dumps({"tried_rows": len(found), "wall_s": round(time.monotonic() - wall, 1),
    "rows_per_cpu_s": round(len(found) / (time.process_time() - cpu))}))
"""


def write_data(folder: Path, rows: int, images: int) -> None:
    """The mixture, the same for the same sizes."""
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    rng = random.Random(0)
    for number in range(images):
        size = (rng.randrange(40, 80), rng.randrange(40, 80))
        colour = tuple(rng.randrange(256) for _ in range(3))
        image = Image.new("RGB", size, colour)
        image.putpixel((number % 40, number // 40 % 40), (255, 255, 255))
        image.save(folder / "images" / f"{number:06}.jpg", quality=85)
    words = WORDS.split()
    texts = [" ".join(rng.choices(words, k=rng.randrange(5, 60))) for _ in range(5000)]
    with (folder / "mix.json").open("w") as file:
        for number in range(rows):
            pairs = rng.choice((1, 1, 1, 2, 3, 4))
            record = {"id": f"{number:09}"}
            first = rng.choice(texts)
            if number % 10:
                record["image"] = f"{rng.randrange(images):06}.jpg"
                first = f"<image>\n{first}"
            turns = [first, *rng.choices(texts, k=2 * pairs - 1)]
            record["conversations"] = [
                {"from": "gpt" if turn % 2 else "human", "value": text} for turn, text in enumerate(turns)
            ]
            file.write(f"{',' if number else '['}\n{json.dumps(record)}")
        file.write("\n]\n")
    old = time.time() - 3600  # not changed a moment ago, as data on a cluster is not
    for path in (folder / "mix.json", *(folder / "images").iterdir()):
        os.utime(path, (old, old))


def measured(name: str, command: list[str]) -> str:
    """Runs a command and tells what it cost."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    print(
        f"{name:34} {time.monotonic() - began:7.1f} s wall {usage.ru_utime + usage.ru_stime:7.1f} s CPU "
        f"{usage.ru_maxrss / 1024:7.0f} MB peak" + (f"   exit {status}" if status else ""),
        flush=True,
    )
    return output


def interrupted(command: list[str], seconds: float) -> None:
    """Runs a command and interrupts it as Ctrl-C does."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()


def finish(spec: Path) -> None:
    """Writes the one stage run of the experiment into its ledger, as if it had been trained."""
    from orchestrator.plan.experiment_plan import prepare
    from orchestrator.plan.jobs import job_to_json

    walk = prepare(spec)
    for job in walk.tree.work(walk.ledger):
        if type(job).__name__ not in ("RootJob", "StageJob"):
            continue
        walk.ledger.begin(job.id)
        folder = walk.ledger.writing_folder(job.id)
        (folder / "weights").mkdir(parents=True, exist_ok=True)
        (folder / "weights" / "model.safetensors").write_bytes(b"0" * 64)
        (folder / "job.json").write_text(json.dumps(job_to_json(job)))
        (folder / "result.json").write_text(json.dumps({"steps": 1}))
        walk.ledger.commit(job.id)


def main() -> None:
    """Runs the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=665_000)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/llavolta-bench-rows"))
    parser.add_argument("--try-rows", type=int, default=0)
    parser.add_argument("--interrupt-after", type=float, default=0, help="seconds into the first indexing")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    if not (folder / "mix.json").exists():
        write_data(folder, options.rows, options.images)
    print(f"{options.rows:,} rows, {options.images:,} images, {(folder / 'mix.json').stat().st_size / 1e6:,.0f} MB")
    spec, storage, job = folder / "rows.yaml", folder / "storage", folder / "rank.json"
    spec.write_text(SPEC.format(model=MODEL, folder=folder))
    shutil.rmtree(storage, ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    shutil.rmtree(folder / "cache", ignore_errors=True)
    plan = ["-m", "orchestrator", "plan", str(spec), "--json"]
    if options.interrupt_after:
        interrupted(plan, options.interrupt_after)
    measured("first plan (reads rows and images)", plan)
    measured("second plan", plan)
    from orchestrator.plan.cells.expand import expand_cells
    from orchestrator.plan.identity import share_caches
    from orchestrator.spec.loader import load_experiment

    share_caches(storage / "cache")
    (cell,) = expand_cells(load_experiment(spec, ()))
    job.write_text(json.dumps({"data": cell.phases[0].data, "model": cell.root.model, "cache": str(storage / "cache")}))
    print(measured("a rank's process", ["-c", RANK, str(job)]).strip())
    finish(spec)
    for verb in ("plan", "status", "table", "run"):
        measured(f"{verb} of a finished file", ["-m", "orchestrator", verb, str(spec)])
    measured("run again", ["-m", "orchestrator", "run", str(spec)])
    if options.try_rows:
        print(measured("rows tried with the model", ["-c", TRY, str(job), str(options.try_rows)]).strip())


if __name__ == "__main__":
    main()

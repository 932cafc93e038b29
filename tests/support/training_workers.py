"""Starts real worker groups for the tests, and makes the very tiny model, data and jobs they train."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from program import forks
from repository import ROOT, SUPPORT

from orchestrator.plan.jobs import Action, RootJob, StageJob
from orchestrator.spec.phase import PhaseSpec

HEAVY = ({"kind": "average_pool", "layer": 1, "stride": 8},)
MIXING = ({"kind": "mixing", "layer": 1, "stride": 8},)  # learns: mixing_plugin.py
SECONDS = 240


def launch(world_size: int, scenario: Callable[..., Any], *args: Any, exit_codes: tuple[int, ...] = (0,)) -> Any:
    """Runs `scenario(*args)` on every rank of a fresh gloo group; returns what rank 0 returned."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers = forks.SimpleQueue()
    workers = [
        forks.Process(target=_enter, args=(scenario, args, rank, world_size, port, answers))
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    try:
        # A rank that is alone after the others' end would wait for them for ever.
        workers[0].join(SECONDS)
        for worker in workers[1:]:
            worker.join(20)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
                worker.join()
    failure, answer = answers.get() if not answers.empty() else (None, None)
    assert failure is None, failure
    assert workers[0].exitcode in exit_codes, f"exit codes {[worker.exitcode for worker in workers]}"
    return answer


def _enter(scenario: Callable[..., Any], args: Any, rank: int, world_size: int, port: int, answers: Any) -> None:
    gc.freeze()  # what was imported beforehand is looked through at no collection
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch
    import torch.distributed as dist

    from orchestrator.registry import load_plugin

    load_plugin("mixing_plugin.py", SUPPORT)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        answer = scenario(*args)
        if rank == 0:
            answers.put((None, answer))
        dist.barrier()
    except BaseException:
        if rank == 0:
            answers.put((traceback.format_exc(), None))
        os._exit(1)
    dist.destroy_process_group()


def write_model(folder: Path) -> Path:
    """A LLaVA of a few thousand parameters with the tiny LLaVA's own tokenizer and processor."""
    shutil.copytree(ROOT / "experiments/models/tiny-llava", folder)
    config = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config["text_config"] |= {**sizes, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
    config["vision_config"] |= {**sizes, "projection_dim": 16}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_uneven_rows(folder: Path, num_rows: int = 96) -> Path:
    """LLaVA's JSON from real easy-VQA rows: answers of 1 to 4 turns, every sixth row without an image."""
    from easy_vqa import get_train_image_paths, get_train_questions

    questions, answers, image_ids = get_train_questions()
    paths, turns = get_train_image_paths(), {}
    for question, answer, image in zip(questions, answers, image_ids, strict=True):
        turns.setdefault(image, []).append((question, answer))
    rows = []
    for index, (image, pairs) in enumerate(sorted(turns.items())[:num_rows]):
        text_only = index % 6 == 5
        conversation = []
        for question, answer in pairs[: 1 + index % 4]:
            mark = "" if conversation or text_only else "<image>\n"
            conversation.append({"from": "human", "value": mark + question})
            conversation.append({"from": "gpt", "value": answer})
        row = {"id": str(index), "conversations": conversation}
        rows.append(row if text_only else row | {"image": str(paths[image])})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def easy_vqa_data() -> tuple[dict[str, Any], ...]:
    spec = {"kind": "easy_vqa", "split": "train", "max_samples": 64}
    return ({"name": "train", "share": 1.0, "spec": spec},)


def uneven_data(rows: Path) -> tuple[dict[str, Any], ...]:
    spec = {"kind": "llava_json", "data_path": str(rows), "image_folder": "/", "conversation_template": "chat_template"}
    return ({"name": "rows", "share": 1.0, "spec": spec},)


def model_of(folder: Path, **values: Any) -> dict[str, Any]:
    return {"model_name_or_path": str(folder), "weights": "random", "dtype": "float32", **values}


def recipe_of(**values: Any) -> dict[str, Any]:
    known = {
        "data": "train",
        "train": ("vision_tower", "projector", "language_model"),
        "global_batch_size": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "deepspeed": "zero2",
    }
    return PhaseSpec.model_validate(known | values).model_dump(mode="json")


def stage(model: dict[str, Any], last_step: int, first_step: int = 0, **values: Any) -> StageJob:
    """A stage run from the root, or from `parent=` where it does not start the phase."""
    known: dict[str, Any] = {
        "id": f"state{last_step}",
        "parent": "root",
        "phase": "finetune",
        "starts_phase": first_step == 0,
        "first_step": first_step,
        "last_step": last_step,
        "total_steps": 6,
        "table": (Action(0, last_step, "full"),),
        "model": model,
        "data": easy_vqa_data(),
        "recipe": recipe_of(),
        "seed": 3,
    }
    return StageJob(**known | values)


def make_ledger(folder: Path, model: dict[str, Any]) -> Any:
    """A ledger with the root in it; every rank calls it."""
    from orchestrator.models.initial_weights import write_initial_weights
    from orchestrator.plan.ledger import Ledger
    from orchestrator.training import distributed

    ledger = Ledger(folder)

    def root() -> None:
        if not ledger.is_done("root"):
            write_initial_weights(RootJob("root", model, seed=0), ledger.writing_folder("root"))
            ledger.commit("root")

    distributed.decide(root)
    return ledger


def weights_digest(ledger: Any, state: str) -> str:
    path = ledger.state_folder(state) / "weights/model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def steps_told(ledger: Any, state: str) -> list[int]:
    text = (ledger.state_folder(state) / "metrics.jsonl").read_text()
    return [json.loads(line)["step"] for line in text.splitlines()]


def never() -> bool:
    return False


class StopAt:
    """`should_stop` that is true from its n-th call on (0-based)."""

    def __init__(self, call: int) -> None:
        self.left = call

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0

"""Every family under ZeRO-3 on two workers, one of them at times without an image: what a plain loop learns, and the
rehearsal.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_workers import launch, make_ledger, model_of, recipe_of, stage

from orchestrator.compression.testing.families import PERCEPTION_LM, TINY
from orchestrator.compression.testing.tiny import TinyFamily
from orchestrator.plan.jobs import Action, RehearsalJob, StageJob

STEPS = 3
EVERY = {**TINY, PERCEPTION_LM.model_type: PERCEPTION_LM}
QUICK = "ernie4_5_vl_moe"  # its experts of visual tokens rest on a worker without an image
REFUSED = ("lfm2_vl", "step3p7")


def job_of(tiny: TinyFamily, folder: Path) -> StageJob:
    """A phase that begins compressed, ends on full tokens."""
    layer = max(1, tiny.first_layer)
    pooled = ({"kind": "average_pool", "layer": layer, "stride": 2},)
    table = (Action(0, 2, "pooled", pooled), Action(2, STEPS, "full"))
    recipe = recipe_of(
        deepspeed="zero3", global_batch_size=4, per_device_train_batch_size=2, learning_rate=1e-3, weight_decay=0.0,
        lr_scheduler_type="constant", warmup_ratio=0.0, max_grad_norm=1.0,
    )  # fmt: skip
    model = model_of(folder, weights="pretrained", attn_implementation=tiny.attentions[-1])
    return stage(model, STEPS, table=table, total_steps=STEPS, recipe=recipe)


def parts_of(tiny: TinyFamily, step: int) -> list[dict[str, Any]]:
    """The batches of both workers in a step."""
    kinds = [kind for kind in tiny.units if kind != "video"]
    first, last = kinds[0], kinds[-1]
    video = "video" if "video" in tiny.units else last
    rows = [
        ([[3, first, 7], [2, first, 2, last, 5]], [[9], [6]]),
        ([[9], [6]], [[1, video, 4], [8]]),
        ([[4, last, 5], [8]], [[9], [2, video, 6]]),
    ][step]
    return [tiny.batch(part, "right", step, 3) for part in rows]


class TinyData:
    """What a rehearsal asks of training data: rows of a family's kinds of visual input, the one with most first."""

    def __init__(self, tiny: TinyFamily) -> None:
        kinds = list(tiny.units)
        self._tiny, self._rows = tiny, [[2, kinds[0], 5], [3, kinds[-1], 6]]
        self.longest = list(range(len(self._rows)))

    def sample(self, index: int) -> range:
        return range(self.collate([index])["input_ids"].shape[1])

    def collate(self, indices: Sequence[int]) -> dict[str, Any]:
        return self._tiny.batch([self._rows[index] for index in indices], "right", 0, 3)


def under_zero3(folder: Path, job: StageJob, family: str) -> tuple[list[float], list[str | None]]:
    """Losses of the steps of a worker group in which each rank has its own batch; then what the rehearsal of the same
    actions found.
    """
    from orchestrator.dispatch.run_job import rehearse
    from orchestrator.models.build import WEIGHTS_FILE
    from orchestrator.training import distributed
    from orchestrator.training.batches import MicroBatch
    from orchestrator.training.engine import TrainingMemory, open_session
    from orchestrator.training.step import run_step

    class Memory(TrainingMemory):
        def data(self, job: StageJob) -> Any:
            return TinyData(EVERY[family])

    ledger, memory, rank = make_ledger(folder, job.model), Memory(), distributed.rank()
    session = memory.session = open_session(job, ledger.state_folder("root") / WEIGHTS_FILE)
    session.prepare(job)
    losses = []
    for step in range(job.last_step):
        session.switch(job.action_at(step).points)
        batch = MicroBatch([2 * rank, 2 * rank + 1], parts_of(EVERY[family], step)[rank])
        losses.append(run_step(session, job, step, [batch], should_stop=False).loss)
    memory.release()

    keys = tuple(action.variant for action in job.table)
    rehearse(RehearsalJob("rehearsal", "root", replace(job, id="rehearsal"), keys, (), (), False), ledger, memory)
    notes = sorted((folder / "rehearsals").glob("*/*.json"))
    assert len(notes) == len(keys)
    return losses, [json.loads(note.read_text())["error"] for note in notes]


def plain_loop(folder: Path, job: StageJob, family: str) -> list[float]:
    """The same losses in one process without DeepSpeed: torch's AdamW and clipping, one batch after the other."""
    import torch

    from orchestrator.compression import attach
    from orchestrator.models.build import WEIGHTS_FILE, build_model
    from orchestrator.spec.model import ModelSpec

    ledger = make_ledger(folder, job.model)
    model = build_model(ModelSpec.model_validate(job.model), ledger.state_folder("root") / WEIGHTS_FILE).train()
    attachment = attach(model, [])
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.recipe["learning_rate"], weight_decay=0.0)
    for parameter in model.parameters():  # what has no gradient yet counts its steps too, as in DeepSpeed's flat groups
        parameter.grad = torch.zeros_like(parameter)
    losses = []
    for step in range(job.last_step):
        attachment.switch(job.action_at(step).points)
        parts = parts_of(EVERY[family], step)
        labels = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
        total = 0.0
        for number, part in enumerate(parts):
            attachment.set_step(step, job.seed, [2 * number, 2 * number + 1])
            loss = model(**part, use_cache=False, num_items_in_batch=labels).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.recipe["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append(total)
    return losses


@pytest.mark.parametrize(
    "family",
    [one if one == QUICK else pytest.param(one, marks=pytest.mark.slow) for one in EVERY if one not in REFUSED],
)
def test_two_workers_under_zero3_learn_what_a_plain_loop_learns(family: str, tmp_path: Path) -> None:
    if family == "perception_lm":
        pytest.importorskip("timm")
    EVERY[family].build("eager", 0).save_pretrained(tmp_path / "model")
    job = job_of(EVERY[family], tmp_path / "model")
    expected = launch(1, plain_loop, tmp_path / "one", job, family)
    losses, errors = launch(2, under_zero3, tmp_path / "two", job, family)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert len({round(loss, 3) for loss in expected}) == STEPS, "training must move the loss"
    assert errors == [None, None]


@pytest.mark.parametrize("family", [REFUSED[0], *(pytest.param(one, marks=pytest.mark.slow) for one in REFUSED[1:])])
def test_workers_that_would_wait_for_one_another_are_refused(family: str, tmp_path: Path) -> None:
    EVERY[family].build("eager", 0).save_pretrained(tmp_path / "model")
    job = job_of(EVERY[family], tmp_path / "model")
    with pytest.raises(AssertionError, match=r"under ZeRO-3 all workers call the same modules.*use zero2"):
        launch(2, under_zero3, tmp_path / "two", job, family)

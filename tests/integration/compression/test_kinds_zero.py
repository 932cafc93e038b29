"""Ranks whose batches hold other kinds of visual input under ZeRO-3: none waits for a call that others do not make."""

from __future__ import annotations

import pytest
from clips import random_frames, write_clip
from family_folders import write_folder
from PIL import Image
from ranks import result_of_rank_0

SCRIPT = """
from orchestrator.compression import attach
from orchestrator.compression.testing.families import TINY
tiny = TINY[sys.argv[1]]
model = tiny.build("sdpa", 0).train()
attachment = attach(model, [{"kind": "average_pool", "layer": 1, "stride": 2}])
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={
    "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_force_ds_cpu_optimizer": False})
PARTS = [
    ([[3, "image", 2, "video", 5]], [[9]]),
    ([[3, "video", 5]], [[2, "image", 7]]),
    ([[4]], [[3, "image", 2, "video", 5]]),
    ([[4]], [[7]]),
    ([[3, "image", 5]], [[2, "video", "image", 7]]),
]
losses = []
for step, parts in enumerate(PARTS):
    total = torch.zeros(())
    batches = [tiny.batch(rows, "right", step, 3) for rows in parts]
    for number in [rank] if world == 2 else [0, 1]:
        loss = engine(**batches[number], num_items_in_batch=6).loss * (2 if world == 2 else 1)
        total += loss.detach()
        engine.backward(loss)
    engine.step()
    torch.distributed.all_reduce(total)
    losses.append(float(total) / world)
if rank == 0:
    print("RESULT", json.dumps(losses))
"""


OF_FILES = """
from orchestrator.compression import attach
from orchestrator.data.processing.encode import Encoder, collate
from orchestrator.data.processing.processor import load_processor
from orchestrator.data.rows import ImageReading, ImageRef, Row, Turn
from orchestrator.spec.model import ModelSpec
from transformers import AutoConfig, AutoModelForImageTextToText
folder, clip, picture = sys.argv[1:]
processor = load_processor(ModelSpec(model_name_or_path=folder))
encoder, reading = Encoder(processor, "chat_template", 512), ImageReading(num_frames=3)
video, image = ImageRef(clip, reading, True), ImageRef(picture, reading)
ROWS = {
    "text": Row(0, (), (Turn("user", "what?"), Turn("assistant", "no"))),
    "video": Row(1, (video,), (Turn("user", "<video>which way?"), Turn("assistant", "left"))),
    "both": Row(2, (image, video), (Turn("user", "<image><video>which?"), Turn("assistant", "the second"))),
}
torch.manual_seed(0)
config = AutoConfig.from_pretrained(folder, attn_implementation="sdpa")
model = AutoModelForImageTextToText.from_config(config).train()
attachment = attach(model, [{"kind": "evs", "layer": 1, "pruning_rate": 0.5}])
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={
    "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_force_ds_cpu_optimizer": False})
losses = []
for parts in (("text", "video"), ("video", "text"), ("text", "text"), ("both", "text"), ("video", "both")):
    total = torch.zeros(())
    for number in [rank] if world == 2 else [0, 1]:
        batch = collate([encoder.encode(ROWS[parts[number]])], processor)
        loss = engine(**batch, num_items_in_batch=6).loss * (2 if world == 2 else 1)
        total += loss.detach()
        engine.backward(loss)
    engine.step()
    torch.distributed.all_reduce(total)
    losses.append(float(total) / world)
if rank == 0:
    print("RESULT", json.dumps(losses))
"""


@pytest.mark.slow
def test_a_rank_of_texts_and_one_of_real_video_files(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_folder("llava_onevision", folder)
    clip = write_clip(tmp_path / "clip.mov", random_frames(7))
    picture = tmp_path / "picture.png"
    Image.fromarray(random_frames(1, seed=1)[0]).save(picture)
    arguments = (str(folder), clip, str(picture))
    one, two = (result_of_rank_0(OF_FILES, ranks, tmp_path, *arguments) for ranks in (1, 2))
    assert two == pytest.approx(one, abs=1e-4)
    assert len({round(loss, 4) for loss in one}) == len(one)


# One tower for both kinds, and one for each.
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "video_llava"])
def test_images_and_videos_on_one_rank_and_text_on_the_other(family, tmp_path):
    one, two = (result_of_rank_0(SCRIPT, ranks, tmp_path, family) for ranks in (1, 2))
    assert two == pytest.approx(one, abs=1e-4)
    assert len({round(loss, 4) for loss in one}) == len(one)

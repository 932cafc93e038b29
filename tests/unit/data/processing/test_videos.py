"""Videos through every family that takes them: batches are the processor's own, tokens as the plan counts them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")
from clips import random_frames, write_clip
from family_folders import write_folder
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.image_utils import SizeDict

from orchestrator.compression import attach
from orchestrator.compression.testing.families import TINY
from orchestrator.data.processing.encode import Encoder, collate
from orchestrator.data.processing.processor import load_processor
from orchestrator.data.processing.templates import render
from orchestrator.data.processing.video_processors import without_torchvision
from orchestrator.data.rows import ImageReading, ImageRef, Row, Turn
from orchestrator.errors import DataError
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.model_facts import rule_of_videos

FAMILIES = ("video_llava", "llava_onevision", "llava_next_video", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FRAMES = 4


class Served:
    """A family's folder, loaded."""

    def __init__(self, family, folder):
        self.family, self.folder = family, write_folder(family, folder)
        self.processor = load_processor(ModelSpec(model_name_or_path=str(self.folder)))
        self.hf, self.encoder = self.processor.processor, Encoder(self.processor, "chat_template", 2048)

    def model(self):
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(self.folder, attn_implementation="eager")
        return AutoModelForImageTextToText.from_config(config)

    def batch(self, rows):
        return collate([self.encoder.encode(row) for row in rows], self.processor)


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, tmp_path_factory):
    return Served(request.param, tmp_path_factory.mktemp(request.param))


CLIPS = {"long": (9, 30, 44), "short": (3, 40, 28)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Frames of each clip, and a folder of the clips and of a picture."""
    folder = tmp_path_factory.mktemp("files")
    frames = {name: random_frames(*shape, seed=len(name)) for name, shape in CLIPS.items()}
    for name, some in frames.items():
        write_clip(folder / f"{name}.mov", some, rate=5)
    Image.fromarray(random_frames(1, 30, 44, seed=7)[0]).save(folder / "picture.png")
    return folder, frames


def rows_of(folder, num_frames=FRAMES):
    """Rows of a video, an image, none, both, and another video."""
    reading = ImageReading(num_frames=num_frames)

    def row(index, text, *names):
        images = tuple(ImageRef(str(folder / name), reading, name.endswith(".mov")) for name in names)
        return Row(index, images, (Turn("user", text), Turn("assistant", "left")))

    return [
        row(0, "<video>which way?", "long.mov"),
        row(1, "<image>what is it?", "picture.png"),
        row(2, "no picture?"),
        row(3, "<image><video>both?", "picture.png", "short.mov"),
        row(4, "<video>which way?", "short.mov"),
    ]


def taken(frames, count=FRAMES):
    return frames[np.linspace(0, len(frames) - 1, count, dtype=int)]


def test_a_batch_is_what_the_processor_gives(served, files):
    folder, frames = files
    rows = rows_of(folder)
    for chosen in ([0], [0, 4], [3], [0, 1, 2, 3, 4]):
        some = [rows[number] for number in chosen]
        videos = [frames[Path(image.path).stem] for row in some for image in row.images if image.video]
        pictures = [[Image.open(image.path) for image in row.images if not image.video] for row in some]
        metadata = [
            {"total_num_frames": len(clip), "fps": 5.0,
             "frames_indices": np.linspace(0, len(clip) - 1, FRAMES, dtype=int).tolist()}
            for clip in videos
        ]  # fmt: skip
        given = served.hf(
            text=[render("chat_template", row, served.processor.chat).text for row in some],
            images=[each for each in pictures if each] or None,
            videos=[torch.from_numpy(taken(clip)).permute(0, 3, 1, 2) for clip in videos],
            videos_kwargs={"do_sample_frames": False, "video_metadata": metadata},
            return_tensors="pt", padding=True, padding_side="right",
        )  # fmt: skip
        batch = served.batch(some)
        assert set(batch) - {"labels"} == set(given)
        for name in given:
            wanted = torch.as_tensor(given[name])
            assert torch.equal(batch[name], wanted.to(batch[name].dtype)), name
        visual = sum(served.encoder.encode(row).num_visual_tokens for row in some)
        assert visual == int(torch.isin(batch["input_ids"], torch.tensor(served.processor.placeholder_ids)).sum())


def test_pixels_are_those_of_the_frames_by_hand(served, files):
    """The first frame that is taken and the last, scaled and normalised here, stand in the tensor."""
    folder, frames = files
    pixels = served.batch(rows_of(folder)[:1])["pixel_values_videos"]
    settings = served.hf.video_processor
    if pixels.ndim != 5:
        return  # patches: their order is the processor's
    for number, frame in ((0, frames["long"][0]), (-1, frames["long"][-1])):
        side = pixels.shape[-1]
        small = Image.fromarray(frame).resize(scaled_to(frame, settings, side), settings.resample)
        left, top = (small.width - side) // 2, (small.height - side) // 2
        values = np.asarray(small.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
        wanted = (values - settings.image_mean) / settings.image_std
        assert np.abs(pixels[0, number].permute(1, 2, 0).numpy() - wanted).max() < 0.03  # Pillow rounds otherwise


def scaled_to(frame, settings, side):
    """(width, height) of a frame whose shorter side, or both of whose, become so many pixels."""
    height, width = frame.shape[:2]
    if settings.size.get("height"):
        return side, side
    return (side * width // height, side) if height < width else (side, side * height // width)


def test_the_plan_counts_the_same_tokens(served, files):
    folder, _ = files
    if served.family == "qwen3_vl":
        with pytest.raises(ValueError, match="what a video becomes in qwen3_vl is not known here"):
            rule_of_videos(served.folder)
        return
    rule = rule_of_videos(served.folder)
    for count in (1, 2, 5, 8):
        for name, (_, height, width) in CLIPS.items():
            row = next(row for row in rows_of(folder, count)[::4] if name in row.images[0].path)
            (text,) = served.processor.images.texts(row.images)
            units = rule(count, height, width)
            assert (units.tokens, units.markers) == (text.num_visual_tokens, 0)


def test_one_training_step_under_each_method(served, files):
    model = served.model()
    attachment = attach(model, [])
    batch = served.batch(rows_of(files[0]))
    full = None
    layer = max(1, TINY[served.family].first_layer)
    for point in (None, {"kind": "average_pool", "stride": 2}, {"kind": "evs", "pruning_rate": 0.5},
                  {"kind": "frame_pool", "frames": 1}):  # fmt: skip
        attachment.switch([{**point, "layer": layer}] if point else [])
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        assert torch.isfinite(loss)
        full = full or attachment.last_visual_layer_tokens
        assert attachment.last_visual_layer_tokens < full or point is None


def test_videos_of_several_lengths_in_a_batch(served, files):
    folder, _ = files
    rows = [rows_of(folder, 2)[0], rows_of(folder, 4)[4]]
    if served.family.startswith("qwen"):
        assert served.batch(rows)["video_grid_thw"][:, 0].tolist() == [1, 2]
        return
    with pytest.raises(DataError, match=r"videos of 2, 4 frames in one batch, of which .* takes one length"):
        served.batch(rows)


def test_a_broken_video_is_an_error_of_its_file(served, files, tmp_path):
    path = tmp_path / "cut.mov"
    path.write_bytes((files[0] / "long.mov").read_bytes()[:900])
    row = Row(7, (ImageRef(str(path), ImageReading(), True),), (Turn("user", "<video>?"), Turn("assistant", "a")))
    with pytest.raises(DataError, match=r"cut.mov is cut off: .*; restore the file"):
        served.encoder.encode(row)


def test_a_model_without_videos_refuses_them(tmp_path, files):
    llava = Served("llava", tmp_path)
    with pytest.raises(DataError, match="reads none here"):
        llava.encoder.encode(rows_of(files[0])[0])


def test_what_torchvision_would_do_is_done_with_torch_alone():
    """Sizes, crops with and without padding, and normalisation, against plain arithmetic."""
    processor = without_torchvision("llava_next_video")(size={"shortest_edge": 6}, crop_size={"height": 8, "width": 4})
    frames = torch.from_numpy(random_frames(2, 12, 18)).permute(0, 3, 1, 2)
    small = processor.resize(frames, SizeDict(shortest_edge=6), resample=3)
    assert small.shape == (2, 3, 6, 9) and small.dtype == torch.uint8
    cut = processor.center_crop(small, SizeDict(height=8, width=4))
    assert torch.equal(cut[:, :, 1:7], small[..., 2:6]) and not cut[:, :, 0].any() and not cut[:, :, 7].any()
    pixels = processor(videos=[frames], return_tensors="pt")["pixel_values_videos"]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std))
    assert torch.allclose(pixels[0], (cut / 255 - mean) / std, atol=1e-6)

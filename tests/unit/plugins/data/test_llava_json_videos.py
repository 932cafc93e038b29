"""llava_json with videos: rows, faults by row, identity; what was trained before there were videos stays the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("av")
from clips import random_frames, write_clip
from conversations import say
from orchestrator_plugins.data.llava_json import LlavaJson, LlavaJsonSpec

from orchestrator import plugin
from orchestrator.plan.cells.identity_fields import data_digest, data_identity

RECORDS = [
    {"video": "a.mov", "conversations": say("<video>\nWhat moves?", "A cat.")},
    {"image": "0.png", "conversations": say("<image>\nWhat is it?", "A square.")},
    {"video": ["b.mkv"], "image": ["1.png"], "conversations": say("<image> and <video> then?", "Two.")},
    {"video": "b.mkv", "conversations": say("<image>\nAs in LLaVA-Video?", "Yes.")},
    {"conversations": say("What does <video> do in HTML?", "It plays one.")},
]


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_clip(folder / "a.mov", random_frames(9, seed=1), rate=3)
    write_clip(folder / "b.mkv", random_frames(30, 16, 20, seed=2))
    return folder


@pytest.fixture
def spec(videos, pictures, conversation_file):
    def make(records=None, **fields):
        path = conversation_file(RECORDS if records is None else records)
        return LlavaJsonSpec(data_path=path, image_folder=str(pictures), video_folder=str(videos), **fields)

    return make


def test_rows_have_images_and_videos_in_the_order_of_their_marks(spec):
    made = spec(num_frames=4, fps=2.0)
    assert LlavaJson(made).check() == [] and made.num_rows() == 5 and made.has_videos()
    rows = LlavaJson(made).rows()
    shown = [[(Path(image.path).name, image.video) for image in row.images] for row in rows]
    assert shown == [[("a.mov", True)], [("0.png", False)], [("1.png", False), ("b.mkv", True)], [("b.mkv", True)], []]
    assert rows[3].turns[0].text == "<video>\nAs in LLaVA-Video?" and "<video>" in rows[4].turns[0].text
    assert {(image.reading.num_frames, image.reading.fps) for row in rows for image in row.images} == {(4, 2.0)}
    clips = {Path(path).name: tuple(clip) for path, clip in rows.origin.images.clips.items()}
    assert clips == {"a.mov": (9, 24, 32, 3.0), "b.mkv": (30, 16, 20, 10.0)}
    # Of 9 frames at 3 a second each second one or so; of 30 at 10 a second every fifth, which are 6, so 4 uniform ones.
    assert rows.image_shapes.tolist() == [[4, 24, 32], [0, 64, 64], [0, 30, 90], [4, 16, 20], [4, 16, 20]]
    assert [Path(path).name for path in rows.origin.images.sizes] == ["0.png", "1.png"]


FAULTS = {
    "missing": ({"video": "no.mp4", "conversations": say("<video>", "a")}, "videos/no.mp4 is missing"),
    "cut": ({"video": "cut.mkv", "conversations": say("<video>", "a")}, "videos/cut.mkv is cut off: it is to have"),
    "no video": ({"video": "text.mp4", "conversations": say("<video>", "a")}, "text.mp4 is not a video, or is damaged"),
    "no mark": ({"video": "a.mov", "conversations": say("What?", "a")}, "0 <video> in the conversation, 1 videos in"),
    "two marks": ({"video": "a.mov", "conversations": say("<video><video>", "a")}, "2 <video> in the conversation, 1"),
    "in an answer": ({"video": "a.mov", "conversations": say("<video>", "<video>")}, "2 <video> in the conversation"),
    "outside": ({"video": "../a.mov", "conversations": say("<video>", "a")}, "lies outside video_folder"),
    "url": ({"video": "https://a/b.mp4", "conversations": say("<video>", "a")}, "download it into video_folder"),
    "a number": ({"video": 3, "conversations": say("<video>", "a")}, "`video` is a path or a list of paths, this is 3"),
}


def test_every_fault_is_told_by_row_and_dropped_where_that_is_allowed(spec, videos):
    data = (videos / "b.mkv").read_bytes()
    (videos / "cut.mkv").write_bytes(data[: len(data) // 2])
    (videos / "text.mp4").write_text("no video")
    records = [*RECORDS, *(record for record, _ in FAULTS.values())]
    errors = LlavaJson(spec(records)).check()
    assert [error.split(":")[0] for error in errors] == [f"row {number}" for number in range(5, 5 + len(FAULTS))]
    for error, (_, words) in zip(errors, FAULTS.values(), strict=True):
        assert words in error
    dropped = spec(records, on_bad_row="drop", max_bad_share=0.9)
    assert [row.index for row in LlavaJson(dropped).rows()] == [0, 1, 2, 3, 4]
    assert "9 of 14 rows dropped" in dropped.remarks()[0]
    (videos / "cut.mkv").write_bytes(data)
    assert LlavaJson(dropped).index().bad.keys() == {5, 7, 8, 9, 10, 11, 12, 13}  # mended


def test_a_video_is_identified_by_its_content(spec, videos, tmp_path):
    before = spec().content_digest()
    moved = tmp_path / "moved"
    videos.rename(moved)
    made = spec().model_copy(update={"video_folder": str(moved)})
    assert made.content_digest() == before
    write_clip(moved / "a.mov", random_frames(9, seed=3), rate=3)
    assert made.content_digest() != before


def test_settings_of_videos_count_where_they_are_given_and_not_before(spec):
    plain, _ = data_identity(spec())
    assert not {"num_frames", "fps", "video_folder"} & plain.keys()
    assert data_identity(spec(num_frames=8, fps=None)) == data_identity(spec())
    digests = {data_digest(spec(**fields), "content", []) for fields in ({}, {"num_frames": 4}, {"fps": 1.0})}
    assert len(digests) == 3
    assert not {"num_frames", "fps", "columns"} & json.loads(spec().model_dump_json()).keys()
    assert spec(num_frames=4).model_dump()["num_frames"] == 4


def test_the_kit_holds_for_rows_with_videos(spec):
    fields = spec().model_dump()
    assert plugin.check_data(fields).skipped == ()


def test_a_trial_run_has_its_first_rows(spec, tmp_path):
    few = spec().first_rows(3, tmp_path / "few")
    assert [len(row.images) for row in LlavaJson(few).rows()] == [1, 1, 2]

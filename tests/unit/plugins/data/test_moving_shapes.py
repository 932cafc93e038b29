"""moving_shapes: clips read back from their files show what the rows say, and no frame alone does."""

from __future__ import annotations

from collections import Counter
from math import sqrt

import numpy as np
import pytest

pytest.importorskip("av")
from orchestrator_plugins.data import moving_shapes
from orchestrator_plugins.data.moving_shapes import COLOURS, DIRECTIONS, MovingShapes, MovingShapesSpec

from orchestrator import plugin
from orchestrator.data.records.video_files import clip_of, frames_of, open_frames
from orchestrator.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    moving_shapes._files.cache_clear()
    yield
    moving_shapes._files.cache_clear()


def shown(row):
    """All frames of a row's file (T, pixels, pixels, 3)."""
    (video,) = row.images
    clip = clip_of(video.path)
    return open_frames(video.path, range(clip.frames), clip)


def direction_of(frames, colour):
    """Which way the pixels of a colour move, found by shifting each frame onto the next, edges joined."""
    at_TYX = (frames == COLOURS[colour]).all(axis=-1)
    fits = {}
    for name, (right, down) in DIRECTIONS.items():
        shifted_TYX = np.roll(at_TYX[:-1], (4 * down, 4 * right), axis=(1, 2))
        fits[name] = (shifted_TYX == at_TYX[1:]).mean()
    return max(fits, key=fits.get)


def test_files_show_what_rows_say():
    rows = MovingShapes(MovingShapesSpec(num_clips=24)).rows()
    for row in rows:
        frames = shown(row)
        assert frames.shape == (13, 64, 64, 3)
        question, answer = (turn.text for turn in row.turns)
        colour = question.split()[-3]
        assert question.startswith("<video>\nWhich way does the ") and answer == row.answer_type
        assert direction_of(frames, colour) == answer
    assert Counter(row.turns[1].text for row in rows) == dict.fromkeys(DIRECTIONS, 6)


def test_files_hold_every_pixel_that_was_drawn():
    spec = MovingShapesSpec(num_clips=3, pixels=80, frames=5, speed=3, shapes=4)
    made = moving_shapes._drawn_from(spec)
    for row, scene in zip(MovingShapes(spec).rows(), moving_shapes._scenes(made), strict=True):
        drawn = np.stack([np.asarray(frame) for frame in moving_shapes.frames_of(scene, 80, 5, 3)])
        assert np.array_equal(shown(row), drawn)
        assert clip_of(row.images[0].path).rate == moving_shapes.RATE


def test_no_frame_alone_tells_the_answer():
    """Where the shape is in a frame is as likely anywhere for each direction: halves and quarters of the picture."""
    scenes = moving_shapes._scenes(moving_shapes._drawn_from(MovingShapesSpec()))
    for frame in (0, 5, 12):
        for direction, (right, down) in DIRECTIONS.items():
            of = [scene.shapes[0] for scene in scenes if scene.answer == direction]
            assert len(of) == 1000
            for place in (
                [(shape.column + 4 * frame * right) % 64 for shape in of],
                [(shape.row + 4 * frame * down) % 64 for shape in of],
            ):
                counts = Counter(value // 16 for value in place)
                # Of 1,000 in four quarters; 5 standard errors of a binomial.
                assert all(abs(counts[quarter] - 250) < 5 * sqrt(1000 * 0.25 * 0.75) for quarter in range(4))
            assert all(abs(sum(s.colour == c for s in of) - 250) < 5 * sqrt(1000 * 0.25 * 0.75) for c in COLOURS)


def test_training_and_test_clips_are_others():
    train, test = (
        set(moving_shapes._scenes(moving_shapes._drawn_from(MovingShapesSpec(split=split))))
        for split in ("train", "test")
    )
    assert len(train) == 4000 and len(test) == 400 and not train & test
    assert MovingShapesSpec(seed=1).content_digest() != MovingShapesSpec().content_digest()


def test_content_is_the_same_everywhere():
    assert MovingShapesSpec(num_frames=3).content_digest() == MovingShapesSpec().content_digest()
    assert MovingShapesSpec().content_digest() == CONTENT


def test_frames_are_taken_by_the_settings():
    (row,) = MovingShapes(MovingShapesSpec(num_clips=4, max_samples=1, num_frames=4)).rows()
    (video,) = row.images
    assert video.video and frames_of(clip_of(video.path), video.reading) == (0, 4, 8, 12)


def test_the_kit_holds():
    assert "moving_shapes" in str(plugin.check_data({"kind": "moving_shapes", "num_clips": 8}))


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (error,) = MovingShapes(MovingShapesSpec(num_clips=4)).check()
    assert "its clips cannot be written" in error and "set XDG_CACHE_HOME" in error
    with pytest.raises(DataError):
        MovingShapes(MovingShapesSpec(num_clips=4)).rows()


CONTENT = "ef0dc9a7e69298848f21167fa47714abdfbca82181d072e0c60fa50eeb9160f8"

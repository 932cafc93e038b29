"""moving_shapes: clips read back from their files show what the rows say, and a frame alone does not."""

from __future__ import annotations

from collections import Counter
from math import sqrt

import numpy as np
import pytest

pytest.importorskip("av")
from orchestrator_plugins.data import moving_shapes
from orchestrator_plugins.data.moving_shapes import COLOURS, DIRECTIONS, MovingShapes, MovingShapesSpec
from pydantic import ValidationError

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
    """Which way the pixels of a colour move, found by shifting each frame onto the next."""
    at_TYX = (frames == COLOURS[colour]).all(axis=-1)
    fits = {}
    for name, (right, down) in DIRECTIONS.items():
        shifted_TYX = np.roll(at_TYX[:-1], (2 * down, 2 * right), axis=(1, 2))
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
    assert spec.travel == 12
    made = moving_shapes._drawn_from(spec)
    for row, scene in zip(MovingShapes(spec).rows(), moving_shapes._scenes(made), strict=True):
        drawn = np.stack([np.asarray(frame) for frame in moving_shapes.frames_of(scene, 80, 5, 3)])
        assert np.array_equal(shown(row), drawn)
        assert clip_of(row.images[0].path).rate == moving_shapes.RATE


def test_a_frame_alone_does_not_tell_the_answer():
    """Who knows how clips are drawn, and where the shape is in one frame, is right in half of them at most.

    A shape may be at 49 x 49 places, at 25 of 49 one way in each frame of its direction; in the middle frame those of
    all directions are a cross of 25 x 49 and 49 x 25.
    """
    scenes = moving_shapes._scenes(moving_shapes._drawn_from(MovingShapesSpec(num_clips=40_000)))
    ends, middle = 49 * 49 / (4 * 25 * 49), (2 * 25 * 49 - 25 * 25) / (4 * 25 * 49)
    for frame, most in ((0, ends), (6, middle), (12, ends)):
        at = Counter()
        for scene in scenes:
            shape = scene.shapes[0]
            right, down = DIRECTIONS[shape.direction]
            place = shape.column + 2 * right * frame, shape.row + 2 * down * frame
            assert all(8 <= value <= 56 for value in place)
            at[place[0] // 7, place[1] // 7, shape.direction] += 1
        best = Counter()
        for (*place, _), count in at.items():
            best[tuple(place)] = max(best[tuple(place)], count)
        found = sum(best.values()) / len(scenes)
        assert most - 0.02 < found < most + 0.02, (frame, found)
    first = [scene.shapes[0] for scene in scenes]
    assert Counter(shape.direction for shape in first) == dict.fromkeys(DIRECTIONS, 10_000)
    for colour in COLOURS:
        assert abs(sum(shape.colour == colour for shape in first) - 10_000) < 5 * sqrt(40_000 * 0.25 * 0.75)


def test_shapes_that_would_leave_the_picture_are_refused():
    with pytest.raises(ValidationError, match="shapes move 60 pixels in 13 frames, and the picture has room for 48"):
        MovingShapesSpec(speed=5)
    assert MovingShapesSpec(speed=4).travel == 48


def test_training_and_test_clips_are_others():
    train, test = (
        set(moving_shapes._scenes(moving_shapes._drawn_from(MovingShapesSpec(split=split))))
        for split in ("train", "test")
    )
    assert len(train) == 12_000 and len(test) == 400 and not train & test
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


CONTENT = "159dd14debd64661163e1ea8462b4e11bf49372ef2456dab1e1a99a7efced294"

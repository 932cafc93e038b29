"""Video files: frames are those that were written, and every fault of a file is told."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("av")
from clips import random_frames, write_clip

from orchestrator.data.records.image_files import BadImage
from orchestrator.data.records.video_files import Clip, clip_of, frames_of, open_frames, read_clip, strip_of
from orchestrator.data.rows import ImageReading


@pytest.mark.parametrize("suffix", [".mov", ".mkv", ".avi"])
def test_frames_are_those_that_were_written(tmp_path, suffix):
    frames = random_frames(11)
    path = write_clip(tmp_path / f"clip{suffix}", frames, rate=5)
    clip = read_clip(path)
    assert clip == Clip(11, 24, 32, 5.0) == clip_of(path)
    wanted = frames_of(clip, ImageReading(num_frames=4))
    assert wanted == (0, 3, 6, 10)  # 10 / 3 = 3.33, 6.67, 10, rounded down
    assert np.array_equal(open_frames(path, wanted, clip), frames[list(wanted)])


def test_a_lossy_file_comes_close(tmp_path):
    frames = random_frames(6, 32, 48)
    path = write_clip(tmp_path / "clip.mp4", frames)
    found = open_frames(path, range(6), read_clip(path)).astype(float)
    errors = np.abs(found - frames).mean(axis=(1, 2, 3))
    others = np.abs(found - np.roll(frames, 1, axis=0)).mean(axis=(1, 2, 3))
    assert errors.max() < 0.6 * others.min()


def llava_next_frames(total, rate, video_fps, upbound):
    """LLaVA-NeXT's own lines (llava/utils.py, process_video_with_decord), without decord."""
    step = round(rate / video_fps)
    found = list(range(0, total, step))
    if len(found) > upbound:
        found = np.linspace(0, total - 1, upbound, dtype=int).tolist()
    return tuple(found)


def test_which_frames_are_taken_is_llava_nexts():
    for total in (1, 2, 5, 30, 31, 300, 4567):
        for count in (1, 2, 7, 8, 32):
            uniform = frames_of(Clip(total, 1, 1, 30.0), ImageReading(num_frames=count))
            assert uniform == tuple(np.linspace(0, total - 1, count, dtype=int).tolist()) and len(uniform) == count
            for rate, fps in ((30.0, 1.0), (29.97, 2.0), (25.0, 1.5)):
                found = frames_of(Clip(total, 1, 1, rate), ImageReading(num_frames=count, fps=fps))
                assert found == llava_next_frames(total, rate, fps, count)
    assert frames_of(Clip(4, 1, 1, 10.0), ImageReading(num_frames=9, fps=60.0)) == (0, 1, 2, 3)  # each once at most
    with pytest.raises(BadImage, match="does not say its frame rate; leave `fps` out"):
        frames_of(Clip(4, 1, 1, 0.0), ImageReading(fps=1.0))


def broken(folder):
    """Files that are no video, and what is told of each."""
    frames = random_frames(9)
    whole = {suffix: (write_clip(folder / f"whole{suffix}", frames)) for suffix in (".mov", ".mkv", ".avi", ".mp4")}
    early = write_clip(folder / "early.mp4", frames, options={"movflags": "faststart"})
    faults = {"missing.mp4": "is missing", "folder": "is a folder, not a video"}
    (folder / "folder").mkdir()

    def put(name, data, fault):
        (folder / name).write_bytes(data)
        faults[name] = fault

    for suffix, path in [*whole.items(), ("early.mp4", early)]:
        data = Path(path).read_bytes()
        put(f"cut{suffix}", data[: len(data) * 2 // 3], "is cut off: it is to have")
    put("empty.mp4", b"", "is empty; videos are read from MP4/MOV")
    put("text.mp4", b"no video at all", "is not a video, or is damaged; videos are read from")
    put("page.mp4", b"<!doctype html><html>404</html>", "is an HTML page: the download went wrong")
    put("zeros.mp4", bytes(4096), "is nothing but zeros")
    put("list.mp4", b"ffconcat version 1.0\nfile whole.mov\n", "is not a video")
    data = bytearray(Path(whole[".mov"]).read_bytes())
    start = data.index(b"mdat") + 4
    data[start : start + 2000] = b"\xff" * 2000
    put("damaged.mov", bytes(data), "is damaged")
    Image.new("RGB", (8, 8)).save(folder / "image.png")
    put("picture.mp4", (folder / "image.png").read_bytes(), "is a PNG image")
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(800))
    put("sound.mp4", (folder / "sound.wav").read_bytes(), "is a RIFF file (sound or video)")
    for name in ("none.mkv", "none.mov"):
        write_clip(folder / name, frames[:0])
        faults[name] = "has no frames"
    return faults


def test_every_fault_is_told(tmp_path):
    for name, fault in broken(tmp_path).items():
        with pytest.raises(BadImage) as told:
            read_clip(str(tmp_path / name))
        assert fault in str(told.value), name


def test_sound_alone_has_no_frames(tmp_path):
    import av

    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(BadImage, match="has no frames: no video is in it"):
        read_clip(str(path))


def test_a_file_that_became_another_is_noticed(tmp_path):
    path = write_clip(tmp_path / "clip.mov", random_frames(9))
    clip = read_clip(path)
    write_clip(tmp_path / "clip.mov", random_frames(3))
    assert clip_of(path).frames == 3
    with pytest.raises(BadImage, match="is not the video of 9 frames that it was"):
        open_frames(path, frames_of(clip, ImageReading()), clip)


def test_a_strip_shows_all_frames():
    frames = random_frames(10, 20, 40)
    strip = strip_of(frames, height=10)
    assert strip.size == (8 * 22 - 2, 2 * 12 - 2)
    second = np.asarray(strip)[12:22, 22:42]  # the tenth
    assert np.abs(second.astype(float) - frames[9][::2, ::2]).mean() < 60

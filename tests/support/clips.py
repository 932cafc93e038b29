"""Video files for tests, written by PyAV; FFV1 and QuickTime Animation keep every pixel."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np


def random_frames(count: int, height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    """Frames (T, height, width, 3) uint8 in blocks of colour, each another."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (count, -(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return blocks.repeat(4, axis=1).repeat(4, axis=2)[:, :height, :width]


CODECS = {".mov": ("qtrle", "rgb24"), ".mkv": ("ffv1", "bgr0"), ".avi": ("ffv1", "bgr0"), ".mp4": ("mpeg4", "yuv420p")}


def write_clip(path: Path, frames: np.ndarray, rate: int = 10, options: dict[str, str] | None = None) -> str:
    """A file of these frames, in the container that its name says; returns the path."""
    codec, pixels = CODECS[path.suffix]
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        container.start_encoding()  # a file of no frames, too, has a head
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return str(path)

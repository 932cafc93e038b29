"""Open video files, for training, evaluation, the index and pages alike, by PyAV (FFmpeg). Imports no torch.

A video is a container of one of `CONTAINERS` with a video stream. Its frames are those that decoding gives, in the
order in which they are shown, upright (the container's rotation is applied), as RGB with 8 bits per channel by FFmpeg's
own conversion; pixels that are not square stay as they are stored. Sound is not read.

Which frames are taken follows LLaVA-NeXT (`process_video_with_decord`, `llava/utils.py`, which LLaVA-OneVision was
trained by): see `frames_of`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from orchestrator.data.records.file_kinds import HEAD_BYTES, looks_like
from orchestrator.data.records.image_files import ABSENT, MAX_PIXELS, BadImage, check_regular
from orchestrator.data.rows import ImageReading
from orchestrator.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

CONTAINERS = {
    "mov": "MP4/MOV",
    "matroska": "MKV/WebM",
    "avi": "AVI",
    "mpeg": "MPEG",
    "mpegts": "MPEG-TS",
    "flv": "FLV",
    "gif": "GIF",
}
"""What is read, by FFmpeg's name: told by a file's first bytes, since its name may lie. Playlists and lists of files,
which would open others, are none of them.
"""
_CLIPS_KNOWN = 1 << 16


class Clip(NamedTuple):
    """What a video file holds.

    Attributes:
        frames: Frames that decoding gives.
        height: Of the upright frame, in pixels.
        width: Likewise.
        rate: Frames a second on average; 0.0 where the file does not say.
    """

    frames: int
    height: int
    width: int
    rate: float


def frames_of(clip: Clip, reading: ImageReading) -> tuple[int, ...]:
    """Return the numbers of the frames that are taken of a video of N frames.

    Without `fps`, n = `num_frames` at equal distances, the first and the last among them:
    `numpy.linspace(0, N - 1, n, dtype=int)`, which rounds down; of a video of fewer frames some are taken twice, so
    that all videos have as many. With `fps`, every `max(1, round(rate / fps))`-th frame from the first on; where these
    are more than `num_frames`, as without `fps`.

    Source: LLaVA-NeXT, `llava/utils.py`, `process_video_with_decord`, with `frames_upbound` n.

    Raises:
        BadImage: `fps` is given and the file says no frame rate.
    """
    if reading.fps is not None:
        if not clip.rate:
            raise BadImage("does not say its frame rate; leave `fps` out, or write the file anew with one")
        every = range(0, clip.frames, max(1, round(clip.rate / reading.fps)))
        if len(every) <= reading.num_frames:
            return tuple(every)
    return tuple(np.linspace(0, clip.frames - 1, reading.num_frames, dtype=int).tolist())


def read_clip(path: str) -> Clip:
    """Return what a video file holds; it is decoded to its end, since no header says surely how many frames there are.

    Raises:
        BadImage: the file is missing, cut off, damaged, without frames, or no video.
        OSError: the storage fails; another attempt may succeed.
    """
    count, size, rate = 0, (0, 0), 0.0
    for frame, stream in _decoded(path):
        shown = _upright_size(frame)
        if count and shown != size:
            raise BadImage(f"changes from {size[1]}x{size[0]} to {shown[1]}x{shown[0]} pixels at frame {count}")
        if frame.is_corrupt:
            raise BadImage(f"is damaged: frame {count} is corrupt")
        count, size, rate = count + 1, shown, float(stream.average_rate or stream.guessed_rate or 0)
    if not count:
        raise BadImage("has no frames")
    return Clip(count, *size, rate)


def clip_of(path: str) -> Clip:
    """Return what a video file holds, as `read_clip`; a file that did not change is decoded once in a process."""
    try:
        about = os.stat(path)
    except OSError:
        return read_clip(path)  # which says why
    return _clip_of(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=_CLIPS_KNOWN)
def _clip_of(path: str, size: int, mtime_ns: int) -> Clip:
    return read_clip(path)


def open_frames(path: str, wanted: Sequence[int], clip: Clip) -> np.ndarray:
    """Return some frames of a video, in order (T, height, width, 3) uint8.

    Args:
        path: The file.
        wanted: Their numbers, ascending.
        clip: What the file holds.

    Raises:
        BadImage: as `read_clip`, or it holds something else than `clip` says.
        OSError: the storage fails.
    """
    found: dict[int, np.ndarray] = {}
    for number, (frame, _) in enumerate(_decoded(path)):
        if number in wanted:
            found[number] = np.rot90(frame.to_ndarray(format="rgb24"), _quarter_turns(frame))
        if number == wanted[-1]:
            break
    if any(found.get(number, np.empty(0)).shape[:2] != (clip.height, clip.width) for number in wanted):
        raise BadImage(f"is not the video of {clip.frames} frames that it was")
    return np.stack([found[number] for number in wanted])


def strip_of(frames: np.ndarray, height: int, most_a_row: int = 8) -> Image.Image:
    """Return frames side by side as one picture, each scaled to a height; the ninth begins another row.

    Args:
        frames: The frames (T, height, width, 3).
        height: Of a frame in the picture, in pixels.
        most_a_row: Frames of a row.
    """
    from PIL import Image  # late: an index decodes videos and shows none

    width = max(1, round(frames.shape[2] * height / frames.shape[1]))
    columns = min(len(frames), most_a_row)
    rows = -(-len(frames) // columns)
    strip = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for number, frame in enumerate(frames):
        row, column = divmod(number, columns)
        shown = Image.fromarray(np.ascontiguousarray(frame)).resize((width, height))
        strip.paste(shown, (column * (width + 2), row * (height + 2)))
    return strip


def _quarter_turns(frame: Any) -> int:
    """Return by how many quarters a frame is turned counterclockwise to be upright (FFmpeg's display matrix)."""
    return round(frame.rotation / 90) % 4


def _upright_size(frame: Any) -> tuple[int, int]:
    return (frame.width, frame.height) if _quarter_turns(frame) % 2 else (frame.height, frame.width)


def _decoded(path: str) -> Iterator[tuple[Any, Any]]:
    """Yield each frame of a file with its stream, in the order in which they are shown.

    Raises:
        BadImage: the file is missing, cut off, damaged, or no video.
        DataError: PyAV is not installed.
        OSError: the storage fails.
    """
    try:
        import av
    except ImportError as error:
        raise DataError(
            "videos are read by the package av, which is not installed: pip install 'llavolta-orchestrator[video]'"
        ) from error

    with _regular(path) as file:
        head = file.read(HEAD_BYTES)
        name = _container(head)
        if name is None:
            kind = "is empty" if not head else f"is {looks_like(head) or 'not a video, or is damaged'}"
            raise BadImage(f"{kind}; videos are read from {', '.join(CONTAINERS.values())}")
        there = file.seek(0, os.SEEK_END)
        declared = _declared_bytes(file, name, there)
        if declared > there:
            raise BadImage(f"is cut off: it is to have {declared:,} bytes, and {there:,} are there")
        file.seek(0)
        try:
            container: Any
            with av.open(file, format=name) as container:
                if not container.streams.video:
                    raise BadImage("has no frames: no video is in it")
                stream = container.streams.video[0]
                for packet in container.demux(stream):
                    if packet.is_corrupt:
                        raise BadImage("is damaged: a part of it cannot be read")
                    for frame in packet.decode():
                        if frame.width * frame.height > MAX_PIXELS:
                            raise BadImage(
                                f"has frames of {frame.width}x{frame.height} pixels, more than {MAX_PIXELS:,}"
                            )
                        yield frame, stream
        except av.FFmpegError as error:
            ended = isinstance(error, EOFError)  # where the container's head says that something follows
            raise BadImage("has no frames" if ended else f"is damaged: {error.strerror}") from error


@contextmanager
def _regular(path: str) -> Iterator[IO[bytes]]:
    """Open a regular file; a file object, not a path, so that FFmpeg reads nothing else."""
    try:
        check_regular(path, "a video")
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in ABSENT:
            raise BadImage(ABSENT[error.errno]) from error
        raise
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _container(head: bytes) -> str | None:
    """Return FFmpeg's name of the container that a file's first bytes are of; None where it is none of `CONTAINERS`."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        is_picture = head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1")
        return None if is_picture else "mov"
    if head[:4] == b"RIFF":
        return "avi" if head[8:12] == b"AVI " else None
    if head[:1] == b"\x47" and head[188:189] == b"\x47":
        return "mpegts"
    starts = {b"\x1a\x45\xdf\xa3": "matroska", b"\0\0\x01\xba": "mpeg", b"FLV\x01": "flv", b"GIF8": "gif"}
    return starts.get(head[:4])


def _declared_bytes(file: IO[bytes], name: str, there: int) -> int:
    """Return how many bytes a file is to have by its container's own lengths, as far as they tell: decoders end without
    an error where a file does.
    """
    if name == "mov":
        return _end_of_boxes(file, there)
    file.seek(0)
    head = file.read(64)
    if name == "avi":
        return 8 + int.from_bytes(head[4:8], "little")
    if name == "matroska":
        length, at = _ebml_number(head, 4)
        if length is None or head[at + length : at + length + 4] != b"\x18\x53\x80\x67":
            return 0
        segment, at = _ebml_number(head, at + length + 4)
        return 0 if segment is None else at + segment
    return 0


def _end_of_boxes(file: IO[bytes], there: int) -> int:
    """Return where the last box of an MP4 ends (ISO 14496-12, section 4.2)."""
    at = 0
    while at < there:
        file.seek(at)
        head = file.read(16)
        size = int.from_bytes(head[:4], "big")
        if not head[4:8].isalnum() or not size:
            return there  # no box: what some programs append; or one that reaches to the end
        at += int.from_bytes(head[8:16], "big") if size == 1 else size
    return at


def _ebml_number(data: bytes, at: int) -> tuple[int | None, int]:
    """Return a length of Matroska (RFC 8794, section 4) and where it ends; None where it is left open."""
    if at >= len(data) or not data[at]:
        return None, at
    count = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + count], "big") & ((1 << 7 * count) - 1)
    return (None if value == (1 << 7 * count) - 1 else value), at + count

"""`moving_shapes`: clips of coloured shapes on the move, with the question which way one of them moves.

Nothing is downloaded: clips are drawn, a pure function of the spec's fields, and written as video files into the cache
(QuickTime Animation, which loses nothing), from where they are read like any other video. A frame alone does not tell
an answer: where a shape begins is drawn evenly over all places from which it stays in the picture, so that with the
default fields the best guess from the first or the last frame is right in 49 % of the clips, from the middle one in
37 %.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from orchestrator_plugins.data.drawn import files_in_cache, random_numbers, reasons
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from orchestrator import plugin
from orchestrator.data.records.record_set import VideosSpec

if TYPE_CHECKING:
    from PIL import Image

CLIPS = {"train": 12_000, "test": 400}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Each with its step in columns and rows; a picture's rows count downwards."""
COLOURS = {"red": (230, 50, 50), "green": (50, 200, 70), "blue": (70, 100, 240), "yellow": (240, 210, 60)}
SHAPES = ("circle", "square", "triangle")
SHAPE_PIXELS = 15
BACKGROUND = (127, 127, 127)
"""Nearly 0 once it is normalised, so that a patch without a shape says little but where it is."""
MARGIN = SHAPE_PIXELS // 2 + 1
RATE = 8
"""Frames a second of the files."""


class MovingShapesSpec(VideosSpec):
    """Clips of a few shapes, each of another colour; the question is which way one moves: left, right, up or down."""

    implementation: ClassVar[str] = "orchestrator_plugins.data.moving_shapes:MovingShapes"

    kind: Literal["moving_shapes"] = "moving_shapes"
    split: Literal["train", "test"] = "train"
    """Which clips: those of the two are drawn apart."""
    num_clips: plugin.Count | None = None
    """Clips of the split, each with one question; null takes 12,000 for training and 400 for testing."""
    shapes: Annotated[int, Field(strict=True, ge=1, le=4)] = 3
    """Shapes in a clip, each of another colour."""
    pixels: Annotated[int, Field(strict=True, ge=32, le=512)] = 64
    """Side of the picture in pixels; a shape is 15 pixels wide and high."""
    frames: Annotated[int, Field(strict=True, ge=2, le=256)] = 13
    """Frames of a file, 8 a second."""
    speed: Annotated[int, Field(strict=True, ge=1, le=16)] = 2
    """Pixels that a shape moves from a frame to the next."""
    seed: plugin.Whole = 0
    """What clips are drawn from; not the experiment's seed."""
    conversation_template: Literal["chat_template", "vicuna_v1", "plain"] = "chat_template"
    """How a question becomes a prompt: the tokenizer's own `chat_template`, `vicuna_v1` (LLaVA-1.5), or `plain`."""

    @model_validator(mode="after")
    def _stays_in_the_picture(self) -> MovingShapesSpec:
        room = self.pixels - 2 * MARGIN
        if self.travel > room:
            text = "shapes move {travel} pixels in {frames} frames, and the picture has room for {room}"
            values = {"travel": self.travel, "frames": self.frames, "room": room}
            raise PydanticCustomError("moving_shapes_room", text, values)
        return self

    @property
    def travel(self) -> int:
        """Pixels that a shape moves from the first frame to the last."""
        return self.speed * (self.frames - 1)

    @property
    def clips(self) -> int:
        """Number of clips of the split."""
        return self.num_clips or CLIPS[self.split]

    def num_rows(self) -> int:
        """Return the rows in use."""
        return len(plugin.evenly_spread(self.clips, self.max_samples))

    def has_videos(self) -> bool:
        """Return True: each row has one."""
        return True

    def column_names(self) -> tuple[str, ...]:
        """Return none: a row is its question and the answer."""
        return ()

    def content_digest(self) -> str:
        """Return the SHA-256 over what is in the split's clips, and how it is drawn."""
        return _content(_drawn_from(self))


class Shape(NamedTuple):
    """A shape of a clip.

    Attributes:
        colour: Name of its colour, which no other shape of the clip has.
        kind: One of `SHAPES`.
        column: Of its middle in the first frame, in pixels.
        row: Likewise.
        direction: Which way it moves, one of `DIRECTIONS`.
    """

    colour: str
    kind: str
    column: int
    row: int
    direction: str


class Scene(NamedTuple):
    """A clip and what is asked about it: which way its first shape moves; later shapes lie on earlier ones."""

    shapes: tuple[Shape, ...]

    @property
    def question(self) -> str:
        """The question."""
        return f"Which way does the {self.shapes[0].colour} {self.shapes[0].kind} move?"

    @property
    def answer(self) -> str:
        """Its answer."""
        return self.shapes[0].direction


class MovingShapes:
    """The rows of one split."""

    def __init__(self, spec: MovingShapesSpec) -> None:
        self._spec = spec

    def rows(self) -> Sequence[plugin.Row]:
        """Return one row a clip: the video, a line end, the question.

        Raises:
            DataError: PyAV is not installed, or the clips cannot be written to the cache.
        """
        spec, made = self._spec, _drawn_from(self._spec)
        used = plugin.evenly_spread(spec.clips, spec.max_samples)
        paths, scenes = _files(made, tuple(used)), _scenes(made)
        reading = plugin.ImageReading(num_frames=spec.num_frames, fps=spec.fps)
        rows = []
        for index in used:
            scene = scenes[index]
            turns = (
                plugin.Turn("user", f"{plugin.VIDEO_MARK}\n{scene.question}"),
                plugin.Turn("assistant", scene.answer),
            )
            video = plugin.ImageRef(paths[index], reading, video=True)
            rows.append(plugin.Row(index, (video,), turns, scene.answer))
        return rows

    def check(self, every_row: bool = True) -> list[str]:
        """Return why the rows cannot be had, if they cannot."""
        return reasons(self)


@dataclass(frozen=True)
class _Made:
    """What clips are a function of: every field of the spec that they depend on."""

    split: str
    clips: int
    shapes: int
    pixels: int
    frames: int
    speed: int
    seed: int


def _drawn_from(spec: MovingShapesSpec) -> _Made:
    return _Made(spec.split, spec.clips, spec.shapes, spec.pixels, spec.frames, spec.speed, spec.seed)


@lru_cache(maxsize=8)
def _scenes(made: _Made) -> tuple[Scene, ...]:
    return tuple(_scene(made, number) for number in range(made.clips))


def _scene(made: _Made, number: int) -> Scene:
    """Return a clip. Answers go round, clip by clip, so that each is as frequent as the others; all else is drawn from
    a hash, the same everywhere.
    """
    count = 8 + 4 * made.shapes
    purpose = ("moving_shapes", made.split, made.shapes, made.pixels, made.frames, made.speed, made.seed, number)
    numbers = random_numbers(count, *purpose)
    colours = sorted(COLOURS, key=lambda _: next(numbers))
    directions = list(DIRECTIONS)
    shapes = []
    for place, colour in enumerate(colours[: made.shapes]):
        kind = SHAPES[next(numbers) % len(SHAPES)]
        column, row, turn = (next(numbers) for _ in range(3))
        direction = directions[number % 4] if place == 0 else directions[turn % 4]
        right, down = DIRECTIONS[direction]
        shapes.append(Shape(colour, kind, _start(made, column, right), _start(made, row, down), direction))
    return Scene(tuple(shapes))


def _start(made: _Made, drawn: int, step: int) -> int:
    """Return where a shape begins along one axis: any place from which it stays in the picture."""
    travel = made.speed * (made.frames - 1)
    first = MARGIN + (travel if step < 0 else 0)
    last = made.pixels - MARGIN - (travel if step > 0 else 0)
    return first + drawn % (last - first + 1)


def frames_of(scene: Scene, pixels: int, frames: int, speed: int) -> list[Image.Image]:
    """Return the frames of a clip, RGB."""
    from PIL import Image  # late: planning draws no picture

    half, found = SHAPE_PIXELS // 2, []
    for frame in range(frames):
        picture = Image.new("RGB", (pixels, pixels), BACKGROUND)
        for shape in reversed(scene.shapes):  # the one that is asked for lies on top
            right, down = DIRECTIONS[shape.direction]
            place = (shape.column + right * speed * frame - half, shape.row + down * speed * frame - half)
            picture.paste(COLOURS[shape.colour], place, _masks()[shape.kind])
        found.append(picture)
    return found


@cache
def _masks() -> dict[str, Image.Image]:
    from PIL import Image  # late: planning draws no picture

    return {kind: Image.frombytes("L", (SHAPE_PIXELS, SHAPE_PIXELS), _mask(kind)) for kind in SHAPES}


def _mask(kind: str) -> bytes:
    """Return where a shape is (255) in its square, row by row; whole numbers alone decide."""
    half = SHAPE_PIXELS // 2
    inside = {
        "circle": lambda x, y: x * x + y * y <= half * half,
        "square": lambda x, y: max(abs(x), abs(y)) < half,
        "triangle": lambda x, y: 2 * abs(x) <= y + half,
    }[kind]
    places = range(-half, half + 1)
    return bytes(255 if inside(x, y) else 0 for y in places for x in places)


@lru_cache(maxsize=8)
def _content(made: _Made) -> str:
    content = sha256(repr([made, BACKGROUND, COLOURS, SHAPE_PIXELS, RATE]).encode())
    content.update(b"".join(map(_mask, SHAPES)))
    for scene in _scenes(made):
        content.update(repr(scene).encode())
    return content.hexdigest()


@lru_cache(maxsize=8)
def _files(made: _Made, numbers: tuple[int, ...]) -> dict[int, str]:
    """Return the paths of some clips in the cache; what is missing there is drawn."""
    scenes = _scenes(made)

    def write(path: Path, number: int) -> None:
        if not path.exists():
            _write(path, frames_of(scenes[number], made.pixels, made.frames, made.speed))

    return files_in_cache("moving_shapes", _content(made), numbers, ".mov", "its clips", write)


def _write(path: Path, frames: Sequence[Image.Image]) -> None:
    """Write a clip whole, aside and then renamed: several processes may draw the same ones."""
    try:
        import av
    except ImportError as error:
        raise plugin.DataError(
            "moving_shapes: its clips are written by the package av, which is not installed: "
            "pip install 'llavolta-orchestrator[video]'"
        ) from error

    aside = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with av.open(str(aside), "w", format="mov", options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream("qtrle", rate=RATE)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    aside.replace(path)

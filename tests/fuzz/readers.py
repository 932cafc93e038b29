"""What reads files of strangers, fed with bytes that atheris chooses to reach every branch: `make fuzz`.

Of each reader only its own error may come out; anything else stops the fuzzer with the input that did it.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["orchestrator", "PIL"]):
    from PIL import Image

    from orchestrator.data.records.conversations import RecordOptions, parse_record
    from orchestrator.data.records.image_files import BadImage, open_image, verify_image
    from orchestrator.data.records.json_records import BadRow, read_records
    from orchestrator.errors import DataError, SpecError
    from orchestrator.spec.loader import load_experiment

ROOT = Path(__file__).parents[2]
ROWS = b"""\
[{"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\n?"}, {"from": "gpt", "value": "It."}]},
 {"messages": [{"role": "user", "content": [{"type": "image", "image": "b.jpg"}, {"type": "text", "text": "?"}]},
               {"role": "assistant", "content": "no"}], "category": "x"}]
"""


def read_experiment(file: Path) -> None:
    """Loads an experiment file."""
    with contextlib.suppress(SpecError):
        assert load_experiment(file).cells


def read_rows(file: Path) -> None:
    """Reads records, and makes a row of each."""
    options = RecordOptions(columns=("category",), video_folder=file.parent)
    with contextlib.suppress(DataError):
        for index, record in enumerate(read_records(file)):
            with contextlib.suppress(BadRow):
                row = parse_record(index, record, file.parent, "chat_template" if index % 2 else "plain", options)
                assert row.turns


def read_image(file: Path) -> None:
    """Checks a picture, and opens one that passes: it opens then, in the same size."""
    with contextlib.suppress(BadImage):
        verify_image(str(file))
        assert min(open_image(str(file)).size) > 0


def experiments() -> Iterator[bytes]:
    """The experiments that come with the program."""
    yield from (file.read_bytes() for file in (ROOT / "experiments").rglob("*.yaml"))


def rows() -> Iterator[bytes]:
    """A list of two records, and the same as lines."""
    yield ROWS
    yield ROWS.strip(b"[]\n").replace(b"},\n {", b"}\n{")


def images() -> Iterator[bytes]:
    """Small pictures of all kinds."""
    for mode in ("RGB", "L", "P", "RGBA", "I;16", "1"):
        for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"):
            buffer = io.BytesIO()
            with contextlib.suppress(OSError, ValueError, KeyError):
                Image.new(mode, (5, 3)).save(buffer, kind)
                yield buffer.getvalue()


READERS: dict[str, tuple[str, Callable[[Path], None], Callable[[], Iterator[bytes]]]] = {
    "experiments": (".yaml", read_experiment, experiments),
    "rows": (".json", read_rows, rows),
    "images": (".png", read_image, images),
}


def main() -> None:
    """Fuzzes one reader: `readers.py NAME CORPUS [options of libFuzzer]`; the corpus grows and is used again."""
    warnings.simplefilter("ignore")
    suffix, read, seeds = READERS[sys.argv[1]]
    corpus = Path(sys.argv[2])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    with tempfile.TemporaryDirectory() as folder:
        # Beside the files that experiments extend.
        for entry in (ROOT / "experiments").iterdir():
            (Path(folder) / entry.name).symlink_to(entry)
        file = Path(folder) / f"fuzzed{suffix}"

        def feed(data: bytes) -> None:
            file.write_bytes(data)
            read(file)

        atheris.Setup([sys.argv[0], str(corpus), *sys.argv[3:]], feed)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

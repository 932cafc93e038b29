"""Image files that cannot be used: cut, damaged, foreign, too large, no files at all; each is told with its reason."""

import os
import socket
import struct
import zlib

import numpy as np
import pytest
from image_files import image_errors, pixels, png, saved, written
from PIL import Image, ImageFile

from orchestrator.data.records import image_files as module
from orchestrator.data.records.image_files import BadImage, image_size, open_image
from orchestrator.data.rows import ImageReading
from orchestrator.errors import DataError

RNG = np.random.default_rng(0)
COLOURS = Image.fromarray(RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8))

CUT = {
    "JPEG": ("JPEG", {}),
    "progressive JPEG": ("JPEG", {"progressive": True}),
    "PNG": ("PNG", {}),
    "WEBP": ("WEBP", {}),
    "lossless WEBP": ("WEBP", {"lossless": True}),
    "GIF": ("GIF", {}),
    "BMP": ("BMP", {}),
    "TIFF": ("TIFF", {}),
    "deflated TIFF": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "PPM": ("PPM", {}),
}


@pytest.mark.parametrize("name", CUT)
def test_a_file_cut_anywhere_is_told_or_shows_the_whole_picture(name, tmp_path, monkeypatch):
    # As a library of the user's may set it, for the whole process.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    kind, options = CUT[name]
    whole = saved(Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)), kind, **options)
    path = written(tmp_path, whole)
    assert image_errors([path]) == {}
    wanted = pixels(open_image(path))
    told = 0
    for length in {0, 1, 9, *range(20, len(whole), len(whole) // 40), *range(len(whole) - 12, len(whole))}:
        written(tmp_path, whole[:length])
        fault = image_errors([path]).get(path)
        told += fault is not None
        assert fault is not None or (pixels(open_image(path)) == wanted).all(), length
    assert told >= 50


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CUT)
def test_a_damaged_file_is_told_or_opens_in_the_size_its_header_says(name, tmp_path, monkeypatch):
    """Whatever a decoder stumbles over: nothing but a BadImage comes out."""
    monkeypatch.setattr(module, "MAX_PIXELS", 10_000)
    kind, options = CUT[name]
    whole = saved(Image.fromarray(RNG.integers(0, 256, (12, 15, 3), dtype=np.uint8)), kind, **options)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in RNG.integers(0, min(len(whole), 300), 3):
            damaged[place] = RNG.integers(256)
        path = written(tmp_path, bytes(damaged))
        if path not in image_errors([path]):
            found = open_image(path)
            assert image_size(path) == (found.height, found.width)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_file_that_ends_in_zeros_is_told(kind, tmp_path):
    y, x = np.mgrid[:120, :160]
    image = Image.fromarray(np.stack([128 + 90 * np.sin(x / 17 + y / 30), x, (x + y) % 256], -1).astype(np.uint8))
    whole = saved(image, kind)
    for share in (0.4, 0.8):
        length = int(len(whole) * share)
        path = written(tmp_path, whole[:length] + bytes(len(whole) - length))
        assert path in image_errors([path])


def test_a_flipped_bit_in_a_png_is_told(tmp_path):
    whole = bytearray(saved(COLOURS, "PNG"))
    whole[whole.index(b"IDAT") + 12] ^= 1
    path = written(tmp_path, bytes(whole))
    assert "damaged" in image_errors([path])[path]


FOREIGN = {
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 6\n": "is PostScript; formats read are JPEG, PNG",
    b"8BPS\0\1": "is a Photoshop file",
    b"\0\0\0\x1cftypheic": "is a HEIC image",
    b"\0\0\0\x1cftypavif": "is an AVIF image",
    b"<!DOCTYPE html><title>404</title>": "is an HTML page: the download went wrong",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "is a git-lfs pointer",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>": "is an SVG drawing",
    b"%PDF-1.7": "is a PDF",
    b"\0" * 900: "nothing but zeros",
    b"": "is empty",
    b"\x89PNG\r\n\x1a\nnothing": "is damaged",
    b"hello": "is not an image, or is damaged",
}


@pytest.mark.parametrize("data", FOREIGN)
def test_what_a_file_is_that_cannot_be_read(data, tmp_path):
    path = written(tmp_path, data, "looks_like.jpg")
    assert FOREIGN[data] in image_errors([path])[path]


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX", "TGA", "JPEG2000", "AVIF", "SGI", "DDS", "IM"])
def test_rare_decoders_are_never_reached(kind, tmp_path):
    path = written(tmp_path, saved(COLOURS.resize((32, 32)), kind), "picture.png")
    with Image.open(path) as image:
        assert image.format == kind
    assert path in image_errors([path])


def test_sizes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 200)
    square, wide = written(tmp_path, saved(Image.new("L", (15, 14)), "PNG")), str(tmp_path / "wide")
    Image.new("L", (100, 2)).save(wide, "PNG")
    assert image_errors([square, wide]) == {square: "has 15x14 pixels, more than 200: refused as a decompression bomb"}
    assert "100x100 pixels when padded to a square" in image_errors([wide], ImageReading(pad=True))[wide]
    with pytest.raises(BadImage, match="bomb"):
        image_size(square)


def test_bombs_of_pixels_and_of_text(tmp_path):
    """A header that promises 10^10 pixels, and a comment of 64 MB in 64 kB."""
    bomb = bytearray(saved(Image.new("L", (9, 6)), "PNG"))
    bomb[16:24] = struct.pack(">II", 100_000, 100_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    path = written(tmp_path, bytes(bomb))
    assert "more than 89,478,485" in image_errors([path])[path] or "too large" in image_errors([path])[path]
    comment = b"Comment\0\0" + zlib.compress(bytes(64 * 2**20))
    path = written(tmp_path, png(np.zeros((6, 9), np.uint8), 8, 0, ((b"zTXt", comment),)))
    assert "damaged" in image_errors([path])[path]


def test_what_is_no_regular_file_is_told_and_does_not_hang(tmp_path, monkeypatch):
    names = {name: str(tmp_path / name) for name in ("fifo", "socket", "folder", "absent", "dangling", "loop", "link")}
    os.mkfifo(names["fifo"])
    os.mkdir(names["folder"])
    os.symlink("nowhere", names["dangling"])
    os.symlink("loop", names["loop"])
    os.symlink(written(tmp_path, saved(COLOURS, "PNG")), names["link"])
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the name of a socket is short
        server.bind("socket")
        faults = image_errors([*names.values(), f"{names['link']}/x.png", str(tmp_path / ("x" * 300)), "/dev/zero"])
    assert faults == {
        names["fifo"]: "is no regular file",
        names["socket"]: "is no regular file",
        names["folder"]: "is a folder, not an image",
        names["absent"]: "is missing",
        names["dangling"]: "is missing",
        names["loop"]: "is a link to itself",
        f"{names['link']}/x.png": "is missing",
        str(tmp_path / ("x" * 300)): "has too long a name",
        "/dev/zero": "is no regular file",
    }


def test_a_failing_disk_makes_no_bad_rows(tmp_path, monkeypatch):
    """A row that is dropped for a moment's fault would be another experiment."""
    path = written(tmp_path, saved(COLOURS, "PNG"))

    def failing(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module.os, "stat", failing)
    with pytest.raises(DataError, match="image cannot be read: Input/output error"):
        image_errors([path])


def test_a_header_that_points_beyond_every_file_is_damage_and_no_failure_of_the_storage(tmp_path):
    """Found by `make fuzz`: file systems refuse to seek so far, each from another place on."""
    for place in (2**31, 2**44, 2**62, 2**63 - 1, 2**64 - 1):
        path = written(tmp_path, struct.pack("<2sHHHQ", b"II", 43, 8, 0, place))
        assert list(image_errors([path])) == [path], place
        with pytest.raises(BadImage):
            image_size(path)

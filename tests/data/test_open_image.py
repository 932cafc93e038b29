"""Image files of every mode, depth, format and orientation against transformers' `load_image` and a viewer's rules."""

import io
import os
import socket
import struct
import zlib

import numpy as np
import pytest
from image_files import png, tiff
from PIL import Image, ImageFile
from transformers.image_utils import load_image

from orchestrator.data import open_image as module
from orchestrator.data.image_check import image_faults
from orchestrator.data.open_image import BadImage, image_size, open_image, pad_to_square, verify_image
from orchestrator.data.rows import ImageReading
from orchestrator.errors import DataError

RNG = np.random.default_rng(0)
COLOURS = Image.fromarray(RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8))
LIKE_LOAD_IMAGE, LIKE_A_VIEWER = ImageReading(ambiguous="load_image"), ImageReading(ambiguous="viewer")
RAMP = np.linspace(0, 65535, 6 * 9).round().astype(np.uint16).reshape(6, 9)
EIGHT_BITS = np.round(RAMP / 257).astype(np.uint8)


def written(folder, data: bytes, name: str = "image") -> str:
    """The bytes as a file without a suffix: what a file is called says nothing."""
    path = folder / name
    path.write_bytes(data)
    return str(path)


def saved(image, kind, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("JPEG", mode) for mode in ("L", "RGB", "CMYK", "YCbCr")),
        *(("PNG", mode) for mode in ("1", "L", "P", "RGB")),
        *(("WEBP", mode) for mode in ("L", "RGB")),
        *(("GIF", mode) for mode in ("1", "L", "P")),
        *(("BMP", mode) for mode in ("1", "L", "P", "RGB")),
        *(("TIFF", mode) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB")),
        *(("PPM", mode) for mode in ("1", "L", "RGB")),
    ],
)
def test_every_format_and_mode_is_what_load_image_gives(kind, mode, tmp_path):
    path = written(tmp_path, saved(COLOURS.convert(mode), kind))
    verify_image(path)
    assert open_image(path).mode == "RGB"
    assert (pixels(open_image(path)) == pixels(load_image(path))).all()
    assert image_size(path) == (6, 9)


def test_a_jpeg_of_inverted_inks_is_turned_over_once(tmp_path):
    """Adobe writes CMYK upside down, with a marker that says so; Pillow writes and reads it so too."""
    path = written(tmp_path, saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert b"Adobe" in (tmp_path / "image").read_bytes()
    assert abs(pixels(open_image(path)) - (255, 0, 0)).max() < 4


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_once_and_the_size_is_the_turned_ones(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = written(tmp_path, saved(COLOURS, kind, exif=exif))
    found = open_image(path)
    assert (pixels(found) == pixels(load_image(path))).all()
    assert image_size(path) == (found.height, found.width) == ((9, 6) if 5 <= orientation <= 8 else (6, 9))
    assert image_size(path, ImageReading(pad=True)) == (9, 9)


GREY = {
    "PNG": lambda: png(RAMP, 16, 0),
    "TIFF, Intel": lambda: tiff(RAMP),
    "TIFF, Motorola": lambda: tiff(RAMP, order=">"),
    "TIFF, 0 is white": lambda: tiff(65535 - RAMP, photometric=0),
    "TIFF, 12 bits": lambda: tiff((RAMP // 16)[:, :8], bits=12),
    "TIFF, LZW": lambda: saved(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
    "PGM": lambda: b"P5 9 6 65535\n" + RAMP.astype(">u2").tobytes(),
    "PGM in words": lambda: b"P2 9 6 65535\n" + " ".join(map(str, RAMP.reshape(-1))).encode(),
    "PGM of 1023": lambda: b"P5 9 6 1023\n" + (RAMP // 64).astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", GREY)
def test_grey_of_more_than_8_bits_is_scaled_not_cut_off(name, tmp_path):
    path = written(tmp_path, GREY[name]())
    verify_image(path)
    found = pixels(open_image(path))
    wanted = EIGHT_BITS.astype(int)[:, : found.shape[1]]
    loose = 1 if "12" in name or "1023" in name else 0
    assert abs(found - wanted[..., None]).max() <= loose


def test_colour_of_16_bits_and_grey_of_few_bits(tmp_path):
    colour = RNG.integers(0, 65536, (6, 9, 3), dtype=np.uint16)
    found = pixels(open_image(written(tmp_path, png(colour, 16, 2))))
    assert abs(found - colour / 257).max() <= 1
    for bits in (1, 2, 4):
        values = RNG.integers(0, 2**bits, (6, 9))
        found = pixels(open_image(written(tmp_path, png(values, bits, 0))))
        assert (found[..., 0] == values * 255 // (2**bits - 1)).all()


@pytest.mark.parametrize(
    "data",
    [
        tiff(RAMP.astype(np.uint32) * 9, bits=32),
        tiff(RAMP.astype(np.int32), bits=32, sample_format=2),
        tiff(RAMP.astype(np.int16), sample_format=2),
        tiff((RAMP / 65535).astype(np.float32), bits=32, sample_format=3),
        tiff((RAMP / 65535).astype(np.float32), bits=32, sample_format=3, order=">"),
        b"Pf\n9 6\n-1.0\n" + RAMP.astype("<f4").tobytes(),
    ],
    ids=["unsigned 32", "signed 32", "signed 16", "float", "float, Motorola", "PFM"],
)
@pytest.mark.parametrize("reading", [ImageReading(), LIKE_LOAD_IMAGE, LIKE_A_VIEWER])
def test_grey_without_a_known_range_is_refused(data, reading, tmp_path):
    with pytest.raises(BadImage, match="whose range nothing tells; convert it to 8 bits"):
        open_image(written(tmp_path, data), reading)


def see_through(mode: str) -> Image.Image:
    alpha = Image.fromarray(np.tile(np.array([0, 128, 255], np.uint8), (6, 3)))
    image = COLOURS.convert("L" if mode == "LA" else "RGB")
    image.putalpha(alpha)
    return image


HIDDEN = {
    "RGBA PNG": lambda: saved(see_through("RGBA"), "PNG"),
    "LA PNG": lambda: saved(see_through("LA"), "PNG"),
    "RGBA WEBP": lambda: saved(see_through("RGBA"), "WEBP", lossless=True, exact=True),
    "RGBA TIFF": lambda: saved(see_through("RGBA"), "TIFF"),
    "RGBA of 16 bits": lambda: png(RNG.integers(0, 65536, (6, 9, 4), dtype=np.uint16), 16, 6),
    "palette with alphas": lambda: saved(COLOURS.quantize(8), "PNG", transparency=bytes([0, 128, 255])),
    "palette, one colour": lambda: saved(COLOURS.quantize(8), "GIF", transparency=1),
    "one colour of RGB": lambda: saved(COLOURS, "PNG", transparency=COLOURS.getpixel((3, 3))),
    "one grey": lambda: saved(COLOURS.convert("L"), "PNG", transparency=COLOURS.convert("L").getpixel((3, 3))),
    "one grey of 16 bits": lambda: png(RAMP, 16, 0, ((b"tRNS", struct.pack(">H", int(RAMP[3, 3]))),)),
    "one grey of 4 bits": lambda: png(RAMP >> 12, 4, 0, ((b"tRNS", struct.pack(">H", 5)),)),
    "one grey of 1 bit": lambda: png(RAMP >> 15, 1, 0, ((b"tRNS", struct.pack(">H", 0)),)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_transparency_is_refused_or_followed_as_the_data_set_says(name, tmp_path):
    path = written(tmp_path, HIDDEN[name]())
    with pytest.raises(BadImage, match=r"is transparent in parts.*ambiguous_images"):
        open_image(path)
    assert "transparent" in image_faults([path])[path]
    assert image_faults([path], LIKE_A_VIEWER) == image_faults([path], LIKE_LOAD_IMAGE) == {}
    without, on_white = pixels(open_image(path, LIKE_LOAD_IMAGE)), pixels(open_image(path, LIKE_A_VIEWER))
    if "16 bits" not in name:
        assert (without == pixels(load_image(path))).all()
    assert (on_white >= without).all() and (on_white != without).any()
    if "one" in name:  # that one is white, the others are as they are
        changed = (on_white != without).any(-1)
        assert (on_white[changed] == 255).all() and len(np.unique(without[changed], axis=0)) == 1


def test_what_is_not_hidden_or_white_anyway_needs_no_choice(tmp_path):
    opaque = COLOURS.convert("RGBA")
    for image in (opaque, Image.new("RGBA", (3, 3), (255, 255, 255, 0))):
        path = written(tmp_path, saved(image, "PNG"))
        assert (pixels(open_image(path)) == pixels(load_image(path))).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_only_by_choice(kind, tmp_path):
    frames = [Image.new("RGB", (9, 6), colour) for colour in ("red", "green", "blue")]
    path = written(tmp_path, saved(frames[0], kind, save_all=True, append_images=frames[1:]))
    with pytest.raises(BadImage, match="has 3 frames or pages, of which a model would see the first"):
        open_image(path)
    for reading in (LIKE_LOAD_IMAGE, LIKE_A_VIEWER):
        verify_image(path, reading)
        assert (pixels(open_image(path, reading)) == pixels(load_image(path))).all()


def test_a_phones_second_picture_is_no_frame(tmp_path):
    path = written(tmp_path, saved(COLOURS, "MPO", save_all=True, append_images=[COLOURS.rotate(180)]))
    with Image.open(path) as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert (pixels(open_image(path)) == pixels(load_image(path))).all()


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
    assert image_faults([path]) == {}
    wanted = pixels(open_image(path))
    told = 0
    for length in {0, 1, 9, *range(20, len(whole), len(whole) // 40), *range(len(whole) - 12, len(whole))}:
        written(tmp_path, whole[:length])
        fault = image_faults([path]).get(path)
        told += fault is not None
        assert fault is not None or (pixels(open_image(path)) == wanted).all(), length
    assert told >= 50


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_file_that_ends_in_zeros_is_told(kind, tmp_path):
    y, x = np.mgrid[:120, :160]
    image = Image.fromarray(np.stack([128 + 90 * np.sin(x / 17 + y / 30), x, (x + y) % 256], -1).astype(np.uint8))
    whole = saved(image, kind)
    for share in (0.4, 0.8):
        length = int(len(whole) * share)
        path = written(tmp_path, whole[:length] + bytes(len(whole) - length))
        assert path in image_faults([path])


def test_a_flipped_bit_in_a_png_is_told(tmp_path):
    whole = bytearray(saved(COLOURS, "PNG"))
    whole[whole.index(b"IDAT") + 12] ^= 1
    path = written(tmp_path, bytes(whole))
    assert "damaged" in image_faults([path])[path]


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
    assert FOREIGN[data] in image_faults([path])[path]


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX", "TGA", "JPEG2000", "AVIF", "SGI", "DDS", "IM"])
def test_rare_decoders_are_never_reached(kind, tmp_path):
    path = written(tmp_path, saved(COLOURS, kind), "picture.png")
    with Image.open(path) as image:
        assert image.format == kind
    assert path in image_faults([path])


def test_sizes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 200)
    square, wide = written(tmp_path, saved(Image.new("L", (15, 14)), "PNG")), str(tmp_path / "wide")
    Image.new("L", (100, 2)).save(wide, "PNG")
    assert image_faults([square, wide]) == {square: "has 15x14 pixels, more than 200: taken for a bomb"}
    assert "100x100 pixels when padded to a square" in image_faults([wide], ImageReading(pad=True))[wide]
    with pytest.raises(BadImage, match="bomb"):
        image_size(square)


def test_bombs_of_pixels_and_of_text(tmp_path):
    """A header that promises 10^10 pixels, and a comment of 64 MB in 64 kB."""
    bomb = bytearray(saved(Image.new("L", (9, 6)), "PNG"))
    bomb[16:24] = struct.pack(">II", 100_000, 100_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    path = written(tmp_path, bytes(bomb))
    assert "more than 89,478,485" in image_faults([path])[path] or "too large" in image_faults([path])[path]
    comment = b"Comment\0\0" + zlib.compress(bytes(64 * 2**20))
    path = written(tmp_path, png(RAMP >> 8, 8, 0, ((b"zTXt", comment),)))
    assert "damaged" in image_faults([path])[path]


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
        faults = image_faults([*names.values(), f"{names['link']}/x.png", str(tmp_path / ("x" * 300)), "/dev/zero"])
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
        image_faults([path])


@pytest.mark.parametrize("size", [(9, 6), (6, 9), (7, 7), (1, 10)])
def test_padding_is_llavas(size):
    """As `expand2square` of llava/mm_utils.py."""
    image = COLOURS.resize(size)
    padded = pixels(pad_to_square(image, (122, 116, 104)))
    side, (width, height) = max(size), size
    top, left = (side - height) // 2, (side - width) // 2
    wanted = np.full((side, side, 3), (122, 116, 104))
    wanted[top : top + height, left : left + width] = pixels(image)
    assert (padded == wanted).all()

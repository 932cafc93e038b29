"""Image files of every mode, depth, format and orientation against transformers' `load_image` and a viewer's rules."""

import struct

import numpy as np
import pytest
from image_files import image_errors, pixels, png, saved, tiff, written
from PIL import Image
from transformers.image_utils import load_image

from orchestrator.data.records.image_files import BadImage, image_size, open_image, pad_to_square, verify_image
from orchestrator.data.rows import ImageReading

RNG = np.random.default_rng(0)
COLOURS = Image.fromarray(RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8))
LIKE_LOAD_IMAGE, LIKE_A_VIEWER = ImageReading(ambiguous="load_image"), ImageReading(ambiguous="viewer")
DEEP = RNG.integers(0, 65536, (6, 9, 3), dtype=np.uint16)
RAMP = np.linspace(0, 65535, 6 * 9).round().astype(np.uint16).reshape(6, 9)
EIGHT_BITS = np.round(RAMP / 257).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("JPEG", mode) for mode in ("L", "RGB", "CMYK", "YCbCr")),
        *(("PNG", mode) for mode in ("1", "L", "P", "RGB")),
        *(("WEBP", mode) for mode in ("L", "RGB")),
        *(("GIF", mode) for mode in ("1", "L", "P")),
        *(("BMP", mode) for mode in ("1", "L", "P", "RGB")),
        *(("TIFF", mode) for mode in ("1", "L", "P", "RGB", "CMYK", "LAB")),
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
    found = pixels(open_image(written(tmp_path, png(DEEP, 16, 2))))
    assert abs(found - DEEP / 257).max() <= 1
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
    with pytest.raises(BadImage, match="of unknown range; convert it to 8 bits"):
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
    "one colour of 16 bits": lambda: png(DEEP, 16, 2, ((b"tRNS", struct.pack(">3H", *DEEP[3, 3].tolist())),)),
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
    assert "transparent" in image_errors([path])[path]
    assert image_errors([path], LIKE_A_VIEWER) == image_errors([path], LIKE_LOAD_IMAGE) == {}
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

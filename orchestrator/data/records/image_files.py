"""Open image files, for training, evaluation, sizes and the check alike. Imports no torch.

The result is what `transformers.image_utils.load_image` returns and an image viewer shows. Where the two differ, the
file is refused with the reason, unless the data set chooses one of them (`ImageReading.ambiguous`):

- 16-bit grey: `load_image` clips at 255; a viewer scales, and so does this module, always. 32-bit grey and floats have
  no defined range: refused, always.
- Transparency: `load_image` drops it, so that hidden colours become visible; a viewer shows what is beneath, here
  white, as transformers' own `convert_to_rgb`. Refused where that makes a difference.
- Several frames or pages: `load_image` takes the first, a viewer plays them. The second picture of a phone's JPEG (MPO:
  depth, gain map) does not count as a frame.

EXIF orientation is applied, colour profiles are not, as in `load_image`.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import IO, Any

from PIL import ExifTags, Image, ImageChops, ImageFile, ImageOps, UnidentifiedImageError

from orchestrator.data.records.file_kinds import HEAD_BYTES, looks_like
from orchestrator.data.rows import AS_IT_IS, ImageReading

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are read; MPO (phones) counts as JPEG. Others would run rare decoders, or Ghostscript (EPS)."""
MAX_PIXELS = 89_478_485
"""Largest picture, after padding: Pillow warns of a decompression bomb from here on."""
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", *(b"P%d" % n for n in range(1, 7)))
ABSENT = {errno.ENOENT: "is missing", errno.ENOTDIR: "is missing", errno.ENAMETOOLONG: "has too long a name"}
ABSENT[errno.ELOOP] = "is a link to itself"
_SIDEWAYS = range(5, 9)
# Scale of a PNG's transparent value to 8 bits: Pillow scales the pixels, but not this value.
_STEPS = {"1": 255, "L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}


_PART = re.compile(r"(.+)::[^/]*@(\d+)\+(\d+)", re.DOTALL)


class BadImage(ValueError):
    """A file that cannot be used; the message follows its path: `is missing`."""


def part_of_file(file: str, name: str, offset: int, length: int) -> str:
    """Return the path of an image that is a part of a file, such as a member of a tar: `FILE::NAME@OFFSET+LENGTH`."""
    return f"{file}::{name}@{offset}+{length}"


def file_of(path: str) -> str:
    """Return the file that an image is in: itself, or the file that it is a part of."""
    found = _PART.fullmatch(path)
    return path if found is None else found[1]


def part_sha256(path: str) -> str | None:
    """Return the SHA-256 of an image that is a part of a file; None if it is a file of its own.

    Raises:
        OSError: the file cannot be read.
    """
    if _PART.fullmatch(path) is None:
        return None
    with _bytes_of(path) as file:
        return sha256(file.read()).hexdigest()


def _bytes_of(path: str) -> IO[bytes]:
    """Open an image's bytes. A file object, not a path: Pillow would map a path into memory, where a failing disk kills
    the process.
    """
    found = _PART.fullmatch(path)
    if found is None:
        return open(path, "rb")
    with open(found[1], "rb") as file:
        file.seek(int(found[2]))
        return io.BytesIO(file.read(int(found[3])))


def open_image(path: str, reading: ImageReading = AS_IT_IS) -> Image.Image:
    """Return the picture as RGB, 8 bits per channel, upright; not padded, since the processor has the colour.

    Raises:
        BadImage: the file is missing, damaged, too large, of a format that is not read, or ambiguous.
        OSError: the storage fails; another attempt may succeed.
    """
    with _opened(path, reading) as image:
        return _as_rgb(image, reading)


def image_size(path: str, reading: ImageReading = AS_IT_IS) -> tuple[int, int]:
    """Return height and width of what `open_image` returns, after padding, from the header alone.

    Raises:
        BadImage: as `open_image`, as far as the header tells.
        OSError: the storage fails.
    """
    with _opened(path, reading) as image:
        width, height = image.size
        # Pillow rotates TIFF by itself, its size too.
        if image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS:
            width, height = height, width
    return (max(width, height),) * 2 if reading.pad else (height, width)


def verify_image(path: str, reading: ImageReading = AS_IT_IS) -> None:
    """Decode the complete file as training will, and look for damage that decoders overlook.

    That is checksums (PNG), and a file that ends in zeros as incomplete downloads do (WebP; the decoders of JPEG and
    others notice). A flipped bit in a format without checksums cannot be detected.

    Raises:
        BadImage: as `open_image`.
        OSError: the storage fails.
    """
    open_image(path, reading)
    with _opened(path, reading) as image:
        if image.format == "PNG":
            image.verify()
        elif image.format == "WEBP":
            with _bytes_of(path) as file:
                file.seek(-min(64, file.seek(0, os.SEEK_END)), os.SEEK_END)
                if not file.read().strip(b"\0"):
                    raise BadImage("is damaged: it ends in zeros")


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Return the picture centred in a square of this colour: LLaVA's `expand2square`."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def check_regular(path: str, what: str) -> None:
    """Raise unless a path is a regular file: others may never end.

    Raises:
        BadImage: it is something else than `what`.
        OSError: there is none, or the storage fails.
    """
    kind = os.stat(path).st_mode
    if stat.S_ISDIR(kind):
        raise BadImage(f"is a folder, not {what}")
    if not stat.S_ISREG(kind):
        raise BadImage("is no regular file")


@contextmanager
def _opened(path: str, reading: ImageReading) -> Iterator[Image.Image]:
    """Open an image and read its header; errors inside the block become BadImage too."""
    # Some libraries set this for the whole process; half a picture is an error.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        check_regular(file_of(path), "an image")
        with _bytes_of(path) as file, Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if min(width, height) < 1:
                raise BadImage(f"has {width}x{height} pixels")
            if reading.pad:
                width = height = max(width, height)
            if width * height > MAX_PIXELS:
                padded = " when padded to a square" if reading.pad else ""
                raise BadImage(
                    f"has {width}x{height} pixels{padded}, more than {MAX_PIXELS:,}: refused as a decompression bomb"
                )
            yield image
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage(_unknown(path)) from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"is too large: {error}") from error
    except OSError as error:
        # Pillow's own errors have no errno; those of the system do. A header that points beyond where a file can end
        # makes an invalid seek, which is no failure of the storage.
        if error.errno in ABSENT:
            raise BadImage(ABSENT[error.errno]) from error
        if error.errno not in (None, errno.EINVAL):
            raise
        raise BadImage(f"is damaged: {error}") from error
    # Pillow's decoders raise exceptions of any kind on a damaged file.
    except Exception as error:
        raise BadImage(f"is damaged: {error or type(error).__name__}") from error


def _unknown(path: str) -> str:
    with _bytes_of(path) as file:
        head = file.read(HEAD_BYTES)
    if not head:
        return "is empty"
    if head.startswith(_MAGIC):
        return "is damaged, or of a variant that Pillow cannot read"
    return f"is {looks_like(head) or 'not an image, or is damaged'}; formats read are {', '.join(FORMATS)}"


def _as_rgb(image: Image.Image, reading: ImageReading) -> Image.Image:
    strict = reading.ambiguous == "fail"
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1 and strict:
        raise BadImage(
            f"has {frames} frames or pages, of which a model would see the first; "
            "take the row out, or allow it with ambiguous_images"
        )
    full, inverted = _range_of_grey(image)
    tiles = getattr(image, "tile", ())
    step = _STEPS.get(str(tiles[0][3])) if image.format == "PNG" and tiles else None
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    see_through = image.info.get("transparency")
    shown: Image.Image = image
    if image.mode.startswith(("I", "F")):
        shown = _scaled(image, full, inverted, see_through)
    elif step and isinstance(see_through, int):
        image.info["transparency"] = see_through * step
    elif step and isinstance(see_through, tuple):
        image.info["transparency"] = tuple(int(value * step) for value in see_through)
    if shown.mode == "1" and shown.has_transparency_data:
        shown = shown.convert("L")
        shown.info["transparency"] = image.info["transparency"]
    if not shown.has_transparency_data:
        return shown.convert("RGB")
    shown = shown.convert("RGBA")
    without = shown.convert("RGB")
    if reading.ambiguous == "load_image":
        return without
    over_white = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
    if strict and ImageChops.difference(without, over_white).getbbox() is not None:
        raise BadImage(
            "is transparent in parts: transformers' load_image shows the colours that a viewer hides; "
            "paint it on a background, or choose with ambiguous_images"
        )
    return over_white


def _range_of_grey(image: Image.Image) -> tuple[int | None, bool]:
    """Return the white value of a grey image of more than 8 bits (None if unknown), and whether 0 is white.

    A TIFF tells its bits; PNG has 16; Pillow scales the values of PGM to 16.
    """
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        unsigned = image.mode.startswith("I;16")
        bits = tags.get(258, (16,))
        full = 2 ** int(bits[0] if isinstance(bits, tuple) else bits) - 1
        return (full if unsigned else None), tags.get(262) == 0
    return (65535 if image.mode in ("I", "I;16", "I;16B", "I;16L") else None), False


def _scaled(image: Image.Image, full: int | None, inverted: bool, see_through: Any) -> Image.Image:
    """Scale 16-bit grey to 8 bits, rounded to nearest, with an alpha channel if a value is transparent."""
    if full is None:
        raise BadImage(f"has grey values (Pillow's mode {image.mode}) of unknown range; convert it to 8 bits")
    import numpy as np  # late: the command line needs it for 16-bit pictures only

    values = np.asarray(image).astype(np.uint32)
    grey = (np.minimum(values, full) * 255 + full // 2) // full
    shown = Image.fromarray((255 - grey if inverted else grey).astype(np.uint8))
    if isinstance(see_through, int):
        shown.putalpha(Image.fromarray(np.where(values == see_through, 0, 255).astype(np.uint8)))
    return shown

"""Image files for tests, of those that Pillow cannot write too: PNG and TIFF of every depth, by their bytes."""

import io
import struct
import zlib

import numpy as np

from orchestrator.data.records.row_index import image_error
from orchestrator.data.rows import AS_IT_IS


def png(pixels: np.ndarray, bits: int, colour_type: int, chunks: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """A PNG of (H, W) or (H, W, C) values; bits below 8 are packed. `chunks` stand before the image data."""
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    if bits == 16:
        raw = [row.astype(">u2").tobytes() for row in rows]
    elif bits == 8:
        raw = [row.astype(np.uint8).tobytes() for row in rows]
    else:
        digits = [(row[:, None] >> np.arange(bits - 1, -1, -1)) & 1 for row in rows]
        raw = [np.packbits(row.astype(np.uint8).reshape(-1)).tobytes() for row in digits]
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in raw))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, value) for name, value in parts)


def _chunk(name: bytes, value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + name + value + struct.pack(">I", zlib.crc32(name + value))


def tiff(pixels: np.ndarray, bits: int = 16, photometric: int = 1, sample_format: int = 1, order: str = "<") -> bytes:
    """An uncompressed TIFF of (H, W) values, in one strip; 12 bits are packed."""
    height, width = pixels.shape
    if bits == 12:
        digits = (pixels[..., None] >> np.arange(11, -1, -1)) & 1
        data = np.packbits(digits.astype(np.uint8).reshape(height, -1), axis=1).tobytes()
    else:
        data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    entries = [
        *((256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)),
        *((277, 3, 1), (278, 3, height), (279, 4, len(data)), (339, 3, sample_format)),
    ]
    fields = b""
    for tag, kind, value in entries:
        packed = struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value)
        fields += struct.pack(order + "HHI", tag, kind, 1) + packed
    mark = b"II" if order == "<" else b"MM"
    start = 8 + len(data)
    directory = struct.pack(order + "H", len(entries)) + fields + struct.pack(order + "I", 0)
    return mark + struct.pack(order + "HI", 42, start) + data + directory


def written(folder, data: bytes, name: str = "image") -> str:
    """The bytes as a file without a suffix: what a file is called says nothing."""
    path = folder / name
    path.write_bytes(data)
    return str(path)


def saved(image, kind, **options) -> bytes:
    """An image as Pillow writes it."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image) -> np.ndarray:
    """(H, W, C) values that may be subtracted."""
    return np.asarray(image).astype(int)


def image_errors(paths, reading=AS_IT_IS) -> dict[str, str]:
    """By path, the error of each image that cannot be used."""
    return {path: error for path in paths if (error := image_error(path, reading)) is not None}

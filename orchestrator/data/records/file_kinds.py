"""Guess a file's kind from its first bytes, for messages about a file that is not what its name says."""

from __future__ import annotations

HEAD_BYTES = 512
_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer: run `git lfs pull`"),
    (b"PAR1", "a parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\xff\xff\xff\xff", "an Arrow stream"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip file: unpack it"),
    (b"PK\x03\x04", "a zip file: unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd file: unpack it"),
    (b"BZh", "a bzip2 file: unpack it"),
    (b"\xfd7zXZ", "an xz file: unpack it"),
    (b"7z\xbc\xaf", "a 7z file: unpack it"),
    (b"%PDF", "a PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"8BPS", "a Photoshop file"),
    (b"\x00\x00\x01\x00", "an icon file (ICO)"),
    (b"\x00\x00\x00\x0cjP", "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"GIF8", "a GIF image"),
    (b"\xfe\xff", "UTF-16 text: save it as UTF-8"),
    (b"\xff\xfe", "UTF-16 text: save it as UTF-8"),
)


def looks_like(head: bytes) -> str | None:
    """Return the kind of a file by its first bytes, e.g. `a parquet file`; None if they do not tell."""
    if head and not head.strip(b"\0"):
        return "nothing but zeros: the download went wrong"
    for magic, kind in _KINDS:
        if head.startswith(magic):
            return kind
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        return "an AVIF image" if brand in (b"avif", b"avis") else "a HEIC image or a video"
    if head[:4] == b"RIFF" and head[8:12] != b"WEBP":
        return "a RIFF file (sound or video)"
    if head[1:2] == b"\0" or (head[:1] == b"\0" and head[1:2]):
        return "UTF-16 text: save it as UTF-8" if head[:1] in b"[{\0" else None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page: the download went wrong"
    if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text):
        return "an SVG drawing"
    return "an XML or HTML page" if text.startswith((b"<?xml", b"<!")) else None

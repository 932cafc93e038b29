"""Looks at image files before a training run starts. Imports no torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, UnidentifiedImageError

CHECK_THREADS = 8


def image_faults(paths: Iterable[str]) -> dict[str, str]:
    """What is wrong with each image that cannot be used: path to reason.

    Every file's header is read and its structure verified, its pixels are not decoded. An image so large that PIL
    warns of a decompression bomb is a fault.
    """
    wanted = list(dict.fromkeys(paths))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ThreadPoolExecutor(max_workers=CHECK_THREADS) as pool:
            found = pool.map(_fault, wanted, chunksize=64)
            return {path: fault for path, fault in zip(wanted, found, strict=True) if fault is not None}


def _fault(path: str) -> str | None:
    limit = Image.MAX_IMAGE_PIXELS
    try:
        if os.path.isdir(path):
            return "is a folder, not an image"
        with Image.open(path) as image:
            if limit is not None and image.width * image.height > limit:
                return f"has {image.width}x{image.height} pixels, more than {limit}: taken for a decompression bomb"
            image.verify()
    except FileNotFoundError:
        return "is missing"
    except Image.DecompressionBombError as error:
        return f"is too large: {error}"
    except UnidentifiedImageError:
        return "is not an image, or is damaged" if os.path.getsize(path) else "is empty"
    except PermissionError:
        return "may not be read"
    # PIL's decoders raise whatever they stumble over in a damaged file.
    except Exception as error:
        return f"is damaged: {error}"
    return None

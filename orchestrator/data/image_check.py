"""Looks at image files before a training run starts. Imports no torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from orchestrator.data.open_image import BadImage, verify_image
from orchestrator.data.rows import AS_IT_IS, ImageReading
from orchestrator.errors import DataError

CHECK_THREADS = 8


def image_faults(paths: Iterable[str], reading: ImageReading = AS_IT_IS) -> dict[str, str]:
    """What is wrong with each image that cannot be used: path to reason.

    Every file is read and decoded to its end, as training will.

    Args:
        paths: Image files; one given twice is looked at once.
        reading: How the data set reads them.

    Raises:
        DataError: the storage fails or refuses; that says nothing of the images, and another attempt may succeed.
    """
    wanted = list(dict.fromkeys(paths))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ThreadPoolExecutor(max_workers=CHECK_THREADS) as pool:
            found = pool.map(lambda path: _fault(path, reading), wanted)
            return {path: fault for path, fault in zip(wanted, found, strict=True) if fault is not None}


def _fault(path: str, reading: ImageReading) -> str | None:
    try:
        verify_image(path, reading)
    except BadImage as error:
        return str(error)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return None

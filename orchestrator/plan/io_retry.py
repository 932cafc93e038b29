"""Retries of reads from a file system: errors that may pass are tried again, and no error counts as an absent file."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import TypeVar

ABSENT = (FileNotFoundError, NotADirectoryError)
"""All that says that nothing is there; any other error says nothing."""
# A stale handle, an answer of a server or a disk that was lost, a moment without memory.
_PASSING = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ENOMEM, errno.ENOBUFS}
_PAUSES_SECONDS = (0.02, 0.2, 1.0)
_T = TypeVar("_T")


def retry_io(look: Callable[[], _T]) -> _T:
    """Call a read again, a few times, after errors that may pass.

    Raises:
        OSError: the error did not pass, or is of another kind.
    """
    for pause in _PAUSES_SECONDS:
        try:
            return look()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            time.sleep(pause)
    return look()


def stat_or_none(path: str | os.PathLike[str]) -> os.stat_result | None:
    """Return what a path leads to; None where nothing is there.

    Raises:
        OSError: it cannot be asked.
    """
    try:
        return os.stat(path)  # a plan of 10,000 cells asks 200,000 times for what is not there
    except ABSENT:
        return None
    except OSError:
        pass
    try:
        return retry_io(lambda: os.stat(path))
    except ABSENT:
        return None

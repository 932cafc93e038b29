"""Sends what DeepSpeed, transformers and torch say during a stage run to its log file, away from the terminal."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if "DS_ACCELERATOR" not in os.environ:
    import torch

    if not torch.cuda.is_available():
        # Without it DeepSpeed prints that it detected the CPU.
        os.environ["DS_ACCELERATOR"] = "cpu"

LOGGER = logging.getLogger("llavolta.training")
LOGGER.setLevel(logging.INFO)
_LOGGERS = (LOGGER.name, "DeepSpeed", "transformers", "deepspeed", "torch.distributed")
_KNOWN_NOISE = (
    # torch 2.13 tells DeepSpeed's collectives on every rank and path.
    r".*_all_gather_base.*|.*all_gather_into_tensor.*|.*_reduce_scatter_base.*|.*reduce_scatter_tensor.*",
)


@contextmanager
def stage_log(path: Path) -> Iterator[None]:
    """Everything logged inside goes to `path`, appended; handlers are put back afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    before = []
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        before.append((logger, logger.handlers[:], logger.propagate))
        logger.handlers, logger.propagate = [handler], False
    with warnings.catch_warnings():
        for message in _KNOWN_NOISE:
            warnings.filterwarnings("ignore", message=message, category=FutureWarning)
        try:
            yield
        finally:
            for logger, handlers, propagate in before:
                logger.handlers, logger.propagate = handlers, propagate
            handler.close()

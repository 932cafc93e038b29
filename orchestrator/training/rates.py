"""Learning rate as a pure function of the optimizer step, as in transformers' schedulers."""

from __future__ import annotations

import math


def rate_factor(kind: str, step: int, total_steps: int, warmup_ratio: float) -> float:
    """Factor on a group's learning rate in one optimizer step.

    Linear warm-up over `ceil(warmup_ratio * total_steps)` steps (the first has factor 0, as in transformers), then
    cosine or linear decay to 0 at `total_steps`, or constant.

    Args:
        kind: `cosine`, `linear` or `constant`.
        step: 0-based step of the phase.
        total_steps: Steps of the whole phase.
        warmup_ratio: Share of the phase that warms up.
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return step / warmup_steps
    if kind == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "linear":
        return max(0.0, 1.0 - progress)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))

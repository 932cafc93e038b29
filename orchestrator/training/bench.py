"""Time the forward and backward pass of one micro-batch under each variant on this machine, arms interleaved."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.compression import attach
from orchestrator.data.processing.encode import IGNORED_LABEL
from orchestrator.errors import UsageError
from orchestrator.models.build import compute_dtype, model_from_config
from orchestrator.models.parts import COMPRESSOR, set_trainable
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.model_facts import ModelFacts
from orchestrator.spec.phase import PhaseSpec
from orchestrator.training.metrics_log import reset_peak_memory, resident_peak_bytes

MIN_REPEATS = 7


@dataclass(frozen=True)
class Arm:
    """One arm of the comparison.

    Attributes:
        name: The variant's name.
        points: Its points; empty for full tokens; None for the plain transformers model without an attachment.
    """

    name: str
    points: tuple[dict[str, Any], ...] | None


@dataclass
class Timing:
    """Time and memory of an arm.

    Attributes:
        seconds: Wall-clock time of each forward and backward.
        peak_memory_gib: Largest GPU memory, or resident memory on the CPU, over its repeats.
    """

    seconds: list[float] = field(default_factory=list)
    peak_memory_gib: float = 0.0

    @property
    def median_seconds(self) -> float:
        """Median of the repeats."""
        return median(self.seconds)


def synthetic_batch(
    facts: ModelFacts, config: Any, rows: int, text_tokens: int, device: torch.device
) -> dict[str, Any]:
    """Return rows of one image and then `text_tokens` labelled text tokens, drawn at random."""
    vision = config.vision_config
    size = vision.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    visual = facts.image_grid.tokens
    generator = torch.Generator().manual_seed(0)
    image_token = int(config.image_token_id)
    other_token = 0 if image_token else 1
    text_BT = torch.randint(0, facts.vocab_size, (rows, text_tokens), generator=generator)
    text_BT = text_BT.masked_fill(text_BT == image_token, other_token)
    input_ids = torch.cat([torch.full((rows, visual), image_token), text_BT], dim=1)
    batch: dict[str, Tensor] = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.cat([torch.full((rows, visual), IGNORED_LABEL), text_BT], dim=1),
        "pixel_values": torch.randn(rows, vision.num_channels, int(height), int(width), generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def measure(
    model_spec: ModelSpec,
    recipe: PhaseSpec,
    facts: ModelFacts,
    arms: Sequence[Arm],
    *,
    rows: int,
    text_tokens: int,
    repeats: int,
    on_round: Callable[[int], None] = lambda number: None,
) -> dict[str, Timing]:
    """Time every arm once in each of `repeats` rounds, in another order each round, after a warm-up round.

    A step is the forward and backward pass of one micro-batch of a randomly initialised model under the phase's
    recipe (what trains, checkpointing, dtype); optimizer, communication and data loading are excluded.

    Args:
        model_spec: The model.
        recipe: The phase.
        facts: The model's facts.
        arms: The arms to time.
        rows: Samples of the micro-batch, one image each.
        text_tokens: Text tokens of a sample, all labelled.
        repeats: Rounds, at least 7.
        on_round: Called before each round with its number, 0 for the warm-up.

    Returns:
        Timings by the arms' names.

    Raises:
        UsageError: too few repeats, or the model cannot be built.
    """
    if repeats < MIN_REPEATS:
        raise UsageError(f"bench: {repeats} repeats are too few for a median; give at least {MIN_REPEATS}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(model_spec, recipe, device)
    batch = synthetic_batch(facts, model.config, rows, text_tokens, device)
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    timings = {arm.name: Timing() for arm in arms}
    for number in range(repeats + 1):
        on_round(number)
        # Another order each round: the state an arm leaves the allocator in costs the next one time.
        for arm in random.Random(number).sample(list(arms), len(arms)):
            seconds, peak_gib = _step(model, arm, batch, device)
            if number:
                timings[arm.name].seconds.append(seconds)
                timings[arm.name].peak_memory_gib = max(timings[arm.name].peak_memory_gib, peak_gib)
    return timings


def _model(model_spec: ModelSpec, recipe: PhaseSpec, device: torch.device) -> Any:
    """Return the model with random weights, set up as the phase trains it."""
    torch.manual_seed(0)
    model: Any = model_from_config(model_spec).to(device, getattr(torch, compute_dtype(model_spec))).train()
    parts = [part for part in recipe.train if part != COMPRESSOR]  # learned modules come with their points
    if parts:
        set_trainable(model, parts, lora=False)
    else:
        model.requires_grad_(False)
    if recipe.gradient_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


def _step(model: nn.Module, arm: Arm, batch: dict[str, Any], device: torch.device) -> tuple[float, float]:
    attachment = None if arm.points is None else attach(model, list(arm.points))
    try:
        model.zero_grad(set_to_none=True)
        _wait(device)
        reset_peak_memory()
        start = time.perf_counter()
        model(**batch, use_cache=False).loss.backward()
        _wait(device)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_peak_bytes()
        return seconds, peak / 2**30
    finally:
        if attachment is not None:
            attachment.detach()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()

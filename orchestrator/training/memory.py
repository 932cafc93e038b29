"""What a worker keeps between stage runs: the engine of the last one, so that a child goes on without loading."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

import torch

from orchestrator.training.dropout import Draws


@dataclass
class Session:
    """A model under training.

    Attributes:
        engine: DeepSpeed engine; `engine.module` is the Hugging Face model.
        attachment: Compressor attachment of the model.
        learned: Its learned compressors, which no engine knows.
        base_rates: Learning rate of each optimizer group before the schedule's factor.
        key: Settings an engine cannot change: a child with others needs a new engine.
        config: DeepSpeed configuration.
        micro_batch_size: Samples of one forward the engine was opened with.
        micro_batches: Samples of one forward by what a step does, in the present stage run; None before the first.
        compute_dtype: Type the model computes in.
        points: Points in force; None where they are not known.
        draws: What its dropout draws from.
        phase_start: State the phase started from: its weights are what does not train, unrounded.
    """

    engine: Any
    attachment: Any
    learned: Any
    base_rates: list[float]
    key: str
    config: dict[str, Any]
    micro_batch_size: int
    compute_dtype: torch.dtype
    points: tuple[dict[str, Any], ...] | None
    draws: Draws
    micro_batches: Any = None
    phase_start: str | None = None


@dataclass
class TrainingMemory:
    """The last state a worker trained, still in memory, and the data it read.

    Attributes:
        state: Id of the state the session holds; None while a stage run is under way or after it failed.
        allowed_bytes: What activations may take where `per_device_train_batch_size` is `auto`; None asks the machine.
    """

    state: str | None = None
    session: Session | None = None
    allowed_bytes: int | None = None
    _data: dict[str, Any] = field(default_factory=dict)

    def holds(self, state: str, key: str) -> bool:
        """Return whether the session is exactly this state under these settings."""
        return self.session is not None and self.state == state and self.session.key == key

    def model_of(self, state: str) -> Any | None:
        """Return the model of a state (for an evaluation), or None when it is not in memory."""
        return self.session.engine.module if self.session is not None and self.state == state else None

    def data(self, key: str, build: Any) -> Any:
        """Return the training data built once per key; only the last key's stays."""
        if key not in self._data:
            self._data = {key: build()}
        return self._data[key]

    def release(self) -> None:
        """Give the engine's memory back."""
        session, self.session, self.state = self.session, None, None
        if session is None:
            return
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        session.attachment.detach()
        session.engine.destroy()
        unset_hf_deepspeed_config()
        del session
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

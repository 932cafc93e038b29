"""`phases:`, how each training phase is run: what trains, for how long, how fast, in which batches."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from orchestrator.errors import LlavoltaError
from orchestrator.spec.base import Count, Flag, Integer, NonNegative, Positive, Spec, parse_share
from orchestrator.spec.components import DataSpec, Schedule


def rows_per_epoch(sets: Sequence[tuple[int, float]]) -> int:
    """Return rows of one epoch of a mixture of (rows, share): whole rows of each share, at least one of each set."""
    return sum(max(1, int(rows * parse_share(share))) for rows, share in sets)


def epoch_steps(rows: int, epochs: float, global_batch_size: int) -> int:
    """Return the optimizer steps of `epochs` passes, rounded up as Hugging Face's Trainer does, so that every row is
    seen.

    Epochs follow each other without a gap; the last batch is filled from the next pass: 665,298 rows in batches of
    128 give 5,198 steps, the number LLaVolta's authors ran.
    """
    return max(1, ceil(rows * Fraction(repr(epochs)) / global_batch_size))


def known_steps(phase: PhaseSpec, data: dict[str, Any] | None) -> int | None:
    """Return the steps of a phase; None where they depend on a file that would have to be read, or on a cost."""
    if phase.match_train_tflops is not None:
        return None
    if phase.max_steps is not None:
        return phase.max_steps
    if phase.num_train_epochs is None or not data:
        return None
    shares = {phase.data: 1.0} if isinstance(phase.data, str) else phase.data
    sets = []
    for name, share in shares.items():
        rows = _free_rows(data.get(name))
        if rows is None:
            return None
        sets.append((rows, share))
    return epoch_steps(rows_per_epoch(sets), phase.num_train_epochs, phase.global_batch_size)


def _free_rows(entry: Any) -> int | None:
    if not isinstance(entry, DataSpec) or (entry.path_fields and getattr(entry, "num_samples", None) is None):
        return None
    try:
        return entry.num_rows()
    except (LlavoltaError, OSError, ValueError):
        return None  # told by the data's own check, which names rows and files


PHASES = ("pretrain", "finetune")
Part = Literal["vision_tower", "projector", "language_model", "compressor"]


class LoraSpec(Spec):
    """LoRA on the language model's linear layers, through peft."""

    aliases: ClassVar[dict[str, str]] = {
        "lora_r": "r",
        "lora_rank": "r",
        "rank": "r",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "lora_target": "target_modules",
        "lora_target_modules": "target_modules",
    }

    r: Count = 128
    alpha: Count = 256
    dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.05
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


class StartFromSpec(Spec):
    """Weights a phase starts from: those of another experiment's cell, or a folder's; whole, or some parts of them.

    Attributes:
        spec: The other experiment's file.
        cell: Its cell, as `--cell` takes it.
        phase: The phase after which the cell's weights are taken.
        path: A folder, in the place of `spec`: a Hugging Face model, or `model.safetensors` as the ledger keeps it.
        parts: What comes from there; the rest is what the phase would start from otherwise. None takes all.
    """

    spec: str | None = None
    cell: str | None = None
    phase: Literal["pretrain", "finetune"] = "pretrain"
    path: str | None = None
    parts: tuple[Part, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> StartFromSpec:
        if (self.spec is None) == (self.path is None):
            raise ValueError("give `spec` and `cell` (another experiment's cell), or `path` (a folder)")
        if (self.spec is None) != (self.cell is None):
            raise ValueError("`spec` and `cell` belong together: a cell by its name, an id's beginning, or axis=value")
        if self.path is not None and self.phase != "pretrain":
            raise ValueError("`phase` is for a cell; a folder holds one state")
        if self.parts is not None and (not self.parts or len(set(self.parts)) < len(self.parts)):
            raise ValueError("`parts` names at least one part, each once; leave it out for the whole model")
        return self


class PhaseSpec(Spec):
    """One training phase.

    Attributes:
        data: Name of a data set, or names with the share of each set per epoch.
        train: Parts that train; the others are frozen.
        schedule: A schedule's name, a variant's name (constant), `full`, or an inline mapping.
        start_from: Weights to start from in the place of the phase before or the initial ones: a folder, or a mapping.
        seed: Data order, dropout and random methods; None takes the top-level seed.
        global_batch_size: Samples per optimizer step; accumulation is derived from it.
        per_device_train_batch_size: Micro-batch of one worker; fingerprint, not identity. `auto`: the largest that
            fits, for each variant of a stage on its own, so that compressed stages take fewer accumulation steps.
        model_max_length: Longest sample in tokens, counted before compression.
        deepspeed: `zero0` to `zero3`, `zero2_offload`, `zero3_offload`, a path, or an inline mapping.
    """

    aliases: ClassVar[dict[str, str]] = {
        "lr": "learning_rate",
        "epochs": "num_train_epochs",
        "num_epochs": "num_train_epochs",
        "batch_size": "global_batch_size",
        "train_batch_size": "global_batch_size",
        "micro_batch_size": "per_device_train_batch_size",
        "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
        "lr_scheduler": "lr_scheduler_type",
        "warmup": "warmup_ratio",
        "gradient_clipping": "max_grad_norm",
        "max_norm": "max_grad_norm",
        "max_length": "model_max_length",
        "cutoff_len": "model_max_length",
        "sequence_len": "model_max_length",
        "group_by_length": "group_by_modality_length",
        "activation_checkpointing": "gradient_checkpointing",
    }
    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"per_device_train_batch_size", "deepspeed", "gradient_checkpointing"}
    )

    data: str | dict[str, Positive]
    train: tuple[Part, ...] = ("projector", "language_model")
    lora: LoraSpec | None = None
    schedule: str | Schedule = "full"
    start_from: str | StartFromSpec | None = None
    seed: Integer | None = None
    max_steps: Count | None = None
    num_train_epochs: Positive | None = None
    max_train_tflops: Positive | None = None
    match_train_tflops: str | None = None
    global_batch_size: Count = 128
    per_device_train_batch_size: Count | Literal["auto"] = 16
    learning_rate: Positive | dict[Part, NonNegative] = 2.0e-5
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.03
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = 1.0
    model_max_length: Count = 2048
    group_by_modality_length: Flag = True
    gradient_checkpointing: Flag = False
    deepspeed: str | dict[str, Any] = "zero2"

    @property
    def start(self) -> StartFromSpec | None:
        """`start_from` as a mapping: a plain text is a folder."""
        return StartFromSpec(path=self.start_from) if isinstance(self.start_from, str) else self.start_from


class PhasesSpec(Spec):
    """The phases in their order; either may be absent."""

    pretrain: PhaseSpec | None = None
    finetune: PhaseSpec | None = None

"""`phases:`, how each training phase runs: what trains, for how long, at which rate, in which batches."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from orchestrator.errors import LlavoltaError
from orchestrator.spec.base import Count, Flag, Integer, NonNegative, Positive, Spec, parse_share
from orchestrator.spec.components import DataSpec, Schedule

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
    """Rank of the adapters."""
    alpha: Count = 256
    """Scale of the adapters: their output is multiplied by `alpha / r`."""
    dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.05
    """Share of an adapter's inputs that is zeroed in training, drawn sample by sample."""
    target_modules: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Linear layers that get an adapter, by the last part of their names; matched inside the language model only."""


class StartFromSpec(Spec):
    """Weights a phase starts from: those of another experiment's cell, or a folder's; all of them, or some parts."""

    spec: str | None = Field(default=None, examples=["pretrain.yaml"])
    """The other experiment's file. Goes with `cell`; null where `path` is given."""
    cell: str | None = Field(default=None, examples=["seed=0"])
    """Cell of the other experiment: its name, an id's unique beginning, or `axis=value`."""
    phase: Literal["pretrain", "finetune"] = "pretrain"
    """Phase of that cell after which its weights are taken."""
    path: str | None = Field(default=None, examples=["checkpoints/llava-1.5-7b-hf"])
    """A folder instead of `spec`: a Hugging Face model, or `model.safetensors` as the ledger keeps it."""
    parts: tuple[Part, ...] | None = Field(default=None, examples=[["projector"]])
    """Parts taken from there; the others are what the phase would start from otherwise. null takes all parts."""

    @model_validator(mode="after")
    def _check(self) -> StartFromSpec:
        if (self.spec is None) == (self.path is None):
            raise ValueError("give `spec` and `cell` (another experiment's cell), or `path` (a folder)")
        if (self.spec is None) != (self.cell is None):
            raise ValueError("`spec` and `cell` belong together: a cell by its name, an id's beginning, or axis=value")
        if self.path is not None and self.phase != "pretrain":
            raise ValueError("`phase` is for a cell; a folder holds one state")
        if self.parts is not None and (not self.parts or len(set(self.parts)) < len(self.parts)):
            raise ValueError("`parts` names at least one part, each once; leave it out for the complete model")
        return self


class PhaseSpec(Spec):
    """One training phase: its data, what trains, the schedule of compression, its length and its optimizer."""

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

    data: str | dict[str, Positive] = Field(examples=["train", {"mix665k": 1.0, "mine": 0.3}])
    """Data set to train on, by its name under `data`; or several, each with the share of it used per epoch."""
    train: tuple[Part, ...] = Field(default=("projector", "language_model"), examples=[["projector"]])
    """Parts that train; the others are frozen. `compressor` stands for learned compressors."""
    lora: LoraSpec | None = Field(default=None, examples=[{"r": 128, "alpha": 256}])
    """LoRA adapters in the language model, trained in place of its own weights; null trains the weights themselves."""
    schedule: str | Schedule = Field(
        default="full", examples=["four_stage", {"kind": "constant", "compressor": "heavy"}]
    )
    """How the phase is compressed over time: a name under `schedules`, a name under `compressors` (that variant all
    along), `full` (no compression), or a schedule written in place.
    """
    start_from: str | StartFromSpec | None = Field(
        default=None, examples=[{"spec": "pretrain.yaml", "cell": "seed=0", "parts": ["projector"]}]
    )
    """Weights to start from: a folder, or another experiment's cell. null continues from the phase before, or from
    `model.weights`.
    """
    seed: Integer | None = None
    """Seed of the phase's data order, dropout and random methods. null takes the top-level `seed`; a fixed number
    keeps a seed axis from repeating this phase.
    """
    max_steps: Count | None = Field(default=None, examples=[5198])
    """Length of the phase in optimizer steps. A phase has exactly one length."""
    num_train_epochs: Positive | None = Field(default=None, examples=[1.0])
    """Length of the phase in passes over its data; the last batch is filled from the next pass."""
    max_train_tflops: Positive | None = Field(default=None, examples=[500.0])
    """Length of the phase as a budget: the most steps whose training cost stays within it, in 10^12 operations."""
    match_train_tflops: str | None = Field(default=None, examples=["full"])
    """Length of the phase as the cost of another schedule: as many steps as cost what that schedule (or variant) costs
    over `max_steps` or `num_train_epochs`, one epoch where neither is given.
    """
    global_batch_size: Count = 128
    """Samples of one optimizer step over all workers; gradient accumulation is derived from it."""
    per_device_train_batch_size: Count | Literal["auto"] = 16
    """Samples of one worker's micro-batch; it changes no result. `auto` finds the largest that fits, for each variant
    of the schedule, so that compressed stages take fewer accumulation steps.
    """
    learning_rate: Positive | dict[Part, NonNegative] = Field(
        default=2.0e-5, examples=[{"projector": 1e-3, "language_model": 2e-5}]
    )
    """Peak learning rate of AdamW, for all parts that train or by part."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up: `cosine` and `linear` fall to 0 at the end of the phase."""
    warmup_ratio: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.03
    """Share of the phase's steps over which the learning rate rises from 0 to its peak."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of AdamW; not applied to biases and norms."""
    max_grad_norm: NonNegative = 1.0
    """Norm to which the gradient over all parameters is clipped; 0 turns clipping off."""
    model_max_length: Count = 2048
    """Longest sample in tokens, counted before compression; a longer one is cut at its end."""
    group_by_modality_length: Flag = True
    """Whether a batch holds either samples with images or samples without, its longest first, as LLaVA does."""
    gradient_checkpointing: Flag = False
    """Whether activations are computed again in the backward pass, which saves memory and costs time."""
    deepspeed: str | dict[str, Any] = Field(default="zero2", examples=["zero3_offload", "ds_config.json"])
    """DeepSpeed's memory partitioning: `zero0`, `zero1`, `zero2`, `zero3`, `zero2_offload`, `zero3_offload`, the path
    of a DeepSpeed configuration in JSON, or one written in place. It changes no result.
    """

    @property
    def start(self) -> StartFromSpec | None:
        """`start_from` as a mapping: a plain text is a folder."""
        return StartFromSpec(path=self.start_from) if isinstance(self.start_from, str) else self.start_from


class PhasesSpec(Spec):
    """The phases in their order; either may be absent."""

    pretrain: PhaseSpec | None = None
    """First phase; in LLaVA's recipe the projector is trained on captions. null leaves it out."""
    finetune: PhaseSpec | None = None
    """Second phase; in LLaVA's recipe visual instruction tuning. null leaves it out."""

    @property
    def by_name(self) -> dict[str, PhaseSpec]:
        """The phases that are given, in their order."""
        return {name: phase for name in PHASES if (phase := getattr(self, name)) is not None}


def rows_per_epoch(sets: Sequence[tuple[int, float]]) -> int:
    """Return the rows of one epoch of a mixture of (rows, share): full rows of each share, at least one a set."""
    return sum(max(1, int(rows * parse_share(share))) for rows, share in sets)


def epoch_steps(rows: int, epochs: float, global_batch_size: int) -> int:
    """Return the optimizer steps of `epochs` passes, rounded up as Hugging Face's Trainer does: every row is seen.

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
        return None  # reported by the data's own check, which names rows and files

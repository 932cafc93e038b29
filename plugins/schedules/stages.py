"""`stages`: a phase cut into stages, each under its own variant (LLaVolta section 3.3)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

from orchestrator_plugins.schedules.ramp import Value, check_movement, movement
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from orchestrator import plugin


class AnnealSpec(plugin.Spec):
    """The amount of a stage's variant goes from `start` to `end` in moves over equal stretches of the stage.

    `cubic` is gradual pruning (Zhu and Gupta, arXiv 1710.01878, section 3): after the share u of the way the amount is
    `end + (start - end) (1 - u)^3`, so that most tokens go early, where many are redundant; `linear` is EPIC's token
    consistency (arXiv 2510.00515).
    """

    key: Literal["keep_ratio", "keep_tokens", "stride"]
    """Amount that moves; it takes the place of the variant's own."""
    start: Value = Field(examples=[1])
    """Amount at the beginning of the stage."""
    end: Value = Field(examples=["1/4"])
    """Amount at its end."""
    moves: plugin.Count = 10
    """Number of values; values that round to the same whole number count once."""
    shape: Literal["linear", "cubic"] = "linear"
    """How the amount moves."""

    @model_validator(mode="after")
    def _moves_somewhere(self) -> AnnealSpec:
        check_movement(self.key, self.start, self.end, self.moves)
        return self

    def progress(self, part: Fraction) -> Fraction:
        """Return the share of the way from start to end after a share of the moves."""
        return part if self.shape == "linear" else 1 - (1 - part) ** 3


class StageSpec(plugin.Spec):
    """One stage: its length and its variant. A stage without a length takes what the others leave."""

    share: plugin.Share | None = Field(default=None, examples=["1/4"])
    """Length of the stage as a share of the phase. A stage has at most one length."""
    steps: plugin.Count | None = None
    """Length of the stage in optimizer steps."""
    samples: plugin.Count | None = None
    """Length of the stage in samples."""
    compressor: str = Field(default="full", examples=["heavy"])
    """Variant of the stage; `full` is no compression."""
    anneal: AnnealSpec | None = None
    """How the variant's amount moves within the stage; null keeps it. The stage is one stage run."""

    @model_validator(mode="after")
    def _one_length(self) -> StageSpec:
        if sum(value is not None for value in (self.share, self.steps, self.samples)) > 1:
            raise PydanticCustomError("stage_length", "a stage's length is one of share, steps, samples")
        if self.anneal is not None and self.compressor == "full":
            raise PydanticCustomError("stage_anneal", "full has no amount that could move; name a variant")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What it was before there was `anneal`, so that experiments without it keep their digests.
        return {name: value for name, value in dump(self).items() if name != "anneal" or value is not None}

    @property
    def is_rest(self) -> bool:
        """True where the stage takes what the others leave."""
        return self.share is None and self.steps is None and self.samples is None


class StagesSpec(plugin.ScheduleSpec):
    """Stages in order; boundaries are exact sums of shares, rounded once, so that no step is lost or doubled.

    With `anneal` the amount of a stage's variant moves within it; the model is tested under the last one's end.
    """

    kind: Literal["stages"] = "stages"
    stages: tuple[StageSpec, ...] = Field(
        min_length=1, examples=[[{"share": "1/4", "compressor": "heavy"}, {"share": "1/4", "compressor": "wide"}, {}]]
    )
    """Stages in order; one of them may omit its length and takes what the others leave."""

    @model_validator(mode="before")
    @classmethod
    def _empty_stage_is_rest(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("stages"), list):
            value = {**value, "stages": [{} if stage is None else stage for stage in value["stages"]]}
        return value

    @model_validator(mode="after")
    def _lengths_fit(self) -> StagesSpec:
        rests = sum(stage.is_rest for stage in self.stages)
        if rests > 1:
            raise PydanticCustomError("stages_rest", "at most one stage may omit its length and take the rest")
        shares = sum((stage.share for stage in self.stages if stage.share is not None), Fraction(0))
        if shares > 1 or (shares == 1 and len(self.stages) > sum(s.share is not None for s in self.stages)):
            raise PydanticCustomError(
                "stages_share",
                "the shares add up to {total}, which leaves nothing for the other stages",
                {"total": str(shares)},
            )
        if rests == 0 and shares < 1 and all(stage.share is not None for stage in self.stages):
            raise PydanticCustomError(
                "stages_gap",
                "the shares add up to {total}, which leaves a gap; let one stage omit its length",
                {"total": str(shares)},
            )
        return self

    def variants(self) -> tuple[str, ...]:
        """Return the variants in order of first use."""
        return tuple(dict.fromkeys(stage.compressor for stage in self.stages))

    def compile(self, total_steps: int, global_batch_size: int) -> plugin.StageTable:
        """Return the table; boundaries are the rounded cumulative sums of exact lengths.

        Raises:
            ValueError: a stage would hold no step, or the stages do not add up to the phase.
        """
        ends, position = [], Fraction(0)
        lengths = [self._length(stage, total_steps, global_batch_size) for stage in self.stages]
        rest = total_steps - sum(length for length in lengths if length is not None)
        if rest < 0:
            raise ValueError(f"the stages add up to {float(total_steps - rest):g} steps, the phase has {total_steps}")
        for length in lengths:
            position += rest if length is None else length
            # Halves round up: Python's own rounding to even would move a boundary with the phase's parity.
            ends.append(int(position + Fraction(1, 2)))
        if ends[-1] != total_steps:
            raise ValueError(f"the stages add up to {ends[-1]} steps, the phase has {total_steps}")
        actions: list[tuple[int, int, str]] = []
        derived: dict[str, tuple[str, dict[str, Any]]] = {}
        for number, (first, last, stage) in enumerate(zip([0, *ends], ends, self.stages, strict=False), 1):
            if last <= first:
                raise ValueError(
                    f"stage {number} ({stage.compressor}) never starts: it would run from {first} to {last}"
                )
            if (anneal := stage.anneal) is None:
                actions.append((first, last, stage.compressor))
                continue
            if min(anneal.moves, last - first) < 2:
                raise ValueError(f"stage {number} ({stage.compressor}) needs at least 2 steps for its amount to move")
            moves = (anneal.key, anneal.start, anneal.end, anneal.moves, first, last, anneal.progress)
            moved, names = movement(stage.compressor, *moves)
            actions += moved
            derived |= names
        stage_ends = tuple(ends) if derived else ()
        return plugin.StageTable(plugin.merge_actions(actions), actions[-1][2], stage_ends, derived)

    @staticmethod
    def _length(stage: StageSpec, total_steps: int, global_batch_size: int) -> Fraction | None:
        if stage.share is not None:
            return stage.share * total_steps
        if stage.samples is not None:
            return Fraction(stage.samples, global_batch_size)
        return None if stage.steps is None else Fraction(stage.steps)

"""`stages`: a phase cut into stages, each under its own variant (LLaVolta section 3.3)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from orchestrator import plugin


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

    @model_validator(mode="after")
    def _one_length(self) -> StageSpec:
        if sum(value is not None for value in (self.share, self.steps, self.samples)) > 1:
            raise PydanticCustomError("stage_length", "a stage's length is one of share, steps, samples")
        return self

    @property
    def is_rest(self) -> bool:
        """True where the stage takes what the others leave."""
        return self.share is None and self.steps is None and self.samples is None


class StagesSpec(plugin.ScheduleSpec):
    """Stages in order; boundaries are exact sums of shares, rounded once, so that no step is lost or doubled."""

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
        for number, (first, last, stage) in enumerate(zip([0, *ends], ends, self.stages, strict=False), 1):
            if last <= first:
                raise ValueError(
                    f"stage {number} ({stage.compressor}) never starts: it would run from {first} to {last}"
                )
            actions.append((first, last, stage.compressor))
        return plugin.StageTable(plugin.merge_actions(actions), self.stages[-1].compressor)

    @staticmethod
    def _length(stage: StageSpec, total_steps: int, global_batch_size: int) -> Fraction | None:
        if stage.share is not None:
            return stage.share * total_steps
        if stage.samples is not None:
            return Fraction(stage.samples, global_batch_size)
        return None if stage.steps is None else Fraction(stage.steps)

"""`constant`: one variant for the whole phase."""

from __future__ import annotations

from typing import Literal

from orchestrator.spec.components import ScheduleSpec, StageTable


class ConstantSpec(ScheduleSpec):
    """One variant, or `full`, throughout (LLaVolta, Table 5)."""

    kind: Literal["constant"] = "constant"
    compressor: str = "full"

    def variants(self) -> tuple[str, ...]:
        """Return the one variant."""
        return (self.compressor,)

    def compile(self, total_steps: int, global_batch_size: int) -> StageTable:
        """Return one action over all steps."""
        return StageTable(((0, total_steps, self.compressor),), self.compressor)

"""`constant`: one variant for the complete phase."""

from __future__ import annotations

from typing import Literal

from orchestrator import plugin


class ConstantSpec(plugin.ScheduleSpec):
    """One variant, or `full`, throughout (LLaVolta, Table 5)."""

    kind: Literal["constant"] = "constant"
    compressor: str = "full"
    """Variant of the whole phase; `full` is no compression."""

    def variants(self) -> tuple[str, ...]:
        """Return the one variant."""
        return (self.compressor,)

    def compile(self, total_steps: int, global_batch_size: int) -> plugin.StageTable:
        """Return one action over all steps."""
        return plugin.StageTable(((0, total_steps, self.compressor),), self.compressor)

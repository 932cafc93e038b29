"""VipLLaVA (`VipLlavaForConditionalGeneration`): LLaVA whose projector takes several layers of the vision tower."""

from __future__ import annotations

from orchestrator.compression.families.llava import LlavaFamily


class VipLlavaFamily(LlavaFamily):
    """Every image a fixed grid; the CLS token is always left out."""

    sized = False

    def keeps_cls(self) -> bool:
        """Never."""
        return False

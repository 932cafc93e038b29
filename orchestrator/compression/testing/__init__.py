"""The contract kit: what every compressor must hold on every model family, for authors inside and outside."""

from orchestrator.compression.testing.tiny import TinyFamily, pad_rows

__all__ = ["TinyFamily", "pad_rows"]

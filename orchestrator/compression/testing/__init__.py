"""The contract kit: what every compressor must hold on every model family, for authors inside and outside."""

from orchestrator.compression.testing.kit import Report, check_compressor
from orchestrator.compression.testing.tiny import TinyFamily, pad_rows

__all__ = ["Report", "TinyFamily", "check_compressor", "pad_rows"]

"""Visual-token compression inside unmodified Hugging Face models."""

from orchestrator.compression.attach import ALL_LEARNED_POINTS, Attachment, attach, attachment_of
from orchestrator.compression.protocol import Compressor, Context, Kept, take

__all__ = ["ALL_LEARNED_POINTS", "Attachment", "Compressor", "Context", "Kept", "attach", "attachment_of", "take"]

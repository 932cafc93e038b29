"""Load, freeze and save Hugging Face models."""

from orchestrator.models.build import build_model
from orchestrator.models.initial_weights import write_initial_weights

__all__ = ["build_model", "write_initial_weights"]

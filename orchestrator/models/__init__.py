"""Load, freeze, save and export Hugging Face models."""

import os

import torch

if not torch.cuda.is_available():
    # Before transformers imports DeepSpeed (through accelerate), which prints that it detected the CPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from orchestrator.models.build import build_model
from orchestrator.models.initial_weights import write_initial_weights

__all__ = ["build_model", "write_initial_weights"]

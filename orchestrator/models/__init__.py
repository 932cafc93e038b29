"""Load, freeze, save and export Hugging Face models."""

import os

import torch

if not torch.cuda.is_available():
    # Before transformers imports DeepSpeed (through accelerate), which prints that it detected the CPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

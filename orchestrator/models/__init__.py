"""Load, freeze and save Hugging Face models."""

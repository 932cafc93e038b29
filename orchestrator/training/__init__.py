"""One stage run on one worker, with DeepSpeed."""

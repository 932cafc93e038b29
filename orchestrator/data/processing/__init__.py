"""Turn rows into what a model takes: text, tokens, image tensors, batches."""

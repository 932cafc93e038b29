"""The forward pass of a model with compressors: the top model, its decoder in segments, the cache, the projector."""

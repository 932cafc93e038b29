"""Contract kits: what every schedule, data kind and evaluation must hold, for authors inside and outside.

The kit of compressors is `orchestrator.compression.testing`; `orchestrator.plugin` offers all four.
"""

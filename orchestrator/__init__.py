"""LLaVolta orchestrator: declarative experiments on stage-wise visual-token compression.

Imports go one way, from the top of this list to its end:
cli > run > report > dispatch > training, evaluation, tracking > models > data > compression > plan > spec
> registry > errors.
"""

__version__ = "0.1.0"

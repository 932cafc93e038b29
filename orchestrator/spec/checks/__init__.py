"""Checks across the keys of an experiment, which no single model can make."""

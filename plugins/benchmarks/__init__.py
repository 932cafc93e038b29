"""Benchmarks of lmms-eval on a cell, through its own evaluator; an exported folder as one of its models."""

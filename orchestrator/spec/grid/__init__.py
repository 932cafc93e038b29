"""The grid of an experiment: its axes, its cells and their names."""

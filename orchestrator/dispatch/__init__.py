"""Stage runs on Ray: the conductor and its lanes."""

"""Lanes on Ray: their driver, their workers, and what is private to Ray."""

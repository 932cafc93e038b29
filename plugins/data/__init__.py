"""Data kinds."""

"""Cells as MLflow runs."""

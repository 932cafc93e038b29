"""Schedules: how a phase is divided into stages."""

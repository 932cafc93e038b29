"""A model that says what a test wants: scores of scripted answers, by the evaluation's own `run`."""

from __future__ import annotations

from typing import Any

from orchestrator import plugin
from orchestrator.evaluation.protocol import EvaluationData, Workers
from orchestrator.registry import load_object


def row(index: int, answer: str, *, images: tuple[str, ...] = ("a.png",), kind: str | None = None, **columns: Any):
    """A row of one question."""
    turns = (plugin.Turn("user", f"{plugin.IMAGE_MARK}\n" * len(images) + "what?"), plugin.Turn("assistant", answer))
    return plugin.Row(index, tuple(map(plugin.ImageRef, images)), turns, kind, columns)


def outcome(monkeypatch, spec, rows, answers, trial=False):
    """What an evaluation finds of a model with these answers, whatever is asked."""
    said = {one.index: answer for one, answer in zip(rows, answers, strict=True)}
    monkeypatch.setattr(plugin, "greedy_answers", lambda _, mine, *__: [said[one.index] for one in mine])
    data = EvaluationData(rows, None, None, trial=trial)
    return load_object(spec.implementation)(spec).run(None, data, Workers())

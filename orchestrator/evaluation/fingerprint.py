"""What may change an evaluation's score beside the state it tests: kept with its result, flagged where it differs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from orchestrator import registry
from orchestrator.data.rows import data_spec, template_of
from orchestrator.evaluation.protocol import EvaluationData, Workers
from orchestrator.machine import device_name
from orchestrator.plan.cells.identity_fields import data_digest, processor_identity
from orchestrator.plan.identity import digest
from orchestrator.plan.jobs import EvaluationJob
from orchestrator.spec.model import ModelSpec

_DIGITS = 12
_BESIDE = frozenset({"kind", "data", "under", "model_max_length", "at", "cells"})


def fingerprint(job: EvaluationJob, data: EvaluationData, model: Any, workers: Workers) -> dict[str, Any]:
    """Return how an evaluation was done; contents as the first digits of a SHA-256.

    Where two cells of a table differ in a part, it says so. Of an evaluation by another toolkit, `Outcome.fingerprint`
    replaces what is another there.

    Args:
        job: The evaluation.
        data: Its rows and processor.
        model: The model, as it is tested.
        workers: The ranks that share it.
    """
    spec = registry.spec_class(registry.EVALUATIONS, job.spec["kind"]).model_validate(job.spec)
    rows, parameter = data_spec(job.data) if job.data else None, next(model.parameters())
    # One that brings its own data says itself how prompts are made of it.
    template = template_of(rows) if rows is not None else getattr(spec, "conversation_template", None)
    settings = spec.model_dump(mode="json", exclude=_BESIDE | spec.not_identity)
    return {
        "toolkit": f"llavolta {version('llavolta-orchestrator')}",
        "task": f"{spec.kind} {spec.version}",
        "settings": settings,
        "batch_size": getattr(spec, "batch_size", None),
        **({} if rows is None else {"data": data_digest(rows, job.content, job.left_out)[:_DIGITS]}),
        "prompt": _prompt(template or "chat_template", data),
        "model_max_length": job.model_max_length,
        "processor": digest(processor_identity(ModelSpec.model_validate(job.model)))[:_DIGITS],
        "compressor": " + ".join(map(_point, job.points)) or "none",
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "attn_implementation": job.model.get("attn_implementation"),
        "world_size": workers.count,
        "threads": torch.get_num_threads(),
        "device": device_name(parameter.device),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def _prompt(template: str, data: EvaluationData) -> str:
    """Return a template's name; of the model's own its content too."""
    if template != "chat_template":
        return template
    processor = data.processor
    own = getattr(processor.processor, "chat_template", None) or processor.tokenizer.chat_template
    return f"{template} {digest(own)[:_DIGITS]}" if own else template


def _point(point: Mapping[str, Any]) -> str:
    """Return a point in words: kind and version of the method, then its fields."""
    kind = point["kind"]
    fields = [f"{name} {value}" for name, value in point.items() if name != "kind" and value is not None]
    return f"{kind} {registry.spec_class(registry.COMPRESSORS, kind).version} ({', '.join(fields)})"

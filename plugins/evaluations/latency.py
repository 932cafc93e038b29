"""`latency`: time to the first token, tokens a second after it, bytes of the KV cache and peak memory, here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator import plugin

_MEDIANS = ("prefill_milliseconds", "decode_tokens_per_second")
_EXACT = ("kv_cache_bytes", "peak_memory_gib")


class LatencySpec(plugin.EvaluationSpec):
    """What answering one batch of prompts takes on the device that evaluates, under each variant.

    The prompts are the `batch_size` rows of middle length (in words) among those with an image, the same for every
    variant; their pictures are read before the clock starts. `new_tokens` are generated greedily, whatever would end an
    answer.

    `prefill_milliseconds` is the time from the call of `generate` until the logits of the first new token are there,
    the vision tower included; `decode_tokens_per_second` is of all rows of the batch together, from there to the last
    token. Both are medians over the repeats, with the distance between the quartiles as `NAME_iqr`. `kv_cache_bytes` is
    the size of all tensors in the KV cache after the prompt: exact, of the whole batch, padding included.
    `peak_memory_gib` is the most that torch held at once, weights included, in one more pass that is not timed: on a
    GPU its allocator's count, on the CPU the weights and the largest sum of what its allocator gave and took back, not
    the process's resident memory.

    Times are worth something on a machine that does nothing else. Where other processes took a part of it meanwhile,
    the result says so, and the table repeats it.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.evaluations.latency:Latency"
    headline: ClassVar[tuple[str, ...]] = (*_MEDIANS, *_EXACT)
    metric_names: ClassVar[tuple[str, ...] | None] = (*_MEDIANS, *_EXACT, *(f"{name}_iqr" for name in _MEDIANS))
    is_measurement: ClassVar[bool] = True

    kind: Literal["latency"] = "latency"
    batch_size: plugin.Count = 1
    """Prompts answered at once; here it is part of what is measured."""
    new_tokens: Annotated[int, Field(strict=True, ge=2)] = 32
    """Tokens generated for each prompt, the first included; the others are those of `decode_tokens_per_second`."""
    warmup: plugin.Whole = 2
    """Answers before those that are timed: kernels get chosen and memory gets taken."""
    repeats: plugin.Count = 10
    """Answers that are timed, one after the other."""


class Latency:
    """Times generation on the first worker; the others wait for it."""

    def __init__(self, spec: LatencySpec) -> None:
        self._spec = spec

    def run(self, model: Any, data: plugin.EvaluationData, workers: plugin.Workers) -> plugin.Outcome:
        """Return the metrics of the headline and the spread of both times; the one example holds every time.

        Raises:
            DataError: there are fewer rows with an image than the batch takes, a prompt is longer than the model may
                take, or an image cannot be read.
        """
        spec = self._spec if not data.trial else self._spec.model_copy(update={"batch_size": 1})
        rows = middle_rows(data.rows, spec.batch_size)
        # All ranks get the result, or the error, of the one to which the single row falls.
        (found,) = workers.divide(rows[:1], lambda mine: [_measured(spec, model, rows, data) for _ in mine])
        return found


def middle_rows(rows: Sequence[plugin.Row], count: int) -> list[plugin.Row]:
    """Return the rows of middle length in words, of those with an image where there are any.

    Raises:
        DataError: there are fewer.
    """
    seen = [row for row in rows if row.images] or list(rows)
    if len(seen) < count:
        raise plugin.DataError(
            f"batch_size is {count}, and the data has {len(seen)} rows with an image; give a smaller batch"
        )
    order = sorted(range(len(seen)), key=lambda number: (seen[number].num_words, number))
    first = (len(seen) - count) // 2
    return [seen[number] for number in order[first : first + count]]


def _measured(spec: LatencySpec, model: Any, rows: Sequence[plugin.Row], data: plugin.EvaluationData) -> plugin.Outcome:
    batch = plugin.prompt_batch(model, rows, data)
    device = batch.inputs["input_ids"].device

    def answer() -> tuple[float, float]:
        return _times(model, batch, data, spec.new_tokens)

    for _ in range(0 if data.trial else spec.warmup):
        answer()
    before = plugin.Load.now(device)
    times = [answer()]
    while len(times) < (1 if data.trial else spec.repeats) and not data.should_stop():
        times.append(answer())
    others = plugin.Load.now(device).others_since(before)
    prefill, decode = zip(*times, strict=True)
    tokens = len(rows) * (spec.new_tokens - 1)
    cache = plugin.generate(model, batch, data, 1, return_dict_in_generate=True).past_key_values
    by_layer = [sum(tensor.nbytes for tensor in _tensors(vars(layer))) for layer in cache.layers]
    metrics = {
        **_median("prefill_milliseconds", [1000 * seconds for seconds in prefill]),
        **_median("decode_tokens_per_second", [tokens / seconds for seconds in decode]),
        "kv_cache_bytes": sum(by_layer),
        "peak_memory_gib": plugin.peak_bytes(model, answer) / 2**30,
    }
    record = {
        "rows": [row.index for row in rows],
        "device": plugin.device_name(device),
        "others": others,
        "prompt_tokens": batch.length,
        "kv_cache_bytes_by_layer": by_layer,
        "prefill_milliseconds": [round(1000 * seconds, 3) for seconds in prefill],
        "decode_milliseconds": [round(1000 * seconds, 3) for seconds in decode],
    }
    notices = ("times were measured while other processes used the machine",) if others else ()
    return plugin.Outcome(metrics, len(rows), [record], notices=notices)


def _times(model: Any, batch: plugin.PromptBatch, data: plugin.EvaluationData, new_tokens: int) -> tuple[float, float]:
    """Return the seconds until the first new token's logits are there, and from then until the last token is."""
    device = batch.inputs["input_ids"].device
    first = _FirstLogits(device)
    start = _now(device)
    plugin.generate(model, batch, data, new_tokens, min_new_tokens=new_tokens, logits_processor=[first])
    end = _now(device)
    assert first.at is not None
    return first.at - start, end - first.at


class _FirstLogits:
    """Stands among the processors of logits, which `generate` calls after each forward, and notes the first time."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.at: float | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self.at is None:
            self.at = _now(self._device)
        return scores


def _now(device: Any) -> float:
    """Return the time when the device has done what it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def _median(name: str, values: Sequence[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, method="inclusive") if len(values) > 1 else [0.0] * 3
    return {name: statistics.median(values), f"{name}_iqr": quartiles[2] - quartiles[0]}


def _tensors(value: Any) -> list[Any]:
    """Return all tensors among what a layer of a cache holds: keys and values, or the states of linear attention."""
    if isinstance(value, dict | list | tuple):
        each = value.values() if isinstance(value, dict) else value
        return [tensor for one in each for tensor in _tensors(one)]
    return [value] if hasattr(value, "untyped_storage") else []

"""latency: bytes of the cache against what points keep and the formula, times of a slowed model, memory."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from orchestrator_plugins.data.easy_vqa import EasyVqaSpec
from orchestrator_plugins.evaluations import latency
from orchestrator_plugins.evaluations.latency import Latency, LatencySpec, middle_rows
from repository import TINY_LLAVA
from said_answers import row

from orchestrator import machine
from orchestrator.compression import attach, attachment_of
from orchestrator.data.processing.encode import Encoder
from orchestrator.data.processing.processor import load_processor
from orchestrator.data.rows import open_data_set
from orchestrator.errors import DataError
from orchestrator.evaluation.evaluate import evaluation_mode, prompt_batch
from orchestrator.evaluation.protocol import EvaluationData, Workers
from orchestrator.machine import Load, peak_bytes
from orchestrator.models.build import model_from_config
from orchestrator.plan.cost import kv_cache_bytes
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.model_facts import model_facts

MODEL = ModelSpec(model_name_or_path=str(TINY_LLAVA), weights="random", dtype="float32")
QUICK = {"data": "test", "new_tokens": 3, "warmup": 1, "repeats": 3}
UNDER = {
    "full": [],
    "pool": [{"kind": "average_pool", "layer": 1, "stride": 8}],
    "two points": [
        {"kind": "average_pool", "layer": 1, "stride": 2},
        {"kind": "fastv", "layer": 3, "keep_tokens": 3},
    ],
    "before the decoder": [{"kind": "average_pool", "layer": "projector", "stride": 4}],
    "keys alone": [{"kind": "random_drop", "layer": 2, "keep_tokens": 5, "keys_only": True}],
    "late": [{"kind": "late_injection", "layer": 1}, {"kind": "early_exit", "layer": 3}],
}


@pytest.fixture(scope="module")
def data():
    processor = load_processor(MODEL)
    rows = open_data_set(EasyVqaSpec(split="test", max_samples=9)).rows()
    return EvaluationData(rows, Encoder(processor, "chat_template", 2048), processor)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = model_from_config(MODEL).eval()
    with evaluation_mode(model):
        yield model


def measured(model, data, under=(), **fields):
    attachment = attach(model, list(under))
    try:
        return Latency(LatencySpec(**{**QUICK, **fields})).run(model, data, Workers())
    finally:
        attachment.detach()


@pytest.mark.parametrize("under", UNDER)
def test_the_cache_holds_what_points_keep_and_the_formula_says(model, data, under):
    points = UNDER[under]
    found = measured(model, data, points)
    text = model.config.text_config
    a_token = 2 * text.num_key_value_heads * text.head_dim * 4
    facts = model_facts(MODEL.model_name_or_path)
    image = kv_cache_bytes(facts, points, 4)
    prompt = found.examples[0]["prompt_tokens"] - facts.image_grid.tokens
    assert found.metrics["kv_cache_bytes"] == image + prompt * text.num_hidden_layers * a_token

    attachment = attach(model, points)
    batch = prompt_batch(model, middle_rows(data.rows, 1), data)
    model(**batch.inputs)
    kept = [tokens + prompt for tokens in attachment_of(model).visual_tokens_per_layer]
    attachment.detach()
    if under == "keys alone":  # what it dropped stays in the cache
        kept = kept[:2] + kept[:2]
    assert found.examples[0]["kv_cache_bytes_by_layer"] == [tokens * a_token for tokens in kept]


def test_times_are_the_models(model, data, monkeypatch):
    """A layer that takes 100 ms by a clock of the test: in the prompt's pass, and in each of the two steps after it."""
    passes: list[None] = []
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: len(passes) / 10))
    hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: passes.append(None))
    slow = measured(model, data, warmup=0, repeats=1).metrics
    hook.remove()
    assert slow["prefill_milliseconds"] == pytest.approx(100) and slow["decode_tokens_per_second"] == pytest.approx(10)
    assert slow["prefill_milliseconds_iqr"] == slow["decode_tokens_per_second_iqr"] == 0


def test_medians_and_every_single_time(model, data):
    found = measured(model, data)
    record = found.examples[0]
    assert len(record["prefill_milliseconds"]) == len(record["decode_milliseconds"]) == 3
    low, middle, high = sorted(record["prefill_milliseconds"])
    assert found.metrics["prefill_milliseconds"] == pytest.approx(middle, abs=1e-3)
    assert found.metrics["prefill_milliseconds_iqr"] == pytest.approx((high - low) / 2, abs=1e-3)
    slow, median, fast = sorted(2 / (one / 1000) for one in record["decode_milliseconds"])
    assert found.metrics["decode_tokens_per_second"] == pytest.approx(median, rel=1e-3)
    assert found.metrics["decode_tokens_per_second_iqr"] == pytest.approx((fast - slow) / 2, rel=1e-2)
    assert record["device"] == machine.processor_name() and found.num_samples == 1


def test_a_batch_counts_all_its_rows(model, data):
    one, four = (measured(model, data, batch_size=size) for size in (1, 4))
    assert four.num_samples == 4 and len(four.examples[0]["rows"]) == 4
    tokens = four.examples[0]["prompt_tokens"] / one.examples[0]["prompt_tokens"]
    assert four.metrics["kv_cache_bytes"] == pytest.approx(4 * tokens * one.metrics["kv_cache_bytes"])
    with pytest.raises(DataError, match="batch_size is 10, and the data has 9 rows with an image"):
        measured(model, data, batch_size=10)


def test_rows_of_middle_length_with_an_image():
    rows = [row(number, " ".join(["word"] * words)) for number, words in enumerate((9, 1, 5, 7, 3))]
    text = row(5, "text", images=())
    assert [one.index for one in middle_rows([*rows, text], 1)] == [2]
    assert [one.index for one in middle_rows([*rows, text], 3)] == [4, 2, 3]
    assert [one.index for one in middle_rows([text, replace(text, index=6)], 1)] == [5]


def test_peak_memory_is_weights_and_the_largest_sum_of_tensors(model):
    weights = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))

    def work():
        first = torch.ones(1_000_000)
        del first
        second = torch.ones(2_000_000)
        third = torch.ones(500_000)
        return second.sum() + third.sum()

    assert peak_bytes(model, lambda: None) == weights
    assert peak_bytes(model, work) - weights == pytest.approx(4 * 2_500_000, rel=1e-3)


def test_what_others_did_meanwhile_is_told():
    def load(seconds: float, used: float | None, own: float, gpu: int = 0) -> Load:
        return Load(seconds, used, own, gpu)

    alone = load(0, 0, 0)
    assert load(10, 10.2, 10).others_since(alone) is None
    assert load(10, 27, 10).others_since(alone) == "1.7 processors"
    assert load(10, 10, 10, 5 * 2**30).others_since(alone) == "5.0 GiB of the GPU"
    assert load(10, None, 10).others_since(load(0, None, 0)) is None
    now = Load.now(torch.device("cpu"))
    assert now.used_seconds is None or now.used_seconds > 0


def test_a_measurement_beside_other_work_says_so(model, data, monkeypatch):
    monkeypatch.setattr(Load, "others_since", lambda *_: "1.7 processors")
    found = measured(model, data)
    assert found.notices == ("times were measured while other processes used the machine",)
    assert found.examples[0]["others"] == "1.7 processors"

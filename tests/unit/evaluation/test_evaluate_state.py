"""evaluate_state: from weights in a ledger to a result, under points."""

import json
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from evaluated_state import HEAVY, MODEL, STATE, job, ledger_of
from orchestrator_plugins.evaluations import exact_match

from orchestrator.compression import attach
from orchestrator.dispatch.run_job import execute
from orchestrator.errors import DamagedStateError, StageRunError
from orchestrator.evaluation.evaluate import evaluate_state, load_model
from orchestrator.models.build import build_model, cast_parameters
from orchestrator.plan.jobs import EvaluationJob
from orchestrator.plan.ledger import Ledger
from orchestrator.spec.model import ModelSpec


@pytest.fixture
def ledger(tmp_path):
    return ledger_of(tmp_path)


def answers(result):
    return [example["answer"] for example in result["examples"]]


def test_a_result_is_written_whole(ledger):
    result = evaluate_state(job(), ledger)
    note = ledger.evaluation("b" * 16)
    assert note.pop("predictions_sha256") and note == json.loads(json.dumps(result))
    assert result["id"] == "b" * 16 and result["name"] == "vqa" and result["under"] == "final"
    assert result["num_samples"] == 30 and result["seconds"] > 0 and len(result["examples"]) == 20
    assert set(result["metrics"]) == {"accuracy", "accuracy_yes_no", "accuracy_shape", "accuracy_color"}


def test_how_a_state_was_tested_is_kept(ledger):
    full, heavy = evaluate_state(job(), ledger)["fingerprint"], evaluate_state(job(HEAVY), ledger)["fingerprint"]
    assert full["task"] == "exact_match 1" and full["batch_size"] == 10 and full["dtype"] == "float32"
    assert full["settings"] == {"max_new_tokens": 2, "ignore_case": True, "ignore_punctuation": True}
    assert full["world_size"] == 1 and full["torch"] == version("torch") and full["device"]
    assert full["prompt"].startswith("chat_template ") and len(full["processor"]) == 12
    assert full["compressor"] == "none" and heavy["compressor"] == "average_pool 1 (layer 1, stride 8)"
    assert {**heavy, "compressor": "none"} == full
    other = replace(job(), spec={**job().spec, "batch_size": 3}, data={**job().data, "max_samples": 29})
    differs = evaluate_state(other, ledger)["fingerprint"]
    assert {name for name in full if full[name] != differs[name]} == {"batch_size", "data"}


def test_a_state_is_tested_under_its_points(ledger):
    full, heavy = evaluate_state(job(), ledger), evaluate_state(job(HEAVY), ledger)
    assert answers(full) != answers(heavy)


def test_a_model_at_hand_gives_the_same_and_keeps_its_own_points(ledger):
    model = build_model(ModelSpec.model_validate(MODEL), ledger.state_folder(STATE) / "weights" / "model.safetensors")
    attachment = attach(model, [{"kind": "average_pool", "layer": 2, "stride": 4}])
    before = [point.spec for point in attachment.points]
    model.train()
    for points in ((), HEAVY):
        assert answers(evaluate_state(job(points), ledger, model=model)) == answers(evaluate_state(job(points), ledger))
    assert [point.spec for point in attachment.points] == before and model.training
    attachment.detach()
    evaluate_state(job(HEAVY), ledger, model=model)
    assert "forward" not in vars(model), "what the evaluation attached is taken off"


def test_a_state_without_weights_is_told(tmp_path):
    with pytest.raises(DamagedStateError, match="must be trained again"):
        evaluate_state(job(), Ledger(tmp_path))


def test_damaged_weights_are_not_tested(ledger):
    file = ledger.state_folder(STATE) / "weights" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedStateError, match=r"missing or damaged: weights/model\.safetensors") as told:
        evaluate_state(job(), ledger)
    assert told.value.state == STATE and ledger.evaluation("b" * 16) is None


class Unfinite(exact_match.ExactMatch):
    def run(self, model, data, workers):
        return replace(super().run(model, data, workers), metrics={"length": float("nan")})


def test_a_metric_that_is_not_finite_is_named(ledger, monkeypatch):
    monkeypatch.setattr(exact_match, "ExactMatch", Unfinite)
    with pytest.raises(StageRunError, match=r"vqa \(exact_match\): length is nan; give a finite Python number"):
        evaluate_state(job(), ledger)
    assert ledger.evaluation("b" * 16) is None


class Metrics(exact_match.ExactMatch):
    def run(self, model, data, workers):
        return super().run(model, data, workers).metrics


def test_an_evaluation_that_returns_its_metrics_alone_is_told_what_to_return(ledger, monkeypatch):
    monkeypatch.setattr(exact_match, "ExactMatch", Metrics)
    with pytest.raises(StageRunError, match=r"run\(\) returned a dict; return plugin\.Outcome"):
        evaluate_state(job(), ledger)


def test_a_headline_without_any_result_is_named_at_the_first(ledger, monkeypatch):
    monkeypatch.setattr(exact_match.ExactMatchSpec, "headline", ("acuracy",))
    with pytest.raises(StageRunError, match=r"vqa \(exact_match\): headline names acuracy; its metrics are accuracy"):
        evaluate_state(job(), ledger)
    monkeypatch.setattr(exact_match.ExactMatchSpec, "headline", ("acuracy", "accuracy"))
    assert evaluate_state(job(), ledger)["num_samples"] == 30  # one is there: the table says what is not


def test_computes_in_the_models_type(ledger):
    half = EvaluationJob(**{**vars(job()), "model": {**MODEL, "dtype": "bfloat16"}})
    result = evaluate_state(half, ledger)
    assert result["num_samples"] == 30
    model = build_model(ModelSpec.model_validate(MODEL), ledger.state_folder(STATE) / "weights" / "model.safetensors")
    cast_parameters(model, torch.bfloat16)  # as DeepSpeed casts it: tests/integration/training/test_precision.py
    assert answers(evaluate_state(half, ledger, model=model)) == answers(result)
    loaded = load_model(half, ledger.state_folder(STATE) / "weights" / "model.safetensors", torch.device("cpu"))
    types = {name.rpartition(".")[2]: buffer.dtype for name, buffer in loaded.named_buffers()}
    assert types["inv_freq"] == torch.float32 and types["position_ids"] == torch.int64
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_evaluations_of_one_state_load_it_once_and_answer_as_if_alone(ledger):
    memory, models = {}, []
    for number, points in enumerate((HEAVY, (), HEAVY)):
        test = job(points, id=str(number) * 16)
        assert execute(test, ledger, memory, lambda: False) == "finished"
        alone = evaluate_state(job(points, id="c" * 16), ledger)
        assert answers(ledger.evaluation(test.id)) == answers(alone)
        models.append(memory["tested"][1])
    assert models[0] is models[1] is models[2] and "forward" not in vars(models[0])
    # 30 rows in batches of 10: the first evaluation computed the pictures' features, the others found them.
    features = memory["features"][1]
    assert (features.made, features.found) == (3, 6) and "get_image_features" not in vars(models[0].model)
    speed = replace(job(id="9" * 16), spec={"kind": "latency", "data": "test", "new_tokens": 2, "repeats": 1})
    assert execute(speed, ledger, memory, lambda: False) == "finished"
    assert (features.made, features.found) == (3, 6), "what measures the machine computes all"

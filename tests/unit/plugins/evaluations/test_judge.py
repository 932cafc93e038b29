"""judge: a chat endpoint on loopback that is good, busy, slow, wrong, or not there."""

import json
import time

import pytest
from judge_server import GOOD, judge_server
from orchestrator_plugins.evaluations.judge import Judge, JudgeSpec, read_verdict
from pydantic import ValidationError
from said_answers import outcome, row

from orchestrator import plugin
from orchestrator.dispatch.failures import describe
from orchestrator.errors import StageRunError
from orchestrator.evaluation.protocol import EvaluationData, Workers
from orchestrator.plan.identity import share_caches

KEY = "kept-in-the-environment-1234"


def spec(url, **fields):
    return JudgeSpec(data="test", url=url, model="stub-1", **{"backoff_seconds": 0.001, "num_requests": 2, **fields})


ROWS = [row(0, "red", kind="color"), row(1, "{answer}", kind="color"), row(2, "two", kind="number")]


def test_judgements_become_metrics_and_stay_in_the_records(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def reply(_, body):
        text = body["messages"][1]["content"]
        right = text.split("Correct answer: ")[1].split("\n")[0]
        said = text.split("Predicted answer: ")[1].split("\n")[0]
        # As JSON, and as Python writes a mapping.
        return json.dumps({"pred": "yes", "score": 5}) if said == right else "Sure: {'pred': 'no', 'score': 2}"

    with judge_server(reply) as server:
        found = outcome(monkeypatch, spec(server.url, api_key_variable="JUDGE_KEY"), ROWS, ["red", "{question}", "2"])
    accuracies = {"accuracy": 1 / 3, "accuracy_color": 1 / 2, "accuracy_number": 0}
    assert found.metrics == pytest.approx({**accuracies, "score": 3, "score_color": 3.5, "score_number": 2})
    assert [each["judgement"]["reply"][:4] for each in found.predictions] == ['{"pr', "Sure", "Sure"]
    assert [each["right"] for each in found.predictions] == [True, False, False]
    asked = {one["messages"][1]["content"].split("\n")[1]: one for one in server.requests}
    assert set(asked) == {"Correct answer: red", "Correct answer: {answer}", "Correct answer: two"}
    assert "Predicted answer: {question}\n" in asked["Correct answer: {answer}"]["messages"][1]["content"]
    first = asked["Correct answer: red"]
    assert "<image>" not in first["messages"][1]["content"] and first["path"] == "/v1/chat/completions"
    assert (first["model"], first["temperature"], first["Authorization"]) == ("stub-1", 0, f"Bearer {KEY}")


@pytest.mark.parametrize(
    "bad",
    [
        (503, "busy", {}),
        (429, "slow down", {"Retry-After": "0"}),
        (200, "I would say yes.", {}),
        (200, '{"pred": "yes", "score": 9}', {}),
    ],
)
def test_what_may_pass_is_asked_again(monkeypatch, bad):
    with judge_server(lambda number, _: bad if number < 2 else GOOD) as server:
        found = outcome(monkeypatch, spec(server.url, max_retries=2), ROWS[:1], ["red"])
    assert found.metrics["accuracy"] == 1 and len(server.requests) == 3


@pytest.mark.parametrize(
    ("reply", "attempts", "told"),
    [
        ((500, "broken", {}), 3, "no judgement of row 0 .* after 3 attempts: HTTP 500: broken; training is kept"),
        ((401, "no such key", {}), 1, "after 1 attempt: HTTP 401: no such key"),
        ((302, "", {"Location": "http://127.0.0.1:9/"}), 1, "HTTP 302"),  # the key goes to no other server
        ("no idea", 3, "it said 'no idea', where pred"),
    ],
)
def test_what_stays_fails_with_its_reason_after_bounded_attempts(monkeypatch, reply, attempts, told):
    with judge_server(lambda *_: reply) as server, pytest.raises(StageRunError, match=told) as failed:
        outcome(monkeypatch, spec(server.url, max_retries=2, num_requests=1), ROWS, ["red"] * 3)
    assert len(server.requests) == attempts, "nothing more is asked once one failed"
    assert not describe(failed.value).retry, "the attempts were made here"


def test_a_judge_that_does_not_answer_in_time(monkeypatch):
    with judge_server(lambda *_: time.sleep(0.4) or GOOD) as server, pytest.raises(StageRunError, match="timed out"):
        outcome(monkeypatch, spec(server.url, timeout_seconds=0.05, max_retries=0), ROWS[:1], ["red"])


def test_a_judge_that_is_not_there(monkeypatch):
    with judge_server() as server:
        pass
    with pytest.raises(StageRunError, match=r"after 2 attempts: URLError: .*refused"):
        outcome(monkeypatch, spec(server.url, max_retries=1), ROWS[:1], ["red"])


def test_the_key_is_in_no_message_and_no_record(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with judge_server(lambda *_: f"{GOOD} your key is {KEY}") as server:
        found = outcome(monkeypatch, spec(server.url, api_key_variable="JUDGE_KEY"), ROWS[:1], ["red"])
    assert KEY not in json.dumps(found.predictions) and "your key is ***" in json.dumps(found.predictions)
    with judge_server(lambda *_: (400, f"bad key {KEY}", {})) as server, pytest.raises(StageRunError) as failed:
        outcome(monkeypatch, spec(server.url, api_key_variable="JUDGE_KEY"), ROWS[:1], ["red"])
    assert KEY not in str(failed.value) and "bad key ***" in str(failed.value)


def test_a_trial_asks_for_the_key_and_not_the_judge(monkeypatch):
    with judge_server() as server:
        wanted = spec(server.url, api_key_variable="NO_SUCH_KEY")
        with pytest.raises(StageRunError, match="NO_SUCH_KEY, which holds the judge's key, is not set"):
            outcome(monkeypatch, wanted, ROWS[:1], ["red"], trial=True)
        monkeypatch.setenv("NO_SUCH_KEY", KEY)
        assert outcome(monkeypatch, wanted, ROWS[:1], ["red"], trial=True).num_samples == 1
    assert server.requests == []


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"url": "localhost:8000"}, "begins with http:// or https://"),
        ({"api_key_variable": "sk-abcdef"}, "the name of an environment variable"),
        ({"api_key_variable": "JUDGE"}, "ends with KEY, TOKEN or SECRET"),
        ({"prompt": "Is {answer} right?"}, "it lacks {question}, {expected}"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, told):
    with pytest.raises(ValidationError, match=told):
        JudgeSpec(**{"data": "test", "url": "http://localhost/v1", "model": "m", **fields})


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ('{"pred": "Yes", "score": 4.5}', {"pred": "yes", "score": 4.5}),
        ("```json\n{\"score\": 0, \"pred\": \"no\"}\n```", {"pred": "no", "score": 0}),
        ("{'pred': 'maybe', 'score': 3}", None),
        ("{'pred': 'yes'}", None),
        ("yes, 5", None),
    ],
)  # fmt: skip
def test_verdicts_are_read(reply, verdict):
    assert read_verdict(reply) == verdict


def test_an_interrupted_evaluation_does_not_pay_twice(monkeypatch, tmp_path):
    """The judge fails at the third request; the next attempt asks for what is missing, of the same evaluation alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    share_caches(None)  # an experiment that another test loaded in this process has a storage of its own
    said = {one.index: answer for one, answer in zip(ROWS, ["red", "two", "2"], strict=True)}
    monkeypatch.setattr(plugin, "greedy_answers", lambda _, mine, *__: [said[one.index] for one in mine])
    kept = tmp_path / "llavolta" / "judgements"

    def run(server, identity="e" * 16, **fields):
        wanted = spec(server.url, num_requests=1, max_retries=0, **fields)
        return Judge(wanted).run(None, EvaluationData(ROWS, None, None, identity=identity), Workers())

    replies = [GOOD, GOOD, (500, "down", {}), *[GOOD] * 20]
    with judge_server(lambda number, _: replies[number]) as server:
        with pytest.raises(StageRunError, match="500"):
            run(server)
        assert len(server.requests) == 3 and len(list((kept / ("e" * 16)).glob("*.json"))) == 2
        next((kept / ("e" * 16)).glob("*.json")).write_text('{"pred"')  # cut off: asked for again
        found = run(server)
        assert len(server.requests) == 5 and found.metrics["score"] == 4 and not list(kept.iterdir())
        run(server)
        assert len(server.requests) == 8, "what is done is not kept"
        with pytest.raises(StageRunError):
            replies[9:10] = [(500, "down", {})]
            run(server)
        run(server, identity="f" * 16)
        assert len(server.requests) == 13, "another evaluation asks for itself"
        run(server, system="Grade more strictly.")
        assert len(server.requests) == 16, "and another question is another one"

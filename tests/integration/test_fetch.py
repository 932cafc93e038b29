"""`fetch` against a hub on loopback, and `validate --offline`: what is downloaded, kept, refused, then not needed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from program import run_anew
from repository import ROOT
from stub_hub import StubHub, stub_hub

Call = Callable[..., subprocess.CompletedProcess[str]]
TRAINED = ROOT / "experiments" / "models" / "tiny-llava-trained"
SPEC = """
schema_version: 1
name: hubs
model: {model_name_or_path: some-org/tiny, weights: pretrained, dtype: float32}
data:
  test: {kind: hf_dataset, repo_id: some-org/questions, split: test, columns: {question: question, answer: answer}}
phases: {}
evaluate:
  vqa: {kind: exact_match, data: test, under: [final]}
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[StubHub]:
    """A trained tiny model, with weights in a second format that nobody reads, and a data set of two rows."""
    model, rows = tmp_path / "hub" / "tiny", tmp_path / "hub" / "questions"
    shutil.copytree(TRAINED, model)
    (model / "pytorch_model.bin").write_bytes(b"the same in another format")
    (model / "modeling_tiny.py").write_text("raise SystemError\n")
    rows.mkdir()
    (rows / "test.jsonl").write_text("".join(json.dumps({"question": q, "answer": "yes"}) + "\n" for q in "ab"))
    with stub_hub() as found:
        found.repositories = {"models/some-org/tiny": model, "datasets/some-org/questions": rows}
        yield found


@pytest.fixture
def call(hub: StubHub, tmp_path: Path) -> Call:
    """Runs a verb anew (the hub's library reads its environment when it is imported), with a cache of its own."""
    (tmp_path / "hubs.yaml").write_text(SPEC)

    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        verb, *options = words
        surroundings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return run_anew([verb, "hubs.yaml", *options], tmp_path, **{**surroundings, **env})

    return run


@pytest.mark.slow
def test_fetched_once_and_then_no_network_is_needed(hub: StubHub, call: Call) -> None:
    before = call("validate", "--offline")
    assert before.returncode == 2 and "not in the hub's cache" in before.stderr and "llavolta fetch" in before.stderr
    assert call("validate").returncode == 0  # what the model is like is checked when it is there

    done = call("fetch", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 0 and document["complete"], done.stderr
    assert {"model.safetensors", "config.json", "tokenizer.json", "test.jsonl"} <= set(hub.files_sent)
    assert not {"pytorch_model.bin", "modeling_tiny.py"} & set(hub.files_sent)
    model, rows = document["sources"]
    assert (model["key"], model["commit"]) == ("model.model_name_or_path", hub.commit("models/some-org/tiny"))
    assert (rows["key"], rows["kind"], rows["bytes"]) == (
        "data.test",
        "dataset",
        2 * len('{"question": "a", "answer": "yes"}\n'),
    )

    sent = len(hub.files_sent)
    again = call("fetch")
    assert again.returncode == 0 and "complete: a run needs no network" in again.stdout
    assert len(hub.files_sent) == sent

    away = {"HF_ENDPOINT": "http://127.0.0.1:1"}
    assert call("validate", "--offline", **away).returncode == 0
    assert call("fetch", **away).returncode == 0  # everything is here, whoever is not
    run = call("run", "--local", HF_HUB_OFFLINE="1", **away)
    assert run.returncode == 0, run.stderr


def test_what_was_cut_off_is_missing(hub: StubHub, call: Call, tmp_path: Path) -> None:
    assert call("fetch").returncode == 0
    [weights] = (tmp_path / "cache").rglob("snapshots/*/model.safetensors")
    weights.unlink()
    before = call("validate", "--offline")
    assert before.returncode == 2 and "there are no weights" in before.stderr
    assert call("fetch").returncode == 0 and call("validate", "--offline").returncode == 0


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:1"}, "the hub (http://127.0.0.1:1) is not reached"),
    ],
)
def test_without_a_network_each_missing_thing_says_so(call: Call, env: dict[str, str], told: str) -> None:
    done = call("fetch", **env)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    *lines, verdict = done.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["model.model_name_or_path", "data.test"]
    assert all("): missing: " in line and told in line for line in lines), done.stdout
    assert verdict == "2 of 2 missing"


def test_a_gated_model_is_fetched_by_the_machines_own_token(hub: StubHub, call: Call, tmp_path: Path) -> None:
    hub.gated = {"models/some-org/tiny"}
    refused = call("fetch", HF_TOKEN="")
    assert refused.returncode == 1 and "gated: its terms are to be accepted" in refused.stdout
    assert "HF_TOKEN" in refused.stdout
    done = call("fetch", HF_TOKEN=hub.token)
    assert done.returncode == 0 and hub.token not in done.stdout + done.stderr
    (tmp_path / "hubs.yaml").write_text(SPEC.replace("some-org/questions", "some-org/nowhere"))
    nowhere = call("fetch", HF_TOKEN=hub.token)
    assert nowhere.returncode == 1 and "the hub has no such dataset, or it is private" in nowhere.stdout

"""A judge that is down fails its evaluation alone; once it is up, that one runs, and its key is nowhere."""

from __future__ import annotations

import json

import pytest
from judge_server import judge_server

KEY = "the-judge-of-a-test-4711"


@pytest.mark.slow
def test_a_judge_that_is_down_costs_its_evaluation_alone(llavolta, tmp_path, tiny_text):
    text = tiny_text.replace("[full, heavy, two_stage]", "[full]").replace("max_steps: 6", "max_steps: 2")
    judge = "kind: judge, data: test, url: 'URL', model: stub, api_key_variable: STUB_KEY, max_retries: 0"
    more = f"  graded: {{{judge}, max_new_tokens: 2}}\n  held_out: {{kind: loss, data: test}}\n"
    text = text.replace("evaluate:\n", f"evaluate:\n{more}")
    with judge_server() as server:
        port = server.server.server_address[1]
        (tmp_path / "tiny.yaml").write_text(text.replace("URL", server.url))
    # Nobody listens there any more.
    down = llavolta("run", "tiny.yaml", "--local", STUB_KEY=KEY)
    told = down.stdout + down.stderr
    assert down.returncode == 1 and "no judgement of row" in told and f":{port}/v1" in told, told
    assert "training is kept" in told and "Traceback" not in told
    table = json.loads(llavolta("table", "tiny.yaml", "--all", "--format", "json").stdout)
    assert "accuracy" in json.dumps(table) and "perplexity" in json.dumps(table), "the other evaluations are done"

    with judge_server(port=port) as server:
        again = llavolta("run", "tiny.yaml", "--local", "--retry-failed", STUB_KEY=KEY)
        assert again.returncode == 0, again.stdout + again.stderr
        assert len(server.requests) == 40 and server.requests[0]["Authorization"] == f"Bearer {KEY}"
    (weights,) = (tmp_path / "runs" / "cells" / "tiny").glob("*/weights")
    found = llavolta("predictions", "tiny.yaml", "--cell", weights.parent.name, "--evaluation", "graded")
    first = json.loads(found.stdout.splitlines()[0])
    assert first["judgement"] == {"pred": "yes", "score": 4.0, "reply": '{"pred": "yes", "score": 4}'}
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert holding == [] and KEY not in told + again.stdout + again.stderr

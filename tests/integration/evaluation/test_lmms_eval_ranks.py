"""Two ranks of a benchmark find what one finds, and fail as one fails; the evaluator itself runs on the first."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from benchmark_hub import write_pope
from evaluated_state import ledger_of
from repository import SUPPORT

pytest.importorskip("lmms_eval")
RANKS = """
import dataclasses, datetime, sys, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from evaluated_state import HEAVY, job
from orchestrator.errors import StageRunError
from orchestrator.evaluation.evaluate import evaluate_state
from orchestrator.plan.ledger import Ledger
rank, count = int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{Path.cwd()}/rendezvous{count}", rank=rank, world_size=count,
                        timeout=datetime.timedelta(seconds=600))
spec = {"kind": "lmms_eval", "conversation_template": "chat_template", "image_aspect_ratio": "none", "batch_size": 3}
def test(task, identity):
    about = {"spec": {**spec, "tasks": [task]}, "data": {}, "part": task, "model_max_length": 512}
    return dataclasses.replace(job(HEAVY, id=identity), **about)
evaluate_state(test("pope", str(count) * 16), Ledger(Path.cwd()))
try:
    evaluate_state(test("scienceqa", "d" * 16), Ledger(Path.cwd()))
    sys.exit(9)
except StageRunError as error:
    assert "task scienceqa" in str(error), error
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(tmp_path):
    ledger = ledger_of(tmp_path)
    write_pope(tmp_path, 8)
    more = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_of_nobody"}
    environment = {**os.environ, **more, "LMMS_EVAL_DATASETS_CACHE": str(tmp_path / "cache")}
    for count in (1, 2):
        arguments = [sys.executable, "-c", RANKS, str(SUPPORT)]
        ranks = [
            subprocess.Popen([*arguments, str(rank), str(count)], env=environment, cwd=tmp_path)
            for rank in range(count)
        ]
        assert [rank.wait(timeout=800) for rank in ranks] == [0] * count
    alone, together = (ledger.predictions(str(count) * 16) for count in (1, 2))
    assert alone == together and len(alone) == 8 and any(each["answer"] for each in alone)
    assert ledger.evaluation("1" * 16)["metrics"] == ledger.evaluation("2" * 16)["metrics"]

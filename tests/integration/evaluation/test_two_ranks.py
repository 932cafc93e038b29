"""Two ranks of an evaluation find what one finds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from evaluated_state import HEAVY, job, ledger_of
from repository import SUPPORT

from orchestrator.evaluation.evaluate import evaluate_state

TWO_RANKS = """
import datetime, os, sys, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from evaluated_state import HEAVY, job
from orchestrator.evaluation.evaluate import evaluate_state
from orchestrator.plan.ledger import Ledger
from pathlib import Path
rank = int(sys.argv[4])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=120))
evaluate_state(job(HEAVY, id="c" * 16), Ledger(Path(sys.argv[2])))
from orchestrator.evaluation.protocol import Workers
def work(mine):
    if rank == 1:
        raise ValueError("on one rank")
    return mine
try:
    Workers.here().divide([], work)
    sys.exit(9)
except ValueError as error:
    assert str(error) == "on one rank", "no rank waits for one that failed"
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(tmp_path):
    ledger = ledger_of(tmp_path)
    alone = evaluate_state(job(HEAVY), ledger)
    arguments = [sys.executable, "-c", TWO_RANKS, str(SUPPORT), str(tmp_path), str(tmp_path / "rendezvous")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*arguments, str(rank)], env=environment) for rank in range(2)]
    assert [rank.wait(timeout=180) for rank in ranks] == [0, 0]
    together = ledger.evaluation("c" * 16)
    assert together["metrics"] == alone["metrics"] and together["num_samples"] == 30
    assert together["examples"] == alone["examples"]

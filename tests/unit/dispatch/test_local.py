"""run_local: the same work in this process, without Ray."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from dispatch_hooks import Recorded

from orchestrator.dispatch.driver import Hooks, run_local
from orchestrator.errors import Interrupted, UsageError
from orchestrator.plan.jobs import RootJob
from orchestrator.plan.ledger import Ledger
from orchestrator.spec.infrastructure import ClusterSpec


def work(*does: str) -> list[RootJob]:
    return [RootJob(f"job{index}", {"do": do}, 0) for index, do in enumerate(does)]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "storage")


def test_jobs_run_in_order_fail_alone_and_are_tried_again(ledger: Ledger) -> None:
    events: list[dict] = []
    before = dict(os.environ)
    outcome = run_local(
        work("", "raise", "flaky", "always_flaky", ""),
        ledger,
        ClusterSpec(max_failures=1),
        Recorded(events),
        executor="lane_jobs:run",
    )
    assert outcome.finished == ("job0", "job2", "job4")
    assert outcome.failed["job1"] == "row 7: the image is broken"
    assert "the file server went away (attempt 2 of 2)" in outcome.failed["job3"]
    assert [event["id"] for event in events if event["event"] == "retried"] == ["job2", "job3"]
    failure = ledger.failure("job1")
    assert failure is not None and failure["error"] == "row 7: the image is broken"
    assert "DataError: row 7" in Path(failure["log"]).read_text()
    assert (ledger.storage / "marks" / "order").read_text().count("spins 10000") == 3
    assert not dist.is_initialized()
    assert dict(os.environ) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("asked", [{"use_gpu": True}, {"resources_per_worker": {"GPU": 1}}])
def test_a_gpu_that_is_not_there_is_no_cpu(ledger: Ledger, asked: dict) -> None:
    with pytest.raises(UsageError, match="asks for a GPU, and torch sees none"):
        run_local(work(""), ledger, ClusterSpec(**asked), Hooks(), executor="lane_jobs:run")
    assert not dist.is_initialized()


def test_a_stop_leaves_at_a_checkpoint(ledger: Ledger) -> None:
    running = ledger.storage / "marks" / "job0.running"
    outcome = run_local(
        work("until_stopped", ""), ledger, ClusterSpec(), Recorded(stop=running.exists), executor="lane_jobs:run"
    )
    assert (outcome.interrupted, outcome.left) == (True, ("job0", "job1"))
    assert (ledger.storage / "marks" / "job0.checkpoint").exists()


def test_control_c_in_a_job_is_an_interruption(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*arguments: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[__name__], "pressed", pressed, raising=False)
    with pytest.raises(Interrupted):
        run_local(work(""), ledger, ClusterSpec(), Hooks(), executor=f"{__name__}:pressed")
    assert not dist.is_initialized()

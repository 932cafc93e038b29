"""The live view: a line for each lane, time left over several lanes, added work, with and without a terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ledger_work import finish, spool
from rich.console import Console

from orchestrator.plan.experiment_plan import ExperimentPlan, prepare
from orchestrator.plan.jobs import EvaluationJob, Job, StageJob
from orchestrator.report.live import LiveView, Progress


@pytest.fixture
def plan(tiny_experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentPlan:
    """Three cells, two of which begin alike; nothing is done."""
    monkeypatch.setenv("LLAVOLTA_STORAGE", str(tmp_path / "runs"))
    return prepare(tiny_experiment)


class Clock:
    """Seconds that pass when asked to."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def costs(work: Sequence[Job]) -> dict[str, float]:
    return {job.id: 10.0 if isinstance(job, StageJob) else 1.0 for job in work}


def stage_runs(plan: ExperimentPlan) -> list[StageJob]:
    """`full`, then `heavy` for two cells, then the ends of these."""
    return list(plan.tree.stage_runs.values())


def view_of(
    plan: ExperimentPlan, work: Sequence[Job], width: int = 120, terminal: bool = True
) -> tuple[LiveView, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, color_system=None)
    ledger = plan.ledger
    return LiveView(work, costs(work), plan.names_of(work), ledger.metrics_file, console, ledger.result), out


def shown(view: LiveView, out: io.StringIO) -> list[str]:
    out.truncate(0)
    out.seek(0)
    view._console.print(view.render())
    return [line.rstrip() for line in out.getvalue().splitlines()]


def send(target: LiveView | Progress, kind: str, job: Job, lane: str = "lane-0", **more: Any) -> None:
    event = {"event": kind, "id": job.id, "lane": lane, **more}
    (target.on_event if isinstance(target, LiveView) else target.take)(event)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_line_for_each_lane_fits_the_terminal(plan: ExperimentPlan, width: int) -> None:
    view, out = view_of(plan, plan.tree.work(plan.ledger), width)
    full, heavy, *_ = stage_runs(plan)
    spool(plan.ledger, full, 4)
    send(view, "started", full, "lane-0")
    send(view, "started", heavy, "lane-1")
    send(view, "started", stage_runs(plan)[2], "lane-2")
    send(view, "interrupted", stage_runs(plan)[2], "lane-2")
    header, first, second, third = shown(view, out)
    assert max(map(len, (header, first, second, third))) <= width
    assert header.startswith("0/9 jobs  ") and " elapsed" in header
    assert first.startswith("lane-0 finetune 0-6") and "4/6" in first and "loss 0.250" in first
    assert second.startswith("lane-1 finetune 0-3") and "loading" in second
    assert third == "lane-2 idle"
    if width >= 120:
        assert "step 4/6  loss 0.250  32 samples/s" in first and first.endswith("schedule=full")
        assert "schedule=heavy, schedule=two_sta" in second


def test_what_happens_stays_on_the_screen(plan: ExperimentPlan) -> None:
    work = plan.tree.work(plan.ledger)
    view, out = view_of(plan, work, terminal=False)
    full, heavy, third, last = stage_runs(plan)
    test = next(job for job in work if isinstance(job, EvaluationJob))
    send(view, "started", full)
    finish(plan.ledger, full, loss=0.167, samples_per_second=19.2)  # its steps' own speed is 32
    send(view, "finished", full)
    send(view, "finished", heavy, elsewhere=True)
    send(view, "started", test)
    send(view, "failed", test, error="no [/red] answers\ntrace")
    send(view, "started", third, "lane-1")
    send(view, "retried", third, "lane-1", error="a worker died")
    send(view, "damaged", third, "lane-1", state=heavy.id, error="checkpoint is cut short")
    send(view, "skipped", last)
    lines = [line[9:] for line in out.getvalue().splitlines()]
    assert lines[0].startswith("done     train schedule=full: finetune steps 0-6 under full (loss 0.167, 19 samples/s)")
    assert lines[1].endswith("finetune steps 0-3 under heavy by another run")
    assert lines[2] == "failed   evaluate schedule=full: vqa under final: no [/red] answers"
    assert lines[3].startswith("retried  train schedule=heavy: ") and lines[3].endswith(": a worker died")
    assert lines[4].startswith("damaged  ") and lines[5].startswith("skipped  train schedule=two_stage: ")
    header = shown(view, out)[0]
    assert header.startswith("1/9 jobs") and "2 failed" in header and "worker-hours" in header


def test_without_a_terminal_a_line_for_each_busy_lane(plan: ExperimentPlan) -> None:
    view, out = view_of(plan, plan.tree.work(plan.ledger), terminal=False)
    full, heavy, *_ = stage_runs(plan)
    spool(plan.ledger, full, 3)
    send(view, "started", full, "lane-0")
    send(view, "started", heavy, "lane-1")
    view.say_progress()
    first, second = out.getvalue().splitlines()
    assert "lane-0  train schedule=full: finetune steps 0-6 under full  step 3/6  loss 0.333" in first
    assert "lane-1  train schedule=heavy, schedule=two_stage: finetune steps 0-3 under heavy  loading" in second


def test_work_is_added_and_a_damaged_state_is_counted_again(plan: ExperimentPlan) -> None:
    progress = Progress(plan.ledger.metrics_file)
    full, heavy, third, last = stage_runs(plan)
    progress.set_work([full, heavy], {full.id: 10.0, heavy.id: 10.0})
    for job in (full, heavy):
        send(progress, "started", job)
        send(progress, "finished", job)
    assert (progress.snapshot().done, progress.snapshot().total) == (2, 2)
    send(progress, "started", full, "lane-1")
    progress.set_work([third, last], {third.id: 10.0, last.id: 10.0})
    now = progress.snapshot()
    assert (now.done, now.total) == (2, 4) and now.share == pytest.approx(0.5)
    assert [line.job for line in now.lanes] == [None, full]  # what runs stays, though the new plan does not name it
    send(progress, "started", third)
    send(progress, "damaged", third, state=heavy.id)
    progress.set_work([heavy, third, last], {})
    assert (progress.snapshot().done, progress.snapshot().total) == (1, 4)
    send(progress, "started", heavy)
    send(progress, "finished", heavy)
    assert progress.snapshot().done == 2


def test_time_left_is_shared_by_the_lanes_but_never_less_than_the_longest_way(plan: ExperimentPlan) -> None:
    clock, work = Clock(), stage_runs(plan)
    full, third = work[0], work[2]
    price = dict(zip([job.id for job in work], [60.0, 30.0, 30.0, 30.0], strict=True))

    def left(lanes: int) -> float | None:
        progress = Progress(plan.ledger.metrics_file, clock=clock)
        progress.set_work(work, price)
        assert progress.snapshot().seconds_left is None
        for lane in range(1, lanes):
            send(progress, "started", third, f"lane-{lane}")
            send(progress, "interrupted", third, f"lane-{lane}")
        send(progress, "started", full)
        clock.seconds += 120  # two seconds for each unit of cost
        send(progress, "finished", full)
        return progress.snapshot().seconds_left

    assert [left(1), left(2), left(3)] == [180.0, 120.0, 120.0]


def test_time_left_knows_loading_from_training_and_evaluations_from_initial_weights(plan: ExperimentPlan) -> None:
    clock, (root, full, *_) = Clock(), plan.tree.work(plan.ledger)
    test = next(iter(plan.tree.evaluations.values()))
    progress = Progress(plan.ledger.metrics_file, clock=clock)
    progress.set_work([root, full, test], {root.id: 1.0, full.id: 60.0, test.id: 512.0})
    send(progress, "started", root)
    clock.seconds = 1000
    send(progress, "finished", root)
    send(progress, "started", full)
    clock.seconds = 2000
    spool(plan.ledger, full, 1)
    assert progress.snapshot().seconds_left is None  # it has only loaded so far
    clock.seconds = 2004
    spool(plan.ledger, full, 5)
    # Four of its six steps in four seconds: 0.1 s for each unit of cost.
    assert progress.snapshot().seconds_left == pytest.approx(1.0 + 51.2)


def test_what_another_driver_did_tells_nothing_about_speed(plan: ExperimentPlan) -> None:
    clock, (full, heavy, *_) = Clock(), stage_runs(plan)
    progress = Progress(plan.ledger.metrics_file, clock=clock)
    progress.set_work([full, heavy], {full.id: 1.0, heavy.id: 1.0})
    clock.seconds = 100
    send(progress, "finished", full, elsewhere=True)
    now = progress.snapshot()
    assert (now.done, now.share, now.seconds_left) == (1, 0.5, None)


def test_hours_count_every_worker_of_a_lane_once_their_number_is_known(plan: ExperimentPlan) -> None:
    clock, (full, heavy, *_) = Clock(), stage_runs(plan)
    progress = Progress(plan.ledger.metrics_file, plan.ledger.result, clock)
    progress.set_work([full, heavy], {full.id: 1.0, heavy.id: 1.0})
    send(progress, "started", full)
    clock.seconds = 1800
    assert progress.snapshot().worker_hours is None
    finish(plan.ledger, full, fingerprint={"world_size": 8, "device": "NVIDIA A100-SXM4-80GB"})
    send(progress, "finished", full)
    send(progress, "started", heavy)
    clock.seconds = 3600
    now = progress.snapshot()
    assert now.worker_hours == pytest.approx(8.0) and now.unit == "GPU-hours"


def test_it_shows_itself_while_it_is_entered_and_ends_with_its_block(plan: ExperimentPlan) -> None:
    view, out = view_of(plan, plan.tree.work(plan.ledger))
    with view:
        send(view, "started", stage_runs(plan)[0])
    assert "0/9 jobs" in out.getvalue() and not view._thread.is_alive()


def test_what_an_earlier_attempt_did_tells_nothing_about_speed(plan: ExperimentPlan) -> None:
    clock, (full, heavy, *_) = Clock(), stage_runs(plan)
    progress = Progress(plan.ledger.metrics_file, clock=clock)
    progress.set_work([full, heavy], {full.id: 60.0, heavy.id: 60.0})
    spool(plan.ledger, full, 3)
    send(progress, "started", full)
    clock.seconds = 40
    now = progress.snapshot()
    assert now.share == 0.25 and now.seconds_left is None  # it loads, and has done no step yet
    spool(plan.ledger, full, 4)
    assert progress.snapshot().seconds_left is None
    clock.seconds = 42
    spool(plan.ledger, full, 5)
    assert progress.snapshot().seconds_left == pytest.approx(2 + 12)  # a step in two seconds
    send(progress, "finished", full)
    # 42 seconds for the three steps that this attempt trained.
    assert progress.snapshot().seconds_left == pytest.approx(60 * 42 / 30)


def test_trials_that_are_not_proposed_yet_count_like_those_that_are(plan: ExperimentPlan) -> None:
    clock, (full, heavy, *_) = Clock(), stage_runs(plan)
    progress = Progress(plan.ledger.metrics_file, clock=clock)
    progress.set_work([full], {full.id: 10.0}, to_come=3)
    send(progress, "started", full)
    clock.seconds = 20
    send(progress, "finished", full)
    now = progress.snapshot()
    assert (now.share, now.seconds_left) == (0.25, 60)
    progress.set_work([heavy], {heavy.id: 10.0}, to_come=1)
    now = progress.snapshot()
    assert (now.share, now.seconds_left) == (0.25, 60)

"""Verbs that work: run, bench."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.verbs.options import Json, MaxHours, Set, Spec, print_json, tell_unsent, terminal


def run(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray, for a debugger.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Takes up what failed before.")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stops at the first failure.")] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A trial: model, steps and data made small, in STORAGE/smoke.")
    ] = False,
    max_hours: MaxHours = None,
) -> None:
    """Run what is missing of SPEC, with live progress; ends with the table."""
    from rich.console import Console

    from orchestrator.report.ending import nothing_done, print_ending
    from orchestrator.report.table import render
    from orchestrator.run import run_experiment

    console = Console(stderr=True) if as_json else terminal()
    outcome = run_experiment(
        spec, set_ or (), local=local, retry_failed=retry_failed, fail_fast=fail_fast, max_hours=max_hours,
        smoke=smoke, console=console,
    )  # fmt: skip
    if as_json:
        document = json.loads(render(outcome.table, "json"))
        print_json({**document, "executed": outcome.executed, "failed": outcome.failed, "waiting": outcome.waiting})
    else:
        if outcome.tried == 0:
            console.print(nothing_done(outcome.failed, outcome.waiting), highlight=False)
        print_ending(outcome.walk, outcome.table, outcome.failed, outcome.waiting, console)
    tell_unsent(outcome.unsent, outcome.tracking_problem, outcome.tracking_notes)
    raise typer.Exit(outcome.exit_code)


def bench(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    text_tokens: Annotated[int, typer.Option("--text-tokens", min=1, metavar="N", help="Text tokens a sample.")] = 64,
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, metavar="N", help="Samples of the micro-batch (default: the phase's)."),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=7, metavar="N", help="Rounds of the medians.")] = 7,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.png", help="The chart (default: in the storage).")
    ] = None,
) -> None:
    """Measure the step time of each variant on this machine, beside the limit of the cost formula."""
    from orchestrator.bench import bench_experiment
    from orchestrator.plan.experiment_plan import prepare
    from orchestrator.report.bench_view import bench_figure, print_bench

    def tell(number: int) -> None:
        print(f"round {number} of {repeats}" if number else "warming up", file=sys.stderr, flush=True)

    document = bench_experiment(spec, set_ or (), text_tokens=text_tokens, rows=rows, repeats=repeats, on_round=tell)
    chart = output or prepare(spec, set_ or ()).ledger.storage / "bench" / f"{document['experiment']}.png"
    bench_figure(document, chart)
    if as_json:
        print_json(document)
    else:
        print_bench(document, terminal())
        print(f"chart: {chart}\nall figures: {chart.with_suffix('.json') if output is None else 'see the storage'}")

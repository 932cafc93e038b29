"""Verbs that compute: run, search, bench."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import orchestrator as llv
from orchestrator.verbs.options import Json, Set, Spec, print_json, terminal, warn_unsent

RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Runs again what failed before.")]
FailFast = Annotated[bool, typer.Option("--fail-fast", help="Stops at the first failure.")]
MaxHours = Annotated[
    float | None,
    typer.Option(
        "--max-hours", min=0, metavar="H", help="After H hours: checkpoint, stop, exit 75; the same command resumes."
    ),
]


def run(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray, for a debugger.")] = False,
    retry_failed: RetryFailed = False,
    fail_fast: FailFast = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A trial: model, steps and data made small, in STORAGE/smoke.")
    ] = False,
    max_hours: MaxHours = None,
) -> None:
    """Run what is missing of SPEC, with live progress; ends with the table."""
    experiment = llv.load(spec, set_ or ())
    outcome = experiment.run(
        local=local, retry_failed=retry_failed, fail_fast=fail_fast, max_hours=max_hours, smoke=smoke,
        console=terminal(error=as_json),
    )  # fmt: skip
    _end(outcome, as_json)


def search(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    retry_failed: RetryFailed = False,
    fail_fast: FailFast = False,
    max_hours: MaxHours = None,
) -> None:
    """Run the search that SPEC's `search` describes, with live progress; ends with the table and the Pareto front."""
    experiment = llv.load(spec, set_ or ())
    outcome = experiment.search(
        retry_failed=retry_failed, fail_fast=fail_fast, max_hours=max_hours, console=terminal(error=as_json)
    )
    _end(outcome, as_json)


def _end(outcome: llv.RunOutcome, as_json: bool) -> None:
    """Print how a run ended, and end with its exit code."""
    if as_json:
        print_json(outcome.document())
    else:
        outcome.print(terminal())
    warn_unsent(outcome.unsent, outcome.tracking_problem, outcome.tracking_notes)
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

    def announce(number: int) -> None:
        print(f"round {number} of {repeats}" if number else "warming up", file=sys.stderr, flush=True)

    experiment = llv.load(spec, set_ or ())
    document = experiment.bench(text_tokens=text_tokens, rows=rows, repeats=repeats, chart=output, on_round=announce)
    if as_json:
        print_json(document)
        return
    document.print(terminal())
    figures = experiment.storage.folder / "bench" / f"{experiment.name}.json"
    print(f"chart: {output or figures.with_suffix('.png')}\nall figures: {figures}")

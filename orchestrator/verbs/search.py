"""The verb `search`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from orchestrator.verbs.options import Json, MaxHours, Set, Spec, print_json, tell_unsent, terminal


def search(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Takes up what failed before.")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stops at the first failure.")] = False,
    max_hours: MaxHours = None,
) -> None:
    """Run the search that SPEC's `search` describes, with live progress; ends with the table and the Pareto front."""
    from rich.console import Console

    from orchestrator.report.ending import print_ending
    from orchestrator.report.table import render
    from orchestrator.search.search import front_trials, search_experiment

    console = Console(stderr=True) if as_json else terminal()
    outcome = search_experiment(
        spec, set_ or (), retry_failed=retry_failed, fail_fast=fail_fast, max_hours=max_hours, console=console
    )
    front = front_trials(outcome.walk)
    if as_json:
        document = json.loads(render(outcome.table, "json"))
        told = {"executed": outcome.executed, "front": front, "failed": outcome.failed, "waiting": outcome.waiting}
        print_json({**document, **told})
    else:
        print_ending(outcome.walk, outcome.table, outcome.failed, outcome.waiting, console)
        console.print(f"front: {', '.join(front) or 'no trial is finished'}", highlight=False)
    tell_unsent(outcome.unsent, outcome.tracking_problem, outcome.tracking_notes)
    raise typer.Exit(outcome.exit_code)

"""The verbs of `llavolta`. Heavy imports stay inside `run`: every other verb answers without torch, Ray or MLflow."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from orchestrator.errors import LlavoltaError, SpecError, UsageError

app = typer.Typer(
    name="llavolta",
    help="Experiments on stage-wise visual-token compression: a YAML file in, an efficiency-accuracy grid out.",
    epilog="Every verb takes --debug, which shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Spec = Annotated[Path, typer.Argument(metavar="SPEC", help="Experiment file.")]
Specs = Annotated[list[Path], typer.Argument(metavar="SPEC...", help="Experiment files; several make one table.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Overrides a value of the file.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output and nothing else.")]
CellName = Annotated[str, typer.Option("--cell", metavar="CELL", help="A name, an id's beginning, or axis=value.")]


def main() -> None:
    """Entry point: tells every error as one block and turns it into the exit code."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        code = app(arguments, standalone_mode=False)
    except LlavoltaError as error:
        if debug:
            raise
        code = error.exit_code
        _tell(error, as_json="--json" in arguments)
    except KeyboardInterrupt:
        code = 130
        print("stopped now; finished work is kept, run the same command to go on", file=sys.stderr)
    except BrokenPipeError:
        code = 0
    except OSError as error:
        if debug:
            raise
        code = 1
        print(f"error: {error.filename or 'the storage'}: {error.strerror or error}", file=sys.stderr)
    except typer.Abort:
        code = 130
    except Exception as error:
        # click's own errors (a missing argument, an unknown option) know how to show themselves.
        if debug or not hasattr(error, "show"):
            raise
        error.show()
        code = getattr(error, "exit_code", 2)
    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)


def _tell(error: LlavoltaError, *, as_json: bool) -> None:
    faults = error.faults if isinstance(error, SpecError) else ()
    if as_json:
        _print_json({"error": str(error), "faults": [vars(fault) for fault in faults]})
    elif faults:
        print(f"{len(faults)} fault{'s' if len(faults) != 1 else ''}:\n{error}", file=sys.stderr)
    else:
        print(f"error: {error}", file=sys.stderr)


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, default=str))


@app.command()
def validate(spec: Spec, set_: Set = None, as_json: Json = False) -> None:
    """Tells every fault of SPEC, or `valid: N cells`."""
    from orchestrator.spec.loader import load_experiment

    loaded = load_experiment(spec, set_ or ())
    if as_json:
        _print_json({"valid": True, "cells": len(loaded.cells), "notices": loaded.notices, "faults": []})
        return
    for notice in loaded.notices:
        print(f"note: {notice}", file=sys.stderr)
    print(f"valid: {len(loaded.cells)} cell{'s' if len(loaded.cells) != 1 else ''}")


@app.command()
def plan(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    text_tokens: Annotated[
        int | None, typer.Option("--text-tokens", min=0, metavar="N", help="Text tokens a sample (default: measured).")
    ] = None,
) -> None:
    """Cells, stage tree, what is done already, and what it costs, alone and shared."""
    from orchestrator.plan.document import plan_document
    from orchestrator.plan.walk import prepare

    walk = prepare(spec, set_ or ())
    document = plan_document(walk.loaded, walk.cells, walk.tree, walk.ledger, text_tokens=text_tokens)
    if as_json:
        _print_json(document)
        return
    from orchestrator.report.plan_view import print_plan

    print_plan(document, _console())


@app.command()
def run(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray, for a debugger.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Takes up what failed before.")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stops at the first failure.")] = False,
) -> None:
    """Runs what is missing of SPEC, with live progress; ends with the table."""
    from rich.console import Console

    from orchestrator.report.ending import print_ending
    from orchestrator.report.table import render
    from orchestrator.run import run_experiment

    console = Console(stderr=True) if as_json else _console()
    outcome = run_experiment(
        spec, set_ or (), local=local, retry_failed=retry_failed, fail_fast=fail_fast, console=console
    )
    if as_json:
        document = json.loads(render(outcome.table, "json"))
        _print_json({**document, "executed": outcome.executed, "failed": outcome.failed, "waiting": outcome.waiting})
    else:
        if outcome.executed == 0:
            console.print("nothing to do: what could be run is done", highlight=False)
        print_ending(outcome.walk, outcome.table, outcome.failed, outcome.waiting, console)
    if outcome.tracking_problem:
        print(
            f"MLflow has not recorded {', '.join(outcome.unsent)}: {outcome.tracking_problem}\n"
            "nothing is lost: run the same command when the server is up",
            file=sys.stderr,
        )
    raise typer.Exit(outcome.exit_code)


@app.command()
def status(specs: Specs, set_: Set = None, as_json: Json = False) -> None:
    """What is done, running, failed and still to do, a line a cell."""
    from orchestrator.plan.walk import prepare
    from orchestrator.report.status_view import print_status, status_document

    documents = [status_document(prepare(spec, set_ or ())) for spec in specs]
    if as_json:
        _print_json(documents[0] if len(documents) == 1 else documents)
    else:
        for document in documents:
            print_status(document, _console())


@app.command()
def table(
    specs: Specs,
    set_: Set = None,
    as_json: Json = False,
    form: Annotated[
        Literal["md", "csv", "latex", "json"] | None, typer.Option("--format", help="For a paper or a script.")
    ] = None,
    all_metrics: Annotated[bool, typer.Option("--all", help="Every metric, not the headline ones.")] = False,
) -> None:
    """The ablation table of one or several experiments."""
    from orchestrator.plan.walk import prepare
    from orchestrator.report.ending import print_table
    from orchestrator.report.table import render
    from orchestrator.run import table_of

    grid = table_of([prepare(spec, set_ or ()) for spec in specs], all_metrics=all_metrics)
    if form or as_json:
        print(render(grid, "json" if as_json else form or "md"))
    else:
        print_table(grid, _console())


@app.command()
def logs(spec: Spec, cell: CellName, set_: Set = None, as_json: Json = False) -> None:
    """What a cell's stage runs and evaluations printed, in order."""
    from orchestrator.plan.walk import prepare
    from orchestrator.report.cell_folders import log_files

    walk = prepare(spec, set_ or ())
    found = log_files(walk, walk.find(cell))
    if as_json:
        _print_json({str(path): path.read_text(errors="replace") for path in found})
        return
    if not found:
        raise UsageError(f"cell {walk.find(cell).name} has no log yet: it has not run in {walk.ledger.storage}")
    for path in found:
        print(f"==> {path} <==\n{path.read_text(errors='replace')}")


@app.command()
def path(spec: Spec, cell: CellName, set_: Set = None, as_json: Json = False) -> None:
    """The folder of a cell's weights."""
    from orchestrator.plan.walk import prepare

    walk = prepare(spec, set_ or ())
    found = walk.find(cell)
    weights = walk.folder(found) / "weights"
    if as_json:
        _print_json({"cell": found.name, "id": found.id, "weights": str(weights), "exists": weights.exists()})
        return
    if not weights.exists():
        raise UsageError(f"cell {found.name} has no weights yet: {weights} is not there; run the experiment first")
    print(weights)


@app.command()
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
    """Step time of each variant on this machine, beside the limit of the cost formula."""
    from orchestrator.bench import bench_experiment
    from orchestrator.plan.walk import prepare
    from orchestrator.report.bench_view import bench_figure, print_bench

    def tell(number: int) -> None:
        print(f"round {number} of {repeats}" if number else "warming up", file=sys.stderr, flush=True)

    document = bench_experiment(spec, set_ or (), text_tokens=text_tokens, rows=rows, repeats=repeats, on_round=tell)
    chart = output or prepare(spec, set_ or ()).ledger.storage / "bench" / f"{document['experiment']}.png"
    bench_figure(document, chart)
    if as_json:
        _print_json(document)
    else:
        print_bench(document, _console())
        print(f"chart: {chart}\nall figures: {chart.with_suffix('.json') if output is None else 'see the storage'}")


@app.command()
def compressors(as_json: Json = False) -> None:
    """The compressors there are, what they take and where they can act."""
    from orchestrator.report.component_view import compressor_documents, print_compressors

    if as_json:
        _print_json(compressor_documents())
    else:
        print_compressors(_console())


@app.command()
def schema() -> None:
    """JSON Schema of an experiment file, for an editor's completion."""
    from orchestrator.spec.schema import experiment_schema

    _print_json(experiment_schema())


@app.command()
def show(
    spec: Spec,
    set_: Set = None,
    as_json: Json = False,
    resolved: Annotated[bool, typer.Option("--resolved", help="Defaults filled in, and where each came from.")] = False,
) -> None:
    """The experiment as the program understands it."""
    from orchestrator.spec.loader import load_experiment, resolved_yaml

    loaded = load_experiment(spec, set_ or ())
    if as_json:
        _print_json({"spec": loaded.spec.model_dump(mode="json"), "sources": dict(loaded.sources)})
    else:
        print(resolved_yaml(loaded, with_sources=resolved), end="")


def _console() -> Any:
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 200)

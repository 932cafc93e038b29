"""Verbs on a storage: ledger ls, verify, gc."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.errors import UsageError
from orchestrator.verbs.options import Json, Set, print_json

if TYPE_CHECKING:
    from orchestrator.plan.ledger import Ledger

app = typer.Typer(
    help="What a storage holds, whether it is whole, and what of it can go.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
MaybeSpec = Annotated[
    Path | None, typer.Argument(metavar="[SPEC]", help="Experiment file, whose storage is meant.", show_default=False)
]
Storage = Annotated[
    str | None, typer.Option("--storage", metavar="PATH", help="The storage (default: $LLAVOLTA_STORAGE or ./runs).")
]


@app.command("ls")
def ls(spec: MaybeSpec = None, storage: Storage = None, set_: Set = None, as_json: Json = False) -> None:
    """List states, evaluations, failures and running work: size, age, and the experiments that reach them."""
    from orchestrator.plan.documents.ledger_document import ledger_document

    document = ledger_document(_ledger(spec, storage, set_))
    if as_json:
        print_json(document)
        return
    from orchestrator.report.ledger_report import print_ledger
    from orchestrator.verbs.options import terminal

    print_ledger(document, terminal())


@app.command("verify")
def verify(
    spec: MaybeSpec = None,
    storage: Storage = None,
    set_: Set = None,
    as_json: Json = False,
    discard: Annotated[
        bool, typer.Option("--discard", help="Takes out what is damaged: `run` trains it again.")
    ] = False,
) -> None:
    """Read every byte of every state and in-stage checkpoint; exit code 1 if anything is damaged."""
    from orchestrator.plan.documents.ledger_document import damage, discard_damage

    ledger = _ledger(spec, storage, set_)
    found = damage(ledger)
    if discard:
        discard_damage(ledger, found)
    if as_json:
        print_json({"storage": ledger.url, "damaged": found, "discarded": discard})
    else:
        for entry in found:
            step = f" step {entry['step']}" if "step" in entry else ""
            print(f"damaged {entry['kind']} {entry['id']}{step}: {', '.join(entry['files'])}")
        if not found:
            print(f"{ledger.url}: everything is whole")
        elif discard:
            print("taken out; run the experiment again, and it is trained again")
        else:
            print("`llavolta ledger verify --discard` takes it out, so that the next run trains it again")
    raise typer.Exit(1 if found else 0)


@app.command("gc")
def gc(
    spec: MaybeSpec = None,
    storage: Storage = None,
    set_: Set = None,
    as_json: Json = False,
    delete: Annotated[bool, typer.Option("--delete", help="Does it; without, it only says what would go.")] = False,
    forget: Annotated[
        list[str] | None, typer.Option("--forget", metavar="EXPERIMENT", help="This recorded experiment may go.")
    ] = None,
) -> None:
    """Delete what no recorded experiment reaches and what dead processes left behind; SPEC counts as recorded."""
    from orchestrator.plan.experiment_plan import prepare, reach_of
    from orchestrator.plan.ledger.gc import Collector

    walk = prepare(spec, set_ or ()) if spec is not None and storage is None else None
    ledger = walk.ledger if walk is not None else _ledger(spec, storage, set_)
    collector = Collector(ledger, [reach_of(walk)] if walk is not None else [], forget or (), sure=delete)
    steps: list[dict[str, Any]] = []
    for step in collector.steps():
        gone = step.remove() if delete else False
        steps.append({"kind": step.kind, "name": step.name, "why": step.why, "bytes": step.size, "removed": gone})
    counted = [entry for entry in steps if entry["removed"] or not delete]
    freed = sum(entry["bytes"] for entry in counted)
    if as_json:
        print_json({"storage": ledger.url, "deleted": delete, "bytes": freed, "steps": steps})
        return
    from orchestrator.report.ledger_report import size_text

    for entry in counted:
        print(f"{entry['kind']:<8} {entry['name']}  {size_text(entry['bytes'])}  {entry['why']}")
    if not collector.has_records:
        print("no experiment is recorded here, so every finished state stays: run each experiment once, or name SPEC")
    kinds = ", ".join(f"{many} x {kind}" for kind, many in Counter(entry["kind"] for entry in counted).items())
    if not counted:
        print(f"{ledger.url}: nothing can go")
    elif delete:
        print(f"freed {size_text(freed)}: {kinds}")
    else:
        print(f"{size_text(freed)} can go: {kinds}; nothing was touched, --delete does it")


def _ledger(spec: Path | None, storage: str | None, overrides: list[str] | None) -> Ledger:
    from orchestrator.plan.experiment_plan import refuse_secret, storage_path
    from orchestrator.plan.ledger import Ledger
    from orchestrator.spec.loader import load_experiment

    if spec is not None and storage is not None:
        raise UsageError("give SPEC or --storage, not both")
    if spec is not None:
        return Ledger(storage_path(load_experiment(spec, overrides or ())))
    place = storage or os.environ.get("LLAVOLTA_STORAGE") or "runs"
    refuse_secret(place)
    ledger = Ledger(place)
    if "://" not in place and not ledger.storage.is_dir():
        raise UsageError(f"there is no storage at {ledger.storage}; name one with --storage, or an experiment file")
    return ledger

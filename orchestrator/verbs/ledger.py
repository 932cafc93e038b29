"""Verbs on a storage: ledger ls, verify, gc."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import orchestrator as llv
from orchestrator.verbs.options import Json, Set, print_json, terminal

app = typer.Typer(
    help="List, verify and garbage-collect stored results.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
MaybeSpec = Annotated[
    Path | None, typer.Argument(metavar="[SPEC]", help="Experiment file, whose storage is meant.", show_default=False)
]
Place = Annotated[
    str | None, typer.Option("--storage", metavar="PATH", help="The storage (default: $LLAVOLTA_STORAGE or ./runs).")
]


@app.command("ls")
def ls(spec: MaybeSpec = None, storage: Place = None, set_: Set = None, as_json: Json = False) -> None:
    """List states, evaluations, failures and running work: size, age, and the experiments that reach them."""
    document = _storage(spec, storage, set_).ls()
    if as_json:
        print_json(document)
    else:
        document.print(terminal())


@app.command("verify")
def verify(
    spec: MaybeSpec = None,
    storage: Place = None,
    set_: Set = None,
    as_json: Json = False,
    discard: Annotated[bool, typer.Option("--discard", help="Removes what is damaged: `run` trains it again.")] = False,
) -> None:
    """Read every byte of every state and in-stage checkpoint; exit code 1 if anything is damaged."""
    stored = _storage(spec, storage, set_)
    found = stored.verify(discard=discard)
    if as_json:
        print_json({"storage": stored.url, "damaged": found, "discarded": discard})
        raise typer.Exit(1 if found else 0)
    for entry in found:
        step = f" step {entry['step']}" if "step" in entry else ""
        print(f"damaged {entry['kind']} {entry['id']}{step}: {', '.join(entry['files'])}")
    if not found:
        print(f"{stored.url}: everything is intact")
    elif discard:
        print("removed; the next run of the experiment trains it again")
    else:
        print("`llavolta ledger verify --discard` removes it, so that the next run trains it again")
    raise typer.Exit(1 if found else 0)


@app.command("gc")
def gc(
    spec: MaybeSpec = None,
    storage: Place = None,
    set_: Set = None,
    as_json: Json = False,
    delete: Annotated[bool, typer.Option("--delete", help="Deletes it; without, it is only listed.")] = False,
    forget: Annotated[
        list[str] | None,
        typer.Option("--forget", metavar="EXPERIMENT", help="A recorded experiment that no longer counts."),
    ] = None,
) -> None:
    """Delete what no recorded experiment reaches and what dead processes left behind; SPEC counts as recorded."""
    document = _storage(spec, storage, set_).gc(delete=delete, forget=forget or ())
    if as_json:
        print_json(document)
    else:
        document.print(terminal())


def _storage(spec: Path | None, place: str | None, overrides: list[str] | None) -> llv.Storage:
    if spec is None:
        return llv.Storage(place)
    if place is not None:
        raise llv.UsageError("give SPEC or --storage, not both")
    return llv.load(spec, overrides or ()).storage

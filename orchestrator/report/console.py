"""Plans, states, runs and storages as people read them on the screen."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from rich.tree import Tree

from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.redaction import redacted
from orchestrator.report.figures import experiment_figures
from orchestrator.report.pages import image_text, prompt_pieces, row_lengths, row_settings, row_title
from orchestrator.report.table import Table, plain_table
from orchestrator.report.units import (
    Operations,
    bound,
    counted,
    counted_noun,
    hours_text,
    legend,
    number,
    reason_lines,
    size_text,
    whose,
)
from orchestrator.tracking.mlflow_views import dashboard_address

TREE_LINES = 40
TABLE_ROWS = 60
REASONS = 20
_STYLES = {
    "done": "green",
    "finished": "green",
    "running": "bold cyan",
    "failed": "red",
    "interrupted": "yellow",
    "trained": "yellow",
    "stopped": "dim",
}
_FIRST = ("failed", "running", "interrupted", "waiting", "trained")


def state_text(state: str) -> Text:
    """Return a state in its colour."""
    return Text(state, style=_STYLES.get(state, ""))


def stage_tree(
    runs: Sequence[Mapping[str, Any]],
    label: Callable[[Mapping[str, Any]], Text],
    notes: Mapping[str | None, Sequence[Text]] | None = None,
    crop: bool = False,
) -> Tree:
    """Return the tree of stage runs as a plan or a status document lists them (parents first).

    Of a large one only the running and failed stage runs, and the way to them, are sure to be shown.

    Args:
        runs: Each with `id`, `parent` and `state`.
        label: Text of a stage run's line.
        notes: Further lines below a stage run, by its id; None for those below the root.
        crop: One line each, whatever is cut off on the right; for terminals.
    """
    notes = notes or {}
    shown = _chosen(runs)
    root = Tree("stage tree", highlight=False)
    branches: dict[str | None, Tree] = {None: root}

    def line(text: Text) -> Text:
        text.no_wrap, text.overflow = (True, "ellipsis") if crop else (None, None)
        return text

    for note in notes.get(None, ()):
        root.add(line(note))
    for run in runs:
        if run["id"] in shown:
            branch = branches.get(run["parent"], root).add(line(label(run)))
            branches[run["id"]] = branch
            for note in notes.get(run["id"], ()):
                branch.add(line(note))
    hidden = [run["state"] for run in runs if run["id"] not in shown]
    if hidden:
        root.add(Text(f"… {len(hidden):,} more stage runs: {counted(hidden)}", style="dim"))
    return root


def _rank(entry: Mapping[str, Any]) -> int:
    """Return the order in which stage runs and cells are chosen where not all can be shown."""
    return _FIRST.index(entry["state"]) if entry["state"] in _FIRST else len(_FIRST)


def _chosen(runs: Sequence[Mapping[str, Any]]) -> set[str]:
    parents = {run["id"]: run["parent"] for run in runs}
    chosen: set[str] = set()
    for run in sorted(runs, key=_rank):
        way, at = [], run["id"]
        while at is not None and at not in chosen:
            way.append(at)
            at = parents.get(at)
        if len(chosen) + len(way) <= TREE_LINES:
            chosen.update(way)
    return chosen


def print_cells(
    cells: Sequence[Mapping[str, Any]],
    columns: Mapping[str, Callable[[Mapping[str, Any]], str]],
    console: Console,
    right: Sequence[str] = (),
) -> None:
    """Print the cells: name, state and further columns; on a terminal a long list shows the interesting rows.

    Args:
        cells: Each with `name` and `state`.
        columns: Head to the text of a cell.
        right: Columns of numbers.
    """
    shown = list(cells)
    if console.is_terminal and len(cells) > TABLE_ROWS:
        best = {id(cell) for cell in sorted(cells, key=_rank)[:TREE_LINES]}
        shown = [cell for cell in cells if id(cell) in best]
    grid = plain_table(("cell", "state", *columns), right)
    for cell in shown:
        texts = [Text(text(cell)) for text in columns.values()]
        grid.add_row(Text(cell["name"]), state_text(cell["state"]), *texts)
    console.print(grid)
    if len(shown) < len(cells):
        chosen = {id(cell) for cell in shown}
        rest = counted(cell["state"] for cell in cells if id(cell) not in chosen)
        console.print(Text(f"… {len(cells) - len(shown):,} more cells: {rest} (all of them: --json)", style="dim"))


def print_reasons(
    cells: Sequence[Mapping[str, Any]], reasons: Callable[[Mapping[str, Any]], str], console: Console
) -> None:
    """Print why cells have work to do, each reason once with its cells; nothing where the state says it all."""
    groups: dict[str, list[str]] = {}
    for cell in cells:
        if text := reasons(cell):
            groups.setdefault(text, []).append(cell["name"])
    ranked = sorted(groups.items(), key=lambda entry: not entry[0].startswith("failed"))
    for text, names in ranked[:REASONS]:
        console.print(Text(f"{whose(names)}: {text}"))
    if len(ranked) > REASONS:
        console.print(Text(f"… {len(ranked) - REASONS:,} more reasons (all of them: --json)", style="dim"))


_KEPT = {"full": "", "weights": "keeps weights", "none": "keeps nothing"}
_SHOWN_BY_PLAN = ("new", "done")
"""Reasons that only repeat a cell's state in a plan."""


def print_plan(document: dict[str, Any], console: Console) -> None:
    """Print a plan document (docs/reference/json.md)."""
    cells = document["cells"]
    console.print(Text(document["experiment"], style="bold"))
    unit = Operations.of(cell["cost"].get("train_tflops") for cell in cells)
    columns = {
        f"train {unit.name}": lambda cell: bound(unit.text(cell["cost"].get("train_tflops")), cell["cost"]),
        "visual layer-tokens": lambda cell: bound(number(cell["cost"].get("visual_layer_tokens"), 1), cell["cost"]),
        "CR": lambda cell: bound(number(cell["cost"].get("compression_ratio"), 3), cell["cost"], "≥"),
    }
    if cells:
        print_cells(cells, columns, console, right=tuple(columns))
        console.print(Text(legend(columns) or "", style="dim"))
        print_reasons(cells, _why, console)
    else:
        console.print("no cells yet: `llavolta search` proposes them", markup=False)
    if document["variants"]:
        console.print(_variants(document["variants"]))
    if shown := [entry for entry in document["memory"] if _held_gib(entry) >= 1]:
        console.print(_memory(shown))
    if cells:
        names = _names_by_id(cells)
        cells_of = {run["id"]: run["cells"] for run in document["stage_runs"]}
        tree = stage_tree(
            document["stage_runs"],
            lambda run: _planned_label(run, names, unit, cells_of.get(run["parent"])),
            crop=console.is_terminal,
        )
        console.print(tree)
    is_bound = any("at_most" in run["cost"] for run in document["stage_runs"])
    for line in _totals(document["totals"], is_bound) if cells else ():
        console.print(line, highlight=False, markup=False)
    for notice in document.get("notices", ()):
        console.print(f"note: {notice}", highlight=False, markup=False)


def _names_by_id(cells: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the cell id to the names that it has in the grid: cells that are the same work share theirs."""
    names: dict[str, list[str]] = {}
    for cell in cells:
        names.setdefault(cell["id"], []).append(cell["name"])
    return names


def _named(ids: Iterable[str], names: Mapping[str, list[str]]) -> list[str]:
    return [name for identity in ids for name in names[identity]]


def _why(cell: Mapping[str, Any]) -> str:
    """Return why a cell runs, but for what its state says; equal for cells that differ alike from their finished
    namesakes.
    """
    namesake = f"differs from finished cell {cell['name']}: "
    reasons = [reason for reason in cell.get("reasons", ()) if reason not in _SHOWN_BY_PLAN]
    return "; ".join(reason.replace(namesake, "differs from the finished cell of its name: ", 1) for reason in reasons)


def _planned_label(
    run: Mapping[str, Any], names: Mapping[str, list[str]], unit: Operations, above: list[str] | None
) -> Text:
    # Whose it is need not be said again along a way that is one cell's alone.
    cells = [] if run["cells"] == above else _named(run["cells"], names)
    of = f" of {run['of']}" if run["of"] else ""
    parts = [
        Text(f"{run['phase']} {run['first_step']}-{run['last_step']}{of}"),
        Text(run["variant"], style="bold"),
        state_text(run["state"]),
        Text(f"{bound(unit.text(run['cost'].get('train_tflops')), run['cost'])} {unit.name}"),
        Text(whose(cells)),
        Text(_KEPT[run["keep"]], style="dim"),
    ]
    return Text("  ").join(part for part in parts if part)


def _totals(totals: Mapping[str, Any], is_bound: bool) -> list[str]:
    """Return what sharing saves, what is done, and what it takes."""
    alone, shared, ratio = (totals.get(f"train_{name}") for name in ("tflops_alone", "tflops_shared", "ratio"))
    unit = Operations.of([alone, shared])
    operations = [bound(unit.text(value), {"at_most": is_bound}) for value in (shared, alone)]
    saved = "" if ratio is None else f" (ratio {ratio:.3f}: sharing saves {max(0.0, 1 - ratio):.0%})"
    runs, tests = (
        counted_noun(totals[key], noun) for key, noun in (("stage_runs", "stage run"), ("evaluations", "evaluation"))
    )
    lines = [
        f"{counted_noun(totals['cells'], 'cell')}: {runs} for {totals['stage_runs_alone']:,} alone, "
        f"{totals['stage_runs_done']:,} done; {tests} for {totals['evaluations_alone']:,} alone, "
        f"{totals['evaluations_done']:,} done",
        f"train {unit.name} {operations[0]} shared, {operations[1]} alone{saved}; "
        f"disk at most {number(totals.get('disk_peak_gib'))} GiB",
    ]
    return [*lines, hours] if (hours := hours_text(totals)) else lines


def _variants(variants: list[dict[str, Any]]) -> RichTable:
    """Return what each variant keeps of an image."""
    figures = ("kept tokens", "layer average", "CR")
    grid = plain_table(("variant", "methods and layers", *figures), figures)
    for variant in variants:
        points = variant["points"]
        grid.add_row(
            Text(variant["name"] + (f" (control {variant['control']})" if variant["control"] else "")),
            ", ".join(f"{point['kind']} at {point['layer']}" for point in points),
            ", ".join(bound(number(point["kept_tokens"], 0), variant) for point in points),
            bound(number(variant["layer_average_tokens"], 1), variant),
            bound(number(variant["compression_ratio"], 3), variant, "≥"),
        )
    return grid


def _held_gib(entry: Mapping[str, Any]) -> float:
    """Return what a worker holds beside buffers, whose size does not hang on the model's."""
    parts = (entry[f"{name}_gib"] for name in ("weights", "optimizer", "gradients", "activations", "host"))
    return float(sum(part or 0 for part in parts))


def _memory(entries: Sequence[Mapping[str, Any]]) -> RichTable:
    """Return what a worker of each phase needs."""
    figures = ("weights", "optimizer", "gradients", "buffers", "activations", "device", "host")
    grid = plain_table(("GiB of a worker, at most", "DeepSpeed", "workers", "samples", *figures), figures)
    for entry in entries:
        samples = entry["per_device_train_batch_size"]
        under = "" if entry["under"] is None else f" under {entry['under']}"
        grid.add_row(
            Text(f"{entry['phase']}, {entry['dtype']}"),
            Text(entry["deepspeed"]),
            str(entry["num_workers"]),
            f"{'auto, 1' if samples is None else samples} x {entry['model_max_length']:,} tokens{under}",
            *(number(entry[f"{name}_gib"], 1) for name in figures),
        )
    return grid


_SHOWN_BY_STATUS = ("new", "done", "runs elsewhere")
"""Beginnings of reasons that only repeat what a status or its tree shows."""


def print_status(document: dict[str, Any], console: Console) -> None:
    """Print the totals, a line a cell, the stage tree with what runs where, and what failed."""
    cells, totals = document["cells"], document["totals"]
    names = _names_by_id(cells)
    console.print(Text(f"{document['experiment']}  {document['storage']}", style="bold"), soft_wrap=True)
    console.print(
        f"{counted_noun(len(cells), 'cell')}: {counted(cell['state'] for cell in cells)}; "
        f"{totals['stage_runs_done']:,}/{totals['stage_runs']:,} stage runs, "
        f"{totals['evaluations_done']:,}/{totals['evaluations']:,} evaluations done",
        highlight=False,
    )
    if hours := hours_text(totals):
        console.print(hours, highlight=False)
    columns = {
        "steps": lambda cell: f"{cell['steps_done']}/{cell['steps']}",
        "id": lambda cell: cell["id"][:12],
    }
    print_cells(cells, columns, console)
    print_reasons(
        cells, lambda cell: "; ".join(r for r in cell["reasons"] if not r.startswith(_SHOWN_BY_STATUS)), console
    )
    runs = document["stage_runs"]
    notes: dict[str | None, list[Text]] = {}
    known = {run["id"] for run in runs}
    for test in document["evaluations"]:
        if test["state"] == "running" or test["error"]:
            notes.setdefault(test["of"] if test["of"] in known else None, []).append(_evaluation_label(test, names))
    for root in document["roots"]:
        if root["state"] == "running" or root["error"]:
            notes.setdefault(None, []).append(_line(Text("initial weights"), root))
    console.print(stage_tree(runs, lambda run: _label(run, names), notes, crop=console.is_terminal))
    _print_failures(document, console)


def _label(run: Mapping[str, Any], names: Mapping[str, list[str]]) -> Text:
    line = Text(f"{run['phase']} {run['first_step']}-{run['last_step']}  ")
    line.append(run["variant"], style="bold")
    parts = [line]
    if run["state"] != "done" and run["steps_done"]:
        figures = f"step {run['step'] + 1}/{run['last_step']}"
        if run["state"] == "running":
            figures += f"  loss {run['loss']:.3f}  {run['samples_per_second']:.0f} samples/s"
        parts.append(Text(figures))
    return _line(Text("  ").join(parts), run, _named(run["cells"], names))


def _evaluation_label(test: Mapping[str, Any], names: Mapping[str, list[str]]) -> Text:
    return _line(Text(f"evaluate {test['name']} under {test['under']}"), test, _named(test["cells"], names))


def _line(what: Text, job: Mapping[str, Any], cells: list[str] | None = None) -> Text:
    """Return what it is, its state, who works on it, for whom."""
    parts = [what, state_text(job["state"])]
    if holder := job["holder"]:
        parts.append(Text(f"{holder['lane']} pid {holder['pid']} on {holder['host']}".strip(), style="cyan"))
    if cells:
        parts.append(Text(whose(cells)))
    return Text("  ").join(parts)


def _print_failures(document: dict[str, Any], console: Console) -> None:
    for job in (*document["roots"], *document["stage_runs"], *document["evaluations"]):
        if job["error"]:
            steps = f"{job['phase']} {job['first_step']}-{job['last_step']}" if "phase" in job else None
            log = [f"log: {job['log']}"] if job["log"] else []
            _print_failure(console, steps or job.get("name", "root"), job["error"], *log)


def _print_failure(console: Console, what: str, error: str, *further: str) -> None:
    first, *more = reason_lines(error)
    _say(console, f"failed: {what}: {first}", "red")
    for line in (*more, *further):
        _say(console, f"        {line}")


_SHOWN_CELLS = 3


def print_ledger(document: dict[str, Any], console: Console) -> None:
    """Print what `ledger_document` found."""
    console.print(f"{document['storage']}: {size_text(document['bytes'])}", highlight=False)
    states = (
        (e["id"][:12], e["phase"] or e["type"] or "damaged", _steps(e), ", ".join(e["kept"]) or "result",
         size_text(e["bytes"]), _when(e["when"]), _reached(e))
        for e in document["states"]
    )  # fmt: skip
    _print(console, ("state", "phase", "steps", "kept", "size", "finished", "reached by"), states)
    unfinished = (
        (e["id"][:12], ", ".join(map(str, e["steps"])) or "none", size_text(e["bytes"]),
         "running" if e["running"] else "left")
        for e in document["work"]
    )  # fmt: skip
    _print(console, ("unfinished work", "checkpoints at step", "size", ""), unfinished)
    scores = (
        (e["id"][:12], ", ".join(f"{k} {v:.4g}" for k, v in e["metrics"].items()), ", ".join(e["experiments"]))
        for e in document["evaluations"]
    )
    _print(console, ("evaluation", "metrics", "reached by"), scores)
    _print(console, ("failure", "why"), ((e["id"][:12], e["error"]) for e in document["failures"]))
    leases = ((e["id"][:12], e["lane"], f"pid {e['pid']} on {e['host']}") for e in document["leases"])
    _print(console, ("lease", "lane", "held by"), leases)
    counts = ("proposed", "finished", "failed")
    searches = ((e["id"][:12], *(str(e[state]) for state in counts)) for e in document["searches"])
    _print(console, ("search", *counts), searches)
    experiments = ((e["name"], e["file"], str(e["cells"]), _when(e["when"])) for e in document["experiments"])
    _print(console, ("experiment", "file", "cells", "recorded"), experiments)


def _print(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = RichTable(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*row)
    if table.row_count:
        console.print()
        console.print(table, highlight=False)


def _steps(entry: dict[str, Any]) -> str:
    return "" if entry["last_step"] is None else f"{entry['first_step']} to {entry['last_step']}"


def _when(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _reached(entry: dict[str, Any]) -> str:
    if not entry["experiments"]:
        return "no recorded experiment"
    cells = entry["cells"]
    more = f" and {len(cells) - _SHOWN_CELLS} more" if len(cells) > _SHOWN_CELLS else ""
    return f"{', '.join(entry['experiments'])}: {', '.join(cells[:_SHOWN_CELLS])}{more}"


def print_garbage(document: dict[str, Any], console: Console, *, has_records: bool = True) -> None:
    """Print what `gc` found or deleted.

    Args:
        has_records: Whether any experiment is recorded there; without one every finished state stays.
    """
    deleted = document["deleted"]
    counted_steps = [step for step in document["steps"] if step["removed"] or not deleted]
    for step in counted_steps:
        _say(console, f"{step['kind']:<8} {step['name']}  {size_text(step['bytes'])}  {step['why']}")
    if not has_records:
        _say(console, "no experiment is recorded here, so every finished state stays: run each experiment once, "
             "or name SPEC")  # fmt: skip
    kinds = ", ".join(f"{many} x {kind}" for kind, many in Counter(step["kind"] for step in counted_steps).items())
    if not counted_steps:
        _say(console, f"{document['storage']}: nothing can be deleted")
    elif deleted:
        _say(console, f"freed {size_text(document['bytes'])}: {kinds}")
    else:
        _say(console, f"{size_text(document['bytes'])} can be deleted: {kinds}; nothing was touched, --delete does it")


def _say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is, however long."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def print_bench(document: dict[str, Any], console: Console) -> None:
    """Print a bench document."""
    console.print(
        f"[bold]{document['experiment']}[/bold]: forward and backward of {document['rows']} samples, "
        f"{document['visual_tokens']} visual + {document['text_tokens']} text tokens each; {document['device']}, "
        f"{document['threads']} threads, {document['dtype']}, {document['attn_implementation']}; medians of "
        f"{document['repeats']}",
        highlight=False,
    )
    figures = ("step s", "tokens/s", "peak GiB", "speed-up", "by formula", "ratio", "overhead")
    grid = plain_table(("variant", *figures), figures)
    for row in document["variants"]:
        overhead = row["overhead"]
        grid.add_row(
            row["name"],
            f"{row['step_seconds']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_memory_gib']:.2f}",
            f"{row['speedup_measured']:.2f}",
            f"{row['speedup_predicted']:.2f}",
            f"{row['ratio']:.2f}",
            "–" if overhead is None else f"{overhead:.1%}",
        )
    console.print(grid)
    console.print(
        "speed-up: against full tokens in the same round; by formula: from operations alone; overhead: beyond dropping "
        "as many tokens by position, as a share of the full step",
        highlight=False,
    )


def print_predictions(document: dict[str, Any], console: Console) -> None:
    """Print the answers of an evaluation, a JSON document a line."""
    for each in document["predictions"]:
        _say(console, json.dumps(each, ensure_ascii=False))


_BEGIN, _END = "«", "»"


def print_check(document: dict[str, Any], console: Console) -> None:
    """Print a block for each data set and use: rows, lengths, notes, what is dropped, every error."""
    blocks = []
    for each in document["sets"]:
        lines = [f"data.{each['name']} ({each['kind']}), {each['where']}: {each['rows']:,} rows"]
        for name, spread in each["lengths"].items():
            middle = f"median {spread['median']:g}, mean {spread['mean']:g}, 95% up to {spread['p95']:g}"
            ends = f"{spread['min']} to {spread['max']} (row {spread['longest_row']})"
            lines.append(f"    {name.replace('_', ' ')} a row: {ends}, {middle}")
        lines += [f"    note: {note}" for note in each["notes"]]
        for kind, word in (("dropped", "dropped"), ("errors", "error")):
            lines += [f"    {word}: {_where(entry)}{entry['error']}" for entry in each[kind]]
        blocks.append("\n".join(lines))
    errors = sum(len(each["errors"]) for each in document["sets"])
    verdict = (
        "every row can be used, or is dropped as the file allows"
        if document["valid"]
        else counted_noun(errors, "error")
    )
    _print_plain([*blocks, verdict], console)


def _where(entry: Mapping[str, Any]) -> str:
    return "" if entry["row"] is None else f"row {entry['row']}: "


def print_sources(document: dict[str, Any], console: Console) -> None:
    """Print a line for each thing that an experiment reads: where it is, or why not."""
    lines = []
    for each in document["sources"]:
        name = each["name"] if each["revision"] is None else f"{each['name']} ({each['revision']})"
        found = each["problem"] or f"{size_text(each['bytes'])} in {each['folder']}"
        lines.append(f"{each['key']}: {name}: {'missing: ' if each['problem'] else ''}{found}")
    missing = sum(each["problem"] is not None for each in document["sources"])
    verdict = f"{missing} of {len(lines)} missing" if missing else "complete: a run needs no network"
    _print_plain([*lines, verdict], console)


def print_row(document: dict[str, Any], console: Console) -> None:
    """Print a row of data; what is learned stands between « and »."""
    lines = [row_title(document), row_settings(document), ""]
    for index, image in enumerate(document["images"], 1):
        lines.append(f"picture {index}: {image['path']}  {image_text(image)}")
    lines += ["", "".join(_BEGIN + text + _END if learned else text for text, learned in prompt_pieces(document)), ""]
    if document["expected"] is not None:
        lines.append(f"right answer: {document['expected']}")
    lines += [f"{name}: {value}" for name, value in row_lengths(document).items()]
    tokens = []
    for learned, run in groupby(document["tokens"], key=lambda token: token["learned"]):
        texts = " ".join(f"{one['text']} x{one['count']}" if one["count"] > 1 else one["text"] for one in run)
        tokens.append(f"{_BEGIN}{texts}{_END}" if learned else texts)
    lines += ["", "as tokens:", *wrap(" ".join(tokens), 118, break_long_words=False, break_on_hyphens=False)]
    _print_plain(lines, console)


def _print_plain(lines: Sequence[str], console: Console) -> None:
    """Print lines as they are: neither wrapped nor marked up."""
    console.out("\n".join(lines), highlight=False)


def nothing_done(failed: Mapping[str, str], waiting: Mapping[str, str]) -> str:
    """Return why a run did nothing."""
    if failed:
        return f"nothing was run: {counted_noun(len(failed), 'cell')} failed before; --retry-failed takes them up again"
    if waiting:
        return f"nothing was run: {counted_noun(len(waiting), 'cell')} could not be finished now"
    return "nothing to do: all runnable jobs are complete"


def print_ending(
    plan: ExperimentPlan,
    table: Table,
    failed: Mapping[str, str],
    waiting: Mapping[str, str],
    console: Console,
    experiment_id: str | None = None,
) -> None:
    """Print the table, every failure with its reason, where the figure is, and how to open MLflow.

    Args:
        plan: The experiment.
        table: Its table.
        failed: Cells to the reason.
        waiting: Cells that neither finished nor failed, to the reason.
        console: Where to print.
        experiment_id: MLflow's number of the experiment; None where it is not known, as when the server is down.
    """
    console.print()
    table.print(console)
    console.print()
    spec = plan.loaded.path
    for name, reason in failed.items():
        _print_failure(console, name, reason, f"llavolta logs {shlex.quote(str(spec))} --cell {shlex.quote(name)}")
    if failed:
        _say(console, "again:  add --retry-failed to the same command")
    for name, reason in waiting.items():
        _say(console, f"not finished: {name}{': ' if reason else ''}{reason}", "yellow")
    if waiting:
        _say(console, "again:  the same command resumes where this one stopped")
    for figure in experiment_figures(plan, table):
        _say(console, f"figure: {figure}")
    uri = plan.tracking_uri
    server = uri if uri.startswith("http") else "http://127.0.0.1:5000"
    address = server if experiment_id is None else dashboard_address(server, experiment_id)
    if uri.startswith("http"):
        line = f"MLflow: {redacted(address)}{'' if experiment_id else f', experiment {plan.experiment_name}'}"
    else:
        # A database's password comes in the environment only, so that the variable stands for it.
        store = shlex.quote(uri) if redacted(uri) == uri else '"$MLFLOW_TRACKING_URI"'
        line = f"MLflow: mlflow server --backend-store-uri {store} --port 5000   then open {address}"
    _say(console, line)

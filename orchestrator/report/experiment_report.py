"""The report: one HTML file about one or several experiments that works offline, and the document behind it."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from importlib import resources
from typing import Any

from rich.console import Console

from orchestrator.errors import StorageError, UsageError
from orchestrator.plan.cell_record import CellRecord
from orchestrator.plan.cells.cell import PROMOTED
from orchestrator.plan.documents import plan_document
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.redaction import redacted
from orchestrator.report.documents import finite
from orchestrator.report.front import GREY, OTHER_TRIALS, PALETTE, front_of_rows, palette_key
from orchestrator.report.pages import card, predictions_document
from orchestrator.report.sweeps import LEVEL
from orchestrator.report.table import BOUND, Row, Table, header, table_of, text_cells
from orchestrator.report.units import (
    Operations,
    counted_noun,
    difference_text,
    lower_is_better,
    metric_text,
    number,
    operations,
)
from orchestrator.spec.loaded import resolved_yaml
from orchestrator.spec.search_space import trial_name

COST = "cost/train_tflops"
SHARES = (1.0, 0.75, 0.5, 0.25)
"""Shares of the baseline's cost for which the report names the best row."""
MOST_CURVES = 60
"""Cells whose curves are in the report: more would make it slow to open."""
CURVE_POINTS = 250
MOST_SCHEDULES = 40
ANSWERS = 8
"""Wrong answers shown of a row."""
MOST_ANSWERED = 8
_CURVES = ("train/loss", "train/distill_loss")
_TOKENS = "train/visual_tokens"


def report_document(plans: Sequence[ExperimentPlan], *, answers: int = ANSWERS) -> dict[str, Any]:
    """Return all that the report shows, as data.

    Args:
        plans: The experiments, as they are now.
        answers: Wrong answers of each row's first cell, with the paths of their pictures; 0 for none.

    Returns:
        `title`, `made`, `in_short` (sentences), `experiments` (each with its `plan`), `table`, `rows` (values of every
        row and of its cells), `scores`, `costs` (both by name), `fronts`, `schedules`, `curves`, `answers`.
    """
    table = table_of(plans)
    records = [{cell.name: plan.record(cell) for cell in plan.cells} for plan in plans]
    shown = [RowRecords(row, tuple(records[row.origin][name] for name in row.cells)) for row in table.rows]
    planned = [plan_document(plan.loaded, plan.cells, plan.tree, plan.ledger) for plan in plans]
    scores, costs = (_columns(table, prefix) for prefix in ("eval/", "cost/"))
    head, body = text_cells(table)
    sweeps = [{**sweep.document(), "along": sweep.along} for sweep in table.sweeps]
    return {
        "title": ", ".join(plan.loaded.spec.name for plan in plans),
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "in_short": [*_in_short(table, scores), *map(_price, planned), *_searched(plans)],
        "experiments": [_experiment(*each) for each in zip(plans, planned, records, strict=True)],
        "table": {
            **table.document(),
            "sweeps": sweeps,
            "head": head,
            "body": body,
            "explanations": table.explanations(),
        },
        "rows": list(map(_row, table.rows)),
        "scores": {name: {"title": header(name), "lower_is_better": lower_is_better(name)} for name in scores},
        "costs": {name: header(name) for name in costs},
        "fronts": {score: {cost: front_of_rows(table.rows, score, cost) for cost in costs} for score in scores},
        "schedules": _schedules(shown),
        "curves": _curves(shown),
        "answers": list(_answers(table.rows, plans, answers)) if answers else [],
    }


@dataclass(frozen=True)
class RowRecords:
    """A row of the table and the records of its cells."""

    row: Row
    records: tuple[CellRecord, ...]


def _columns(table: Table, prefix: str) -> list[str]:
    """Return the scores or costs that the table shows, sweeps aside; of costs then the others that cells have."""
    swept = {score.column for sweep in table.sweeps for score in sweep.scores if score.values}
    names = [name for name in table.columns if name.startswith(prefix) and name not in swept]
    more = (name for row in table.rows for each in row.summaries for name in each if name.startswith("cost/"))
    return list(dict.fromkeys([*names, *more] if prefix == "cost/" else names))


def _row(row: Row) -> dict[str, Any]:
    cells = [{"name": name, "values": values} for name, values in zip(row.cells, row.summaries, strict=True)]
    return {
        "name": row.name, "colour": palette_key(row), "status": row.status, "marks": row.marks, "values": row.values,
        "is_trial": row.is_trial, "ci95": row.ci95, "cells": cells,
    }  # fmt: skip


def _in_short(table: Table, scores: Sequence[str]) -> Iterator[str]:
    """Yield what a reader should conclude: the baseline, and the best row at shares of its cost."""
    done = [row for row in table.rows if row.status == "finished"]
    if len(done) < len(table.rows):
        yield f"{len(done)} of {counted_noun(len(table.rows), 'row')} finished; what follows is of those."
    score = next(iter(scores), None)
    rows = [row for row in done if score in row.values and COST in row.values and BOUND not in row.marks]
    bases = [row for row in rows if "baseline" in row.marks]
    if score is None or not rows:
        return
    unit = Operations.of(row.values[COST] for row in rows)

    def told(row: Row) -> str:
        half = row.ci95.get(score)
        interval = "" if half is None else f" ± {metric_text(score, half)}"
        value, cost = metric_text(score, row.values[score]), unit.text(row.values[COST])
        return f"{row.name} has {value}{interval} for {cost} {unit.name}"

    def best(among: Sequence[Row]) -> Row:
        sign = 1 if lower_is_better(score) else -1
        return min(among, key=lambda row: (sign * row.values[score], row.values[COST]))

    if len(bases) != 1:
        promoted = [row for row in rows if PROMOTED in row.marks]
        chosen = " among the trials that were run again" if promoted else ""
        yield f"Best {header(score)}{chosen}: {told(best(promoted or rows))}."
        return
    (base,) = bases
    rows = [row for row in rows if row is base or row.against]
    tests = dict(zip((row.name for row in table.rows), table.tests(), strict=True))
    yield f"Baseline, {header(score)}: {told(base)} of training."
    named: dict[str, list[str]] = {}
    nothing = []
    for share in SHARES:
        # As many steps as cost the same are rounded to whole ones.
        within = [row for row in rows if row is not base and row.values[COST] <= share * base.values[COST] * 1.001]
        if within:
            named.setdefault(best(within).name, []).append(f"{share:.0%}")
        else:
            nothing.append(f"{share:.0%}")
    for name, shares in named.items():
        row = next(row for row in rows if row.name == name)
        sure = _sure(tests[name].get(score, {}).get("p_corrected"))
        difference = difference_text(score, row.values[score], row.values[score] - base.values[score])
        cheaper = row.values[COST] / base.values[COST]
        yield f"Best with at most {' or '.join(shares)} of its cost: {told(row)} ({cheaper:.0%}), {difference}, {sure}."
    if nothing:
        yield f"No other row has at most {' or '.join(nothing)} of its cost."


def _sure(p_corrected: float | None) -> str:
    if p_corrected is None:
        return "not tested, so it may be chance"
    more = "more" if p_corrected < LEVEL else "no more"
    return f"{more} than chance (corrected p {p_corrected:.2g})"


def _price(planned: Mapping[str, Any]) -> str:
    """Return what an experiment's training costs, and what sharing saved."""
    totals = planned["totals"]
    alone, shared = totals["train_tflops_alone"], totals["train_tflops_shared"]
    text = f"{planned['experiment']}: {counted_noun(totals['cells'], 'cell')}"
    if shared is None:
        return f"{text}; what they cost is not known for this model."
    text += f", {operations(shared)} of training"
    if "train_ratio" in totals:
        saved = 1 - totals["train_ratio"]
        # Sums of equal numbers in another order differ in their last bits.
        text += (
            f"; alone they would cost {operations(alone)}, {saved:.0%} of which equal beginnings save"
            if saved > 1e-9
            else "; no cell begins like another, so nothing is shared"
        )
    for kind, name in (("gpu", "GPU"), ("worker", "worker")):
        if (hours := totals.get(f"{kind}_hours_done")) is not None:
            text += f"; {number(hours)} {name}-hours so far"
    return f"{text}."


def _searched(plans: Sequence[ExperimentPlan]) -> Iterator[str]:
    """Yield of each search how its trials ended, what they added to what was stored, and which are on its front."""
    for plan in plans:
        if plan.loaded.spec.search is None or not plan.trials:
            continue
        states = Counter(trial.state for trial in plan.trials)
        text = f"{plan.loaded.spec.name}: {counted_noun(len(plan.trials), 'trial')}"
        others = ", ".join(f"{number} {state}" for state, number in states.items() if state != "finished")
        added = [trial.added_train_tflops for trial in plan.trials]
        known = [each for each in added if each is not None]
        text += f" ({others})" if others else ""
        text += f" added {operations(sum(known))} of training" if len(known) == len(added) else ""
        front = [trial_name(trial.number) for trial in plan.trials if plan.front.issuperset(trial.cells or ("",))]
        yield f"{text}; on the front: {', '.join(front) or 'none yet'}."


def _experiment(plan: ExperimentPlan, planned: Mapping[str, Any], records: Mapping[str, CellRecord]) -> dict[str, Any]:
    spec, settings = plan.loaded.spec, [text for each in plan.loaded.overrides for text in ("--set", each)]
    verb = "run" if spec.search is None else "search"
    tags: dict[str, dict[str, None]] = {}
    for record in records.values():
        for name, value in record.tags.items():
            if name in ("hardware", "versions", "attention") or name.startswith("fingerprint."):
                tags.setdefault(name.removeprefix("fingerprint."), {})[value] = None
    return {
        "name": spec.name,
        "description": spec.description or "",
        "command": redacted(shlex.join(["llavolta", verb, str(plan.loaded.path), *settings])),
        "environment": {name: [value for value in values if value] for name, values in tags.items()},
        "yaml": redacted(resolved_yaml(plan.loaded, with_sources=False)),
        "plan": planned,
    }


def _schedules(shown: Sequence[RowRecords]) -> list[dict[str, Any]]:
    """Return the visual tokens of a sample, mean over the decoder's layers, as they ran in each row's first cell:
    `[step, tokens]` where they change; equal ones once, with the rows that they are of."""
    found: dict[tuple[tuple[int, float], ...], list[Row]] = {}
    for one in shown:
        measured = sorted((step, value) for key, value, step, _ in one.records[0].history if key == _TOKENS)
        changes = [
            point
            for before, point in zip([None, *measured], measured, strict=False)
            if before is None or before[1] != point[1]
        ]
        if measured:
            last, tokens = measured[-1]
            found.setdefault((*changes, (last + 1, tokens)), []).append(one.row)
    return [
        {"rows": [row.name for row in of], "colour": palette_key(of[0]), "steps": steps}
        for steps, of in list(found.items())[:MOST_SCHEDULES]
    ]


def _curves(shown: Sequence[RowRecords]) -> dict[str, list[dict[str, Any]]]:
    """Return the curves of training (means of equal numbers of steps) and of evaluations along the way, by metric."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row, record in [(one.row, record) for one in shown for record in one.records][:MOST_CURVES]:
        series: dict[str, list[tuple[int, float]]] = {}
        for key, value, step, _ in (*record.history, *record.along):
            if key in _CURVES or key.startswith("eval/"):
                series.setdefault(key, []).append((step, value))
        for key, points in series.items():
            width = -(-len(points) // CURVE_POINTS) if key in _CURVES else 1
            about = {"row": row.name, "cell": record.cell_name, "colour": palette_key(row), "steps_a_point": width}
            found.setdefault(key, []).append({**about, "points": list(_means(sorted(points), width))})
    return found


def _means(points: Sequence[tuple[int, float]], width: int) -> Iterator[tuple[int, float]]:
    for first in range(0, len(points), width):
        part = points[first : first + width]
        yield part[-1][0], sum(value for _, value in part) / len(part)


def _answers(rows: Sequence[Row], plans: Sequence[ExperimentPlan], most: int) -> Iterator[dict[str, Any]]:
    """Yield wrong answers of the first cell of rows, under `final`, of every evaluation that keeps which are right."""
    for row in [row for row in rows if row.status == "finished"][:MOST_ANSWERED]:
        plan = plans[row.origin]
        cell = next(cell for cell in plan.cells if cell.name == row.cells[0])
        for name in dict.fromkeys(job.label for job in cell.evaluations if job.under == "final"):
            try:
                document = predictions_document(plan, cell, name, "final", wrong=True)
            except (UsageError, StorageError):
                continue  # it keeps no answers, or not which are right
            if wrong := document["predictions"]:
                about = {"row": row.name, "cell": cell.name, "evaluation": name, "wrong": len(wrong)}
                yield {**about, "num_samples": document["num_samples"], "predictions": wrong[:most]}


def report_page(document: Mapping[str, Any]) -> str:
    """Return the report as an HTML file that asks for nothing outside it; 5 MB of it are plotly's JavaScript."""
    from plotly.offline import get_plotlyjs

    folder = resources.files("orchestrator.report")
    script, style = ((folder / f"experiment_report.{kind}").read_text("utf-8") for kind in ("js", "css"))
    shown = {name: value for name, value in document.items() if name not in ("answers", "experiments")}
    shown["palette"], shown["others"] = PALETTE, {"name": OTHER_TRIALS, "colour": GREY}
    shown["experiments"] = [{"name": one["name"], "plan": one["plan"]} for one in document["experiments"]]
    data = json.dumps(finite(shown), default=str, allow_nan=False).replace("</", "<\\/")
    return _PAGE.format(
        title=escape(document["title"]),
        style=style,
        head=_head(document),
        answers="".join(map(_wrong, document["answers"])) or "<p>No evaluation kept which answers are wrong.</p>",
        details="".join(map(_details, document["experiments"])),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        data=data,
        script=script,
    )


def _head(document: Mapping[str, Any]) -> str:
    about = "".join(f"<p>{escape(one['description'])}</p>" for one in document["experiments"] if one["description"])
    sentences = "".join(f"<li>{escape(text)}</li>" for text in document["in_short"])
    flags = "".join(f'<li class="flag">{escape(text)}</li>' for text in document["table"]["warnings"])
    return f'{about}<h2>In short</h2><ul id="in-short">{sentences}{flags}</ul>'


def _wrong(entry: Mapping[str, Any]) -> str:
    title = f"{entry['row']}: {entry['evaluation']}, {entry['wrong']:,} of {entry['num_samples']:,} wrong"
    of = "" if entry["cell"] == entry["row"] else f" ({entry['cell']})"
    cards = "".join(map(card, entry["predictions"]))
    return f'<details><summary>{escape(title + of)}</summary><div class="grid">{cards}</div></details>'


def _details(one: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(' | '.join(values))}</td></tr>"
        for name, values in one["environment"].items()
        if values
    )
    return (
        f"<h3>{escape(one['name'])}</h3><pre>{escape(one['command'])}</pre>"
        f"<details><summary>Environment</summary><table>{lines}</table></details>"
        f"<details><summary>Resolved YAML</summary><pre>{escape(one['yaml'])}</pre></details>"
    )


def print_report(document: Mapping[str, Any], console: Console) -> None:
    """Print what the report says in short."""
    for sentence in document["in_short"]:
        console.print(sentence, highlight=False, markup=False)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>{style}</style></head>
<body><main>
<h1>{title}</h1>
{head}
<section><h2>Score against cost</h2>
<p class="controls"><label>Score <select id="score"></select></label>
<label>Cost <select id="cost"></select></label></p>
<p class="muted">Large points are rows of the table with 95% intervals, faint ones their cells. The line joins rows
whose intervals do not overlap with those of a cheaper one: between others no front is drawn. Hollow points are trials
on the front of a search, grey ones its other trials.</p>
<div id="scatter" class="chart"></div></section>
<section><h2>Schedules</h2><p class="muted">Visual tokens of a sample, mean over the decoder's layers, as they ran.</p>
<div id="schedules" class="chart"></div></section>
<section><h2>Curves</h2><p class="controls"><label>Metric <select id="curve"></select></label></p>
<p class="muted" id="curve-note"></p><div id="curves" class="chart"></div></section>
<section id="sweep-section"><h2>Fewer tokens at test time</h2>
<p class="controls"><label>Row <select id="sweep"></select></label></p><div id="sweeps" class="chart"></div></section>
<section><h2>Table</h2><p class="muted" id="explanations"></p>
<div class="scroll"><table id="table"></table></div></section>
<section><h2>Stage tree</h2><p class="muted">A bar is a stage run: what several cells share is trained once and drawn
once, in the line of the first of them.</p><div id="tree" class="chart"></div></section>
<section id="answers"><h2>Wrong answers</h2>{answers}</section>
<section><h2>How to get this again</h2>{details}</section>
</main>
<script>{plotly}</script>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body></html>
"""

"""Answers of an evaluation of a cell, as the ledger keeps them: a document, and a page of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.plan.jobs import EvaluationJob
from orchestrator.registry import nearest
from orchestrator.report.pages.html import page, picture, values_table

SHOWN = 200


def predictions_document(
    walk: ExperimentPlan, cell: Cell, evaluation: str | None = None, under: str | None = None, *, wrong: bool = False
) -> dict[str, Any]:
    """Return the answers of one evaluation of a cell under one variant, in the order of the rows.

    Args:
        walk: The cell's experiment.
        cell: The cell.
        evaluation: Entry under `evaluate`; None where the cell has one.
        under: What it was tested under; None for `final`, or the only one there is.
        wrong: Leave out what was answered right.

    Returns:
        `experiment`, `cell`, `id`, `evaluation`, `under`, `metrics`, `num_samples`, `only_wrong`, `predictions`.

    Raises:
        UsageError: there is no such evaluation, it is not done, or it kept no answers or not which are right.
        StorageError: the answers are damaged.
    """
    job = _job_of(cell, evaluation, under)
    where = f"evaluate.{job.name} under {job.under} of cell {cell.name}"
    result = walk.ledger.evaluation(job.id)
    if result is None:
        failure = walk.ledger.failure(job.id)
        raise UsageError(
            f"{where} failed: {failure.get('error')}"
            if failure
            else f"{where} is not done yet; run the experiment first"
        )
    found = walk.ledger.predictions(job.id)
    if found is None:
        raise UsageError(
            f"{where} kept no answers: it is of an earlier version, or kind {job.spec['kind']} keeps none; "
            f"to evaluate again, take {walk.ledger.url}/evaluations/{job.id}.json away and run the experiment"
        )
    if wrong:
        if not all("right" in each for each in found):
            raise UsageError(f"--wrong: evaluations of kind {job.spec['kind']} do not say which answers are right")
        found = [each for each in found if not each["right"]]
    return {
        "experiment": walk.loaded.spec.name, "cell": cell.name, "id": cell.id, "evaluation": job.name,
        "under": job.under, "metrics": result["metrics"], "num_samples": result["num_samples"], "only_wrong": wrong,
        "predictions": found,
    }  # fmt: skip


def _job_of(cell: Cell, evaluation: str | None, under: str | None) -> EvaluationJob:
    names = list(dict.fromkeys(job.name for job in cell.evaluations))
    if not names:
        raise UsageError(f"cell {cell.name} has no evaluation; name one under `evaluate` and run the experiment")
    if evaluation is None and len(names) > 1:
        raise UsageError(f"cell {cell.name} has several evaluations; name one with --evaluation: {', '.join(names)}")
    name = names[0] if evaluation is None else evaluation
    jobs = {job.under: job for job in cell.evaluations if job.name == name}
    if not jobs:
        raise _unknown("--evaluation", name, names, cell)
    chosen = under or ("final" if "final" in jobs or len(jobs) > 1 else next(iter(jobs)))
    if chosen not in jobs:
        raise _unknown("--under", chosen, list(jobs), cell)
    return jobs[chosen]


def _unknown(option: str, value: str, known: list[str], cell: Cell) -> UsageError:
    near = nearest(value, known)
    hint = f"; did you mean {near}?" if near else ";"
    return UsageError(f"{option} {value}: cell {cell.name} has none of that name{hint} there are {', '.join(known)}")


def predictions_page(document: Mapping[str, Any], limit: int = SHOWN) -> str:
    """Return a grid of pictures with question, answer and right answer, wrong ones marked.

    Args:
        document: What `predictions_document` gives.
        limit: Most predictions on the page, the first ones; the page says how many there are.
    """
    shown, total = document["predictions"][:limit], len(document["predictions"])
    scores = ", ".join(f"{name} {value:.4g}" for name, value in document["metrics"].items())
    many = f"all {total:,}" if len(shown) == total else f"the first {len(shown):,} of {total:,}"
    kind = "wrong predictions" if document["only_wrong"] else "predictions"
    more = "" if len(shown) == total else " (--limit shows more)"
    head = (
        f"cell {document['cell']} · under {document['under']} · {scores} over {document['num_samples']:,} rows · "
        f"{many} {kind}{more}"
    )
    choice = '<input type="checkbox" id="only-wrong"><label for="only-wrong"> only wrong ones</label>'
    body = [f'<p class="muted">{escape(head)}</p>', *([] if document["only_wrong"] else [choice])]
    body += ['<div class="grid">', *map(_card, shown), "</div>"]
    return page(f"{document['experiment']}: {document['evaluation']}", "\n".join(body))


def _card(each: Mapping[str, Any]) -> str:
    pictures = "".join(picture(path) for path in each.get("images", ()))
    question = str(each.get("question", "")).replace("<image>", "").strip()
    values = {
        "row": (str(each.get("row", "")), ""),
        "answer": (str(each.get("answer", "")), "answer"),
        "right is": (str(each.get("expected", "")), ""),
    }
    marked = " wrong" if each.get("right") is False else ""
    return f'<div class="card{marked}">{pictures}<div>{escape(question)}</div>{values_table(values)}</div>'

"""Answers of an evaluation and rows of data for people: HTML pages that need no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from itertools import groupby
from typing import Any

from orchestrator.errors import OTHER_STORAGE, DataError, UsageError
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.plan.jobs import EvaluationJob
from orchestrator.registry import nearest

SHOWN = 200


def predictions_document(
    plan: ExperimentPlan, cell: Cell, evaluation: str | None = None, under: str | None = None, *, wrong: bool = False
) -> dict[str, Any]:
    """Return the answers of one evaluation of a cell under one variant, in the order of the rows.

    Args:
        plan: The cell's experiment.
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
    where = f"evaluate.{job.label} under {job.under} of cell {cell.name}"
    result = plan.ledger.evaluation(job.id)
    if result is None:
        failure = plan.ledger.failure(job.id)
        raise UsageError(
            f"{where} failed: {failure.get('error')}"
            if failure
            else f"{where} is not done yet in the storage {plan.ledger.url}; run the experiment first, or "
            f"{OTHER_STORAGE}"
        )
    found = plan.ledger.predictions(job.id)
    if found is None:
        raise UsageError(
            f"{where} kept no answers: it is of an earlier version, or kind {job.spec['kind']} keeps none; "
            f"to evaluate again, take {plan.ledger.url}/evaluations/{job.id}.json away and run the experiment"
        )
    if wrong:
        if not all("right" in each for each in found):
            raise UsageError(f"wrong: evaluations of kind {job.spec['kind']} do not say which answers are right")
        found = [each for each in found if not each["right"]]
    return {
        "experiment": plan.loaded.spec.name, "cell": cell.name, "id": cell.id, "evaluation": job.label,
        "under": job.under, "metrics": result["metrics"], "num_samples": result["num_samples"], "only_wrong": wrong,
        "fingerprint": result.get("fingerprint") or {},
        "predictions": found,
    }  # fmt: skip


def _job_of(cell: Cell, evaluation: str | None, under: str | None) -> EvaluationJob:
    names = list(dict.fromkeys(job.label for job in cell.evaluations))
    if not names:
        raise UsageError(f"cell {cell.name} has no evaluation; name one under `evaluate` and run the experiment")
    if evaluation is None and len(names) > 1:
        raise UsageError(f"cell {cell.name} has several evaluations; name one: {', '.join(names)}")
    name = names[0] if evaluation is None else evaluation
    jobs = {job.under: job for job in cell.evaluations if job.label == name}
    if not jobs:
        raise _unknown("evaluation", name, names, cell)
    chosen = under or ("final" if "final" in jobs or len(jobs) > 1 else next(iter(jobs)))
    if chosen not in jobs:
        raise _unknown("under", chosen, list(jobs), cell)
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
    body += ['<div class="grid">', *map(card, shown), "</div>"]
    return page(f"{document['experiment']}: {document['evaluation']}", "\n".join(body))


def card(each: Mapping[str, Any]) -> str:
    """Return an answer with its pictures, its question and the right answer."""
    pictures = "".join(picture(path) for path in each.get("images", ()))
    pictures += "".join(map(_strip, each.get("videos", ())))
    question = str(each.get("question", "")).replace("<image>", "")
    question = (question.replace("<video>", "") if each.get("videos") else question).strip()
    values = {
        "row": (str(each.get("row", "")), ""),
        "answer": (str(each.get("answer", "")), "answer"),
        "right is": (str(each.get("expected", "")), ""),
    }
    marked = " wrong" if each.get("right") is False else ""
    return f'<div class="card{marked}">{pictures}<div>{escape(question)}</div>{values_table(values)}</div>'


PICTURE_PIXELS = 640


def row_page(document: Mapping[str, Any]) -> str:
    """Return a row as a page, its pictures in it; what is learned is marked."""
    pictures = "".join(
        f'<div class="card">{_row_picture(each)}{escape(each["path"])}<br>{image_text(each)}</div>'
        for each in document["images"]
    )
    prompt = "".join(_marked(text, learned) for text, learned in prompt_pieces(document))
    tokens = []
    for learned, run in groupby(document["tokens"], key=lambda token: token["learned"]):
        texts = "".join(
            f'<span class="visual">[{escape(token["text"])} x {token["count"]}]</span>'
            if token["count"] > 1
            else f'<span title="id {token["id"]}">{escape(token["text"])}</span> '
            for token in run
        )
        tokens.append(f"<mark>{texts}</mark>" if learned else texts)
    values = {name: (str(value), "") for name, value in row_lengths(document).items()}
    if document["expected"] is not None:
        values["right answer"] = (document["expected"], "")
    body = [f'<p class="muted">{escape(row_settings(document))}</p>', f'<div class="grid">{pictures}</div>']
    body += [
        f"<h3>Prompt</h3><pre>{prompt}</pre>",
        values_table(values),
        f"<h3>Tokens</h3><pre>{''.join(tokens)}</pre>",
    ]
    return page(row_title(document), "\n".join(body))


def _row_picture(image: Mapping[str, Any]) -> str:
    if "frames" not in image:
        return picture(image["path"], PICTURE_PIXELS)
    return _strip(image)


def row_title(document: Mapping[str, Any]) -> str:
    """Return which row it is, and what uses it."""
    use = f"as {document['where']} gets it" if document["where"] else "which nothing in this experiment uses"
    sampled = "" if document["sampled"] else ", left out by max_samples"
    of = f"row {document['row']}{sampled} ({document['rows']:,} rows can be used)"
    return f"data.{document['set']} ({document['kind']}), {of}, {use}"


def row_settings(document: Mapping[str, Any]) -> str:
    """Return what makes the row what the model gets."""
    names = ("model", "template", "model_max_length")
    return ", ".join(f"{name} {document[name]}" for name in names)


def image_text(image: Mapping[str, Any]) -> str:
    """Return a picture's size, in pixels and tokens."""
    lost = "" if image["seen"] else ", cut off by model_max_length"
    frames = ""
    if "frames" in image:
        rate = f" of a video of {image['frame_rate']:.4g} a second" if image["frame_rate"] else " of a video"
        frames = f"{len(image['frames'])} frames ({', '.join(map(str, image['frames']))}){rate}, "
    return f"{frames}{image['width']} x {image['height']} pixels, {image['visual_tokens']} visual tokens{lost}"


def row_lengths(document: Mapping[str, Any]) -> dict[str, str]:
    """Return how many tokens it has, and how many of them are learned."""
    lengths = document["lengths"]
    cut = lengths["tokens"] - lengths["kept_tokens"]
    return {
        "tokens": f"{lengths['tokens_before_expansion']} with one placeholder an image, {lengths['tokens']} in full, "
        f"{lengths['visual_tokens']} of them visual" + (f"; the last {cut} are cut off" if cut else ""),
        "learned": f"{lengths['kept_label_tokens']} of {lengths['label_tokens']} tokens of answers",
    }


def prompt_pieces(document: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Return the prompt in pieces, and whether each is learned."""
    text, at, pieces = document["prompt"], 0, []
    for first, last in document["learned"]:
        pieces += [(text[at:first], False), (text[first:last], True)]
        at = last
    return [*pieces, (text[at:], False)]


def _marked(text: str, learned: bool) -> str:
    return f"<mark>{escape(text)}</mark>" if learned else escape(text)


THUMBNAIL_PIXELS = 180
FRAME_PIXELS = 96
"""Height of a frame of a video; a page shrinks the strip to its card."""
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #1f2328; background: #fff; margin: 24px; }
h1 { font-size: 20px; margin: 0 0 4px; } .muted { color: #656d76; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 12px; margin-top: 16px; }
.card { border: 1px solid #d0d7de; border-radius: 6px; padding: 10px; overflow-wrap: anywhere; }
.wrong { border-color: #c0392b; box-shadow: inset 4px 0 #c0392b; } .wrong .answer { color: #c0392b; font-weight: 600; }
#only-wrong:checked ~ .grid .card:not(.wrong) { display: none; }
img { max-width: 100%; display: block; margin: 0 auto 8px; }
.missing { background: #f6f8fa; color: #656d76; padding: 24px 8px; text-align: center; margin-bottom: 8px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; border-radius: 6px; padding: 12px; }
mark { background: #b7e4c7; } .visual { color: #8250df; }
table { border-collapse: collapse; } td { vertical-align: top; padding: 0 12px 0 0; } td:first-child { color: #656d76; }
"""


def page(title: str, body: str) -> str:
    """Return a document that needs no other file."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def picture(path: str, pixels: int = THUMBNAIL_PIXELS) -> str:
    """Return an image element that holds a picture, at most `pixels` wide and high; words where it cannot be read."""
    # Pillow takes as long to load as a small experiment, and most of what imports this module shows no picture.
    from orchestrator.data.records.image_files import BadImage, open_image

    try:
        image = open_image(path)
    except (BadImage, OSError) as error:
        return _missing(path, error)
    image.thumbnail((pixels, pixels))
    return _shown(path, image)


def _strip(video: Mapping[str, Any]) -> str:
    """Return the frames of a video that the model got, side by side; words where it cannot be read.

    Args:
        video: `path`, and `frames` (their numbers), or `num_frames` and `fps` by which they are taken.
    """
    from orchestrator.data.records.image_files import BadImage
    from orchestrator.data.records.video_files import clip_of, frames_of, open_frames, strip_of
    from orchestrator.data.rows import ImageReading

    path = video["path"]
    try:
        clip = clip_of(path)
        reading = ImageReading(num_frames=video.get("num_frames", 1), fps=video.get("fps"))
        frames = video.get("frames") or frames_of(clip, reading)
        return _shown(path, strip_of(open_frames(path, frames, clip), FRAME_PIXELS))
    except (BadImage, OSError, DataError) as error:
        return _missing(path, error)


def _missing(path: str, error: Exception) -> str:
    return f'<div class="missing">{escape(path)} {escape(str(error))}</div>'


def _shown(path: str, image: Any) -> str:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    code = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{code}" alt="{escape(path)}" title="{escape(path)}">'


def values_table(values: dict[str, tuple[str, str]]) -> str:
    """Return a table of name to (value, CSS class)."""
    rows = (
        f'<tr><td>{escape(name)}</td><td class="{kind}">{escape(text)}</td></tr>'
        for name, (text, kind) in values.items()
    )
    return f"<table>{''.join(rows)}</table>"

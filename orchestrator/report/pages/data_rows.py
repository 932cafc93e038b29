"""Data before training, for people: the report on all rows, and one row as text or as a page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import groupby
from textwrap import wrap
from typing import Any

from orchestrator.report.pages.html import page, picture, values_table
from orchestrator.report.units import counted_noun

PICTURE_PIXELS = 640
_BEGIN, _END = "«", "»"


def check_text(document: Mapping[str, Any]) -> str:
    """Return a block for each data set and use: rows, lengths, notes, what is dropped, every error."""
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
    return "\n".join([*blocks, verdict, ""])


def _where(entry: Mapping[str, Any]) -> str:
    return "" if entry["row"] is None else f"row {entry['row']}: "


def row_text(document: Mapping[str, Any]) -> str:
    """Return a row for a terminal; what is learned stands between « and », its tokens are marked with *."""
    lines = [_title(document), _settings(document), ""]
    for number, image in enumerate(document["images"], 1):
        lines.append(f"picture {number}: {image['path']}  {_image(image)}")
    lines += ["", "".join(_BEGIN + text + _END if learned else text for text, learned in _pieces(document)), ""]
    if document["expected"] is not None:
        lines.append(f"right answer: {document['expected']}")
    lines += [f"{name}: {value}" for name, value in _lengths(document).items()]
    tokens = []
    for learned, run in groupby(document["tokens"], key=lambda token: token["learned"]):
        texts = " ".join(f"{one['text']} x{one['count']}" if one["count"] > 1 else one["text"] for one in run)
        tokens.append(f"{_BEGIN}{texts}{_END}" if learned else texts)
    lines += ["", "as tokens:", *wrap(" ".join(tokens), 118, break_long_words=False, break_on_hyphens=False)]
    return "\n".join([*lines, ""])


def row_page(document: Mapping[str, Any]) -> str:
    """Return a row as a page, its pictures in it; what is learned is marked."""
    pictures = "".join(
        f'<div class="card">{picture(image["path"], PICTURE_PIXELS)}{escape(image["path"])}<br>{_image(image)}</div>'
        for image in document["images"]
    )
    prompt = "".join(_marked(text, learned) for text, learned in _pieces(document))
    tokens = []
    for learned, run in groupby(document["tokens"], key=lambda token: token["learned"]):
        texts = "".join(
            f'<span class="visual">[{escape(token["text"])} x {token["count"]}]</span>'
            if token["count"] > 1
            else f'<span title="id {token["id"]}">{escape(token["text"])}</span> '
            for token in run
        )
        tokens.append(f"<mark>{texts}</mark>" if learned else texts)
    values = {name: (str(value), "") for name, value in _lengths(document).items()}
    if document["expected"] is not None:
        values["right answer"] = (document["expected"], "")
    body = [f'<p class="muted">{escape(_settings(document))}</p>', f'<div class="grid">{pictures}</div>']
    body += [
        f"<h3>Prompt</h3><pre>{prompt}</pre>",
        values_table(values),
        f"<h3>Tokens</h3><pre>{''.join(tokens)}</pre>",
    ]
    return page(_title(document), "\n".join(body))


def _title(document: Mapping[str, Any]) -> str:
    use = f"as {document['where']} gets it" if document["where"] else "which nothing in this experiment uses"
    return f"data.{document['set']} ({document['kind']}), row {document['row']} of {document['rows']:,} usable, {use}"


def _settings(document: Mapping[str, Any]) -> str:
    names = ("model", "template", "model_max_length")
    return ", ".join(f"{name} {document[name]}" for name in names)


def _image(image: Mapping[str, Any]) -> str:
    lost = "" if image["seen"] else ", cut off by model_max_length"
    return f"{image['width']} x {image['height']} pixels, {image['visual_tokens']} visual tokens{lost}"


def _lengths(document: Mapping[str, Any]) -> dict[str, str]:
    lengths = document["lengths"]
    cut = lengths["tokens"] - lengths["kept_tokens"]
    return {
        "tokens": f"{lengths['tokens_before_expansion']} with one placeholder an image, {lengths['tokens']} in full, "
        f"{lengths['visual_tokens']} of them visual" + (f"; the last {cut} are cut off" if cut else ""),
        "learned": f"{lengths['kept_label_tokens']} of {lengths['label_tokens']} tokens of answers",
    }


def _pieces(document: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Return the prompt in pieces, and whether each is learned."""
    text, at, pieces = document["prompt"], 0, []
    for first, last in document["learned"]:
        pieces += [(text[at:first], False), (text[first:last], True)]
        at = last
    return [*pieces, (text[at:], False)]


def _marked(text: str, learned: bool) -> str:
    return f"<mark>{escape(text)}</mark>" if learned else escape(text)

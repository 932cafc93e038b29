"""Inspect data before training: every row's errors and lengths, and one row as the model gets it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from orchestrator.data.check import CheckedRows, RowCheck, Use, check_rows, errors_of, no_image_seen, uses_of_cells
from orchestrator.data.processing.encode import IGNORED_LABEL, Encoder, Sample
from orchestrator.data.processing.processor import VisionTextProcessor, load_processor
from orchestrator.data.processing.templates import render
from orchestrator.data.records.image_files import image_size
from orchestrator.data.records.row_index import IndexedRows, open_rows
from orchestrator.data.rows import Row, open_data_set, template_of
from orchestrator.errors import DataError, UsageError
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.identity import digest
from orchestrator.registry import nearest
from orchestrator.spec.components import DataSpec
from orchestrator.spec.model import ModelSpec

DEFAULT_MAX_LENGTH = 2048


def check_document(cells: Sequence[Cell]) -> dict[str, Any]:
    """Read every row and image of what some cells train or test on, and try each with the model's processor.

    Returns:
        `valid`, and `sets`: of each data set and its use `name`, `where`, `kind`, `rows`, `errors` (`row`, None where
        it is not one row's, and `error`), `dropped` (rows left out that may be), `notes` and `lengths`.

    Raises:
        UsageError: the model's processor cannot be used at all.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        for use in uses_of_cells([cell]):
            key = digest([use.where, use.entries, use.model, use.model_max_length, sorted(use.train)])
            if key not in found:
                found[key] = list(_checked_use(use, cell))
    sets = [report for reports in found.values() for report in reports]
    return {"valid": not any(report["errors"] for report in sets), "sets": sets}


def _checked_use(use: Use, cell: Cell) -> Iterator[dict[str, Any]]:
    """Return the report of each set of a phase or an evaluation."""
    checked, reports = list[CheckedRows](), list[dict[str, Any]]()
    for entry in use.entries:
        one, report = _checked_set(use.check_of(entry))
        reports.append({"name": _set_name(cell, use, entry), "where": use.where, **report})
        checked += [] if one is None else [one]
    if len(checked) == len(reports) and (error := no_image_seen(use, checked)):
        reports[0]["errors"].append({"row": None, "error": error})
    yield from reports


def _set_name(cell: Cell, use: Use, entry: Mapping[str, Any]) -> str:
    evaluation = use.where.removeprefix("evaluate.")
    return str(entry["name"] or getattr(cell.spec.evaluate[evaluation], "data", ""))


def _checked_set(of: RowCheck) -> tuple[CheckedRows | None, dict[str, Any]]:
    """Return what the check of a set found, None where no row can be read, and its report."""
    source, implementation = of.data, open_data_set(of.data)
    forbidden = implementation.check()
    bad = _bad_in_source(implementation)
    report: dict[str, Any] = {"kind": source.kind, "rows": 0, "errors": [], "dropped": [], "notes": [], "lengths": {}}
    if bad:
        report["errors" if forbidden else "dropped"] += [{"row": row, "error": bad[row]} for row in bad]
    if forbidden and not bad:
        report["errors"] += [{"row": None, "error": error} for error in forbidden]
    try:
        found = check_rows(replace(of, data=_tolerant(source)) if forbidden else of)
    except DataError as error:
        if not report["errors"]:
            report["errors"].append({"row": None, "error": str(error)})
        return None, report
    report["rows"] = len(found) + len(bad)
    report["errors" if errors_of(found, source) else "dropped"] += [
        {"row": row, "error": found.bad[row]} for row in found.bad
    ]
    report["notes"] = [*source.remarks(), *found.remarks()]
    report["lengths"] = _lengths(found)
    return found, report


def _bad_in_source(implementation: Any) -> dict[int, str]:
    """Return the rows that cannot be used whatever the model, where the kind keeps an index of them."""
    if not hasattr(implementation, "index"):
        return {}
    try:
        return dict(implementation.index().bad)
    except (DataError, FileNotFoundError):
        return {}


def _tolerant(spec: DataSpec) -> DataSpec:
    """Return the set with its bad rows left out, however many, so that the others can be looked at."""
    if not hasattr(spec, "on_bad_row"):
        return spec
    return spec.model_copy(update={"on_bad_row": "drop", "max_bad_share": 1.0, "num_samples": None})


def _lengths(found: CheckedRows) -> dict[str, dict[str, float]]:
    """Return the distribution of what a row comes to, over rows that can be used."""
    numbers = found.count("number")
    good = ~np.isin(numbers, list(found.bad))
    names = {"tokens": "tokens", "label_tokens": "labels", "visual_tokens": "kept_visual", "images": "kept_images"}
    lengths = {}
    for name, column in names.items():
        values = found.count(column)[good]
        if len(values) and not (found.of.prompts and column == "labels"):
            middle, high = np.percentile(values, [50, 95])
            lengths[name] = {
                "min": int(values.min()), "median": float(middle), "mean": round(float(values.mean()), 3),
                "p95": float(high), "max": int(values.max()), "longest_row": int(numbers[good][values.argmax()]),
            }  # fmt: skip
    return lengths


def _places(cells: Sequence[Cell]) -> Iterator[tuple[str, str, RowCheck]]:
    """Return name, key path and check of each use of a data set, training first; then those of sets nothing uses."""
    uses = [(cell, use) for cell in cells for use in uses_of_cells([cell])]
    for cell, use in sorted(uses, key=lambda pair: pair[1].prompts):
        for entry in use.entries:
            yield _set_name(cell, use, entry), use.where, use.check_of(entry)
    for cell in cells:
        for name, spec in cell.spec.data.items():
            yield name, "", RowCheck(spec, ModelSpec.model_validate(cell.root.model), DEFAULT_MAX_LENGTH, prompts=False)


def row_document(cells: Sequence[Cell], name: str | None = None, number: int | None = None) -> dict[str, Any]:
    """Return one row of a data set as the model gets it.

    Args:
        cells: Whose data and model; the first that uses the set counts.
        name: Entry under `data`; None for the first that is trained on.
        number: The row's index in its file, as errors name it; None for the first one.

    Returns:
        `set`, `where`, `kind`, `row`, `rows`, `model`, `template`, `model_max_length`, `images` (path, size, visual
        tokens), `prompt` and `learned` (character ranges of it), `expected` of a test row, `lengths`, `tokens` (runs of
        visual tokens as one entry with a `count`).

    Raises:
        UsageError: there is no such set or row.
        DataError: the row cannot be used; the sentence says why.
    """
    places = list(_places(cells))
    found = next((place for place in places if name in (None, place[0])), None)
    if found is None:
        known = list(dict.fromkeys(place[0] for place in places))
        near = nearest(name or "", known)
        hint = f"; did you mean {near}?" if near else ";"
        raise UsageError(f"--data {name}: there is no such data set{hint} there are {', '.join(known) or 'none'}")
    name, where, use = found
    try:
        rows = open_rows(use.data)
    except DataError:  # other rows are bad: this one can be looked at
        rows = open_rows(_tolerant(use.data))
    row = _row(f"data.{name}", rows, number)
    processor, template = load_processor(use.model), template_of(use.data)
    encoder = Encoder(processor, template, use.model_max_length)
    sample = encoder.encode_prompt(row) if use.prompts else encoder.encode(row)
    lengths, rendered = encoder.lengths(row, use.prompts), render(template, row, processor.chat, use.prompts)
    return {
        "set": name, "where": where, "kind": use.data.kind, "row": row.index, "rows": len(rows),
        "model": use.model.model_name_or_path, "template": template, "model_max_length": use.model_max_length,
        "images": _images(row, processor, len(sample.images)),
        "prompt": rendered.text,
        "learned": [list(span) for span in rendered.answers],
        "expected": _expected(row) if use.prompts else None,
        "lengths": {
            "tokens_before_expansion": len(processor.tokenize(rendered.text).ids), "tokens": lengths.tokens,
            "kept_tokens": lengths.kept_tokens, "visual_tokens": lengths.kept_visual,
            "label_tokens": lengths.labels, "kept_label_tokens": lengths.kept_labels,
        },
        "tokens": _tokens(sample, processor),
    }  # fmt: skip


def _row(where: str, rows: IndexedRows, number: int | None) -> Row:
    if not len(rows.origin):
        raise DataError(f"{where}: there are no rows")
    if number is None:
        if not len(rows):
            raise DataError(f"{where}: no row can be used; `llavolta data check` lists why")
        return rows[0]
    if reason := rows.origin.bad.get(number):
        raise DataError(f"{where}: row {number} cannot be used: {reason}")
    positions = np.flatnonzero(rows.origin.numbers == number)
    if not len(positions):
        last = int(rows.origin.numbers.max())
        raise UsageError(f"--row {number}: {where} has rows {int(rows.origin.numbers.min())} to {last}")
    return rows.origin.row(int(positions[0]))


def _expected(row: Row) -> str | None:
    return next((turn.text for turn in reversed(row.turns) if turn.role == "assistant"), None)


def _images(row: Row, processor: VisionTextProcessor, kept: int) -> list[dict[str, Any]]:
    found = []
    for place, (image, text) in enumerate(zip(row.images, processor.images.texts(row.images), strict=True)):
        height, width = image_size(image.path, image.reading)
        seen = {"visual_tokens": text.num_visual_tokens, "seen": place < kept}
        found.append({"path": image.path, "width": width, "height": height, **seen})
    return found


def _tokens(sample: Sample, processor: VisionTextProcessor) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    visual = processor.image_token_id
    for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
        if token == visual and found and found[-1]["id"] == visual:
            found[-1]["count"] += 1
            continue
        text = processor.tokenizer.convert_ids_to_tokens(token)
        found.append({"id": token, "text": text, "count": 1, "learned": label != IGNORED_LABEL})
    return found

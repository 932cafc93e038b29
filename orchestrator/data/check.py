"""The data check before a run: every row through template, tokenizer and image processor; one row as the model gets it.

The outcome of a check is cached. Reading a cached one needs no torch; checking rows does.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from orchestrator.data.processing.templates import render
from orchestrator.data.records.columns import Columns, batch, build_columns, open_columns
from orchestrator.data.records.conversations import error_lines
from orchestrator.data.records.image_files import image_size
from orchestrator.data.records.row_index import IndexedRows, open_rows
from orchestrator.data.records.video_files import frames_of
from orchestrator.data.rows import (
    Row,
    data_spec,
    described,
    lines_of,
    open_data_set,
    raise_for_errors,
    template_of,
)
from orchestrator.errors import DataError, UsageError
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.cells.identity_fields import data_identity, settings_identity
from orchestrator.plan.identity import digest
from orchestrator.plan.jobs import EvaluationJob, Job, StageJob
from orchestrator.registry import nearest
from orchestrator.spec.components import DataSpec
from orchestrator.spec.model import ModelSpec

if TYPE_CHECKING:
    from orchestrator.data.processing.encode import Encoder, Sample
    from orchestrator.data.processing.processor import VisionTextProcessor

_VERSION = 1
CHUNK_ROWS = 4096
DEFAULT_MAX_LENGTH = 2048
_COUNTS = ("number", "tokens", "labels", "kept_tokens", "kept_labels", "kept_visual", "kept_images")
_SCHEMA = pa.schema([*((name, pa.int64()) for name in _COUNTS), ("fault", pa.string())])


@dataclass(frozen=True)
class RowCheck:
    """A data set to check with a model's processor.

    Attributes:
        data: The data set.
        model: The model.
        model_max_length: Maximum number of tokens of a row.
        prompts: Whether rows are test prompts; otherwise they are trained on.
    """

    data: DataSpec
    model: ModelSpec
    model_max_length: int
    prompts: bool

    @property
    def file(self) -> str:
        """Name of the file that caches the outcome.

        Raises:
            OSError: the storage fails.
            DataError: the data is not on this machine.
        """
        identity, absent = data_identity(self.data)
        if absent is not None:
            raise DataError(absent)
        model = settings_identity(self.model)
        facts = [_VERSION, version("transformers"), identity, model, self.model_max_length, self.prompts]
        return f"tried-{digest(facts)}.arrow"

    def encoder(self) -> tuple[Encoder, VisionTextProcessor]:
        """Return what makes tokens of a row, and the model's processor.

        Raises:
            UsageError: the processor cannot be used at all.
        """
        # Late: they import torch, which a run without new data does not need.
        from orchestrator.data.processing.encode import Encoder
        from orchestrator.data.processing.processor import load_processor

        processor = load_processor(self.model)
        return Encoder(processor, template_of(self.data), self.model_max_length), processor


class CheckedRows:
    """The outcome of a check, one entry per row.

    Args:
        columns: The entries.
        of: What was checked.
    """

    def __init__(self, columns: Columns, of: RowCheck) -> None:
        self._columns, self.of = columns, of

    def __len__(self) -> int:
        return len(self._columns)

    def count(self, name: str) -> np.ndarray:
        """Return a count of each row (N,): `number` or a field of `RowLengths`."""
        return self._columns.numpy(name)

    @cached_property
    def bad(self) -> dict[int, str]:
        """By index, why a row cannot be used; rows whose answers are all cut off are among them."""
        numbers, errors = self.count("number"), self._columns.column("fault")
        found = {int(n): str(f) for n, f in zip(numbers, errors.to_pylist(), strict=True) if f is not None}
        if not self.of.prompts:
            lost = (self.count("kept_labels") == 0) & np.asarray(errors.is_null())
            for number, tokens in zip(numbers[lost].tolist(), self.count("tokens")[lost].tolist(), strict=True):
                limit = self.of.model_max_length
                found[number] = f"model_max_length {limit} cuts off every answer of its {tokens:,} tokens; raise it"
        return dict(sorted(found.items()))

    @property
    def with_images(self) -> int:
        """Number of rows with an image that the model sees."""
        return int(np.count_nonzero(self.count("kept_images")))

    def remarks(self) -> list[str]:
        """Return warnings for the user about rows that are used."""
        said = []
        rows = open_rows(self.of.data)
        if (open_ended := rows.numbers[rows.origin.unanswered[rows.positions]]).size:
            some = ", ".join(map(str, open_ended[:5])) + (", ..." if open_ended.size > 5 else "")
            what = (
                "is left out: the answer before it is tested"
                if self.of.prompts
                else "the model reads without learning it"
            )
            said.append(
                f"{open_ended.size:,} of {len(self):,} rows end with a question without an answer, which {what} "
                f"(row {some})"
            )
        labels, kept = self.count("labels"), self.count("kept_labels")
        cut = (kept > 0) & (kept < labels)
        if cut.any() and not self.of.prompts:
            share = 1 - kept[cut].sum() / labels.sum()
            said.append(
                f"{int(cut.sum()):,} of {len(self):,} rows lose a part of their answers beyond model_max_length "
                f"{self.of.model_max_length} ({share:.1%} of all label tokens)"
            )
        return said


def cached_check(of: RowCheck) -> CheckedRows | None:
    """Return the cached outcome of an earlier check; None if there is none."""
    columns = open_columns(of.file, _SCHEMA)
    return None if columns is None else CheckedRows(columns, of)


def left_out(data: DataSpec, model: ModelSpec, model_max_length: int, prompts: bool) -> list[int]:
    """Return the indices of rows that an earlier check found unusable and the data set drops; needs no torch."""
    found = cached_check(RowCheck(data, model, model_max_length, prompts))
    return [] if found is None or errors_of(found) else list(found.bad)


def errors_of(found: CheckedRows, data: DataSpec | None = None) -> list[str]:
    """Return the errors that prevent a run, after a summary: bad rows, unless they are dropped and few enough.

    Args:
        found: The rows, checked.
        data: The set that says how many may be dropped, where it is not the one that was checked.
    """
    if not found.bad:
        return []
    share, data = len(found.bad) / len(found), data or found.of.data
    lines = error_lines(found.bad, len(found))
    if getattr(data, "on_bad_row", "fail") != "drop":
        drop = ", or set on_bad_row: drop" if hasattr(data, "on_bad_row") else ""
        return [f"this model cannot use {len(found.bad):,} of {len(found):,} rows; correct them{drop}", *lines]
    allowed = getattr(data, "max_bad_share", 0.0)
    if share <= allowed and share < 1:
        return []
    return [f"this model cannot use {share:.2%} of the rows, max_bad_share allows {allowed:.2%}", *lines]


def check_rows(of: RowCheck) -> CheckedRows:
    """Check every row, or return the cached outcome.

    Raises:
        DataError: the rows cannot be read.
        UsageError: the model's processor cannot be used at all.
        OSError: the storage fails.
    """
    known = cached_check(of)
    if known is not None:
        return known
    rows = open_rows(of.data)
    trial = _RowChecker(rows, *of.encoder(), of.prompts)
    parts = (rows[first : first + CHUNK_ROWS] for first in range(0, len(rows), CHUNK_ROWS))
    what = "test prompts checked" if of.prompts else "rows checked"
    return CheckedRows(build_columns(of.file, _SCHEMA, parts, trial.batch, what, len(rows)), of)


class _RowChecker:
    """Checks rows with one model's processor."""

    def __init__(self, rows: IndexedRows, encoder: Encoder, processor: VisionTextProcessor, prompts: bool) -> None:
        self._encoder, self._processor, self._prompts = encoder, processor, prompts
        self._sizes = rows.origin.images.sizes if rows.num_images.any() else {}
        if self._sizes:
            processor.images.know_sizes(self._sizes)
        if clips := rows.origin.images.clips if rows.num_images.any() else {}:
            processor.images.know_clips(clips)
        self._errors_by_size: dict[Hashable, str | None] = {}

    def batch(self, rows: Sequence[Row]) -> pa.RecordBatch:
        """Return the entries of some rows."""
        return batch(_SCHEMA, zip(*self._entries(rows), strict=True))

    def _entries(self, rows: Sequence[Row]) -> Iterator[tuple[Any, ...]]:
        for row in rows:
            try:
                reason = self._image_error(row)
                if self._prompts and not any(turn.role == "assistant" for turn in row.turns):
                    reason = "no answer to compare with"
                if reason is None:
                    yield (row.index, *self._encoder.lengths(row, self._prompts), None)
                    continue
            except DataError as error:
                reason = str(error).removeprefix(f"row {row.index}: ")
            except (OSError, MemoryError, UsageError):
                raise
            # Templates and processors raise exceptions of any kind.
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            yield (row.index, *[0] * (len(_COUNTS) - 1), reason)

    def _image_error(self, row: Row) -> str | None:
        """Return the processor's error for an image of a row; it depends on sizes only, in all processors, and that for
        a video on the frames that are taken too.
        """
        for image in row.images:
            size = self._processor.images.shapes([image])[0] if image.video else self._sizes.get(image.path)
            if size not in self._errors_by_size:
                try:
                    self._processor.images.tensors([[image]])
                    self._errors_by_size[size] = None
                except DataError as error:
                    self._errors_by_size[size] = str(error).removeprefix(image.path).strip()
            if (reason := self._errors_by_size[size]) is not None:
                return f"{image.path} {reason}"
        return None


_OF_IMAGES = ("vision_tower", "projector", "compressor")


@dataclass(frozen=True)
class Use:
    """Data sets that one phase trains on, or one evaluation tests on.

    Attributes:
        where: The phase's or evaluation's key path.
        entries: Of each set `{"name", "spec"}` and, if the plan drops rows, `left_out`.
        model: The model's spec.
        model_max_length: Maximum number of tokens of a row.
        train: Parts that train; empty for a test.
    """

    where: str
    entries: tuple[dict[str, Any], ...]
    model: dict[str, Any]
    model_max_length: int
    train: tuple[str, ...] = ()

    @property
    def prompts(self) -> bool:
        """Whether rows are test prompts."""
        return not self.train

    def check_of(self, entry: Mapping[str, Any]) -> RowCheck:
        """Return the check of one of its sets."""
        model = ModelSpec.model_validate(self.model)
        return RowCheck(data_spec(entry["spec"]), model, self.model_max_length, self.prompts)


@dataclass
class Findings:
    """The findings of a check.

    Attributes:
        remarks: Warnings for the user.
        replan: Whether other rows are dropped than the plan assumed.
    """

    remarks: dict[str, None] = field(default_factory=dict)
    replan: bool = False


def uses_of_jobs(work: Iterable[Job]) -> Iterator[Use]:
    """Return the data that some jobs use."""
    for job in work:
        if isinstance(job, StageJob):
            recipe = job.recipe
            train = tuple(recipe["train"])
            yield Use(f"phases.{job.phase}", job.data, job.model, recipe["model_max_length"], train)
        elif isinstance(job, EvaluationJob) and job.data:
            yield _of_test(job)


def uses_of_cells(cells: Iterable[Cell]) -> Iterator[Use]:
    """Return the data that some cells use, complete or not."""
    for cell in cells:
        for plan in cell.phases:
            length, train = plan.recipe.model_max_length, tuple(plan.recipe.train)
            yield Use(f"phases.{plan.name}", plan.data, cell.root.model, length, train)
        yield from (_of_test(job) for job in cell.evaluations if job.data)


def _of_test(job: EvaluationJob) -> Use:
    entry = {"name": "", "spec": job.data, "content": job.content, "left_out": list(job.left_out)}
    return Use(f"evaluate.{job.name}", (entry,), job.model, job.model_max_length)


def check_uses(uses: Iterable[Use]) -> Findings:
    """Read every row and image and check each with the model's processor, unless an earlier check is cached.

    Raises:
        DataError: rows cannot be used, or no row reaches a part that trains.
    """
    distinct = {digest([use.entries, use.model, use.model_max_length, sorted(use.train)]): use for use in uses}
    specs: dict[str, DataSpec] = {}
    for use in distinct.values():
        for entry in use.entries:
            specs.setdefault(digest(entry["spec"]), data_spec(entry["spec"]))
    findings = Findings()
    for spec in specs.values():
        raise_for_errors(described(spec), open_data_set(spec).check())
        open_rows(spec)
        findings.remarks |= dict.fromkeys(f"{described(spec)}: {text}" for text in spec.remarks())
    for use in distinct.values():
        _check_use(use, findings)
    return findings


def _check_use(use: Use, findings: Findings) -> None:
    found: list[CheckedRows] = []
    for entry in use.entries:
        one = check_rows(use.check_of(entry))
        name = f".data.{entry['name']}" if entry["name"] else ""
        if errors := errors_of(one):
            raise DataError(f"{use.where}{name}: {lines_of(errors)}")
        findings.replan |= list(one.bad) != list(entry.get("left_out", ()))
        if one.bad:
            some = [f"row {number}: {reason}" for number, reason in list(one.bad.items())[:3]]
            more = ["..."] if len(one.bad) > len(some) else []
            text = f"{len(one.bad):,} of {len(one):,} rows dropped, which this model cannot use: "
            findings.remarks[f"{use.where}{name}: {text}{'; '.join(some + more)}"] = None
        findings.remarks |= dict.fromkeys(f"{use.where}{name}: {text}" for text in one.remarks())
        found.append(one)
    if error := no_image_seen(use, found):
        raise DataError(error)


def no_image_seen(use: Use, found: Sequence[CheckedRows]) -> str | None:
    """Return why parts that train would get no gradient: none of the rows has an image that the model sees."""
    unreached = [part for part in use.train if part in _OF_IMAGES]
    if not unreached or any(one.with_images for one in found):
        return None
    rows = sum(map(len, found))
    rest = ", ".join(part for part in use.train if part not in unreached)
    advice = f"train: [{rest}]" if rest else "data with images"
    return (
        f"{use.where}.train: {', '.join(unreached)} would be trained, but none of the {rows:,} rows has an image that "
        f"the model sees within model_max_length {use.model_max_length}; give {advice}"
    )


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
                found[key] = _checked_use(use, cell)
    sets = [report for reports in found.values() for report in reports]
    return {"valid": not any(report["errors"] for report in sets), "sets": sets}


def _checked_use(use: Use, cell: Cell) -> list[dict[str, Any]]:
    """Return the report of each set of a phase or an evaluation."""
    checked, reports = list[CheckedRows](), list[dict[str, Any]]()
    for entry in use.entries:
        one, report = _checked_set(use.check_of(entry))
        reports.append({"name": _set_name(cell, use, entry), "where": use.where, **report})
        checked += [] if one is None else [one]
    if len(checked) == len(reports) and (error := no_image_seen(use, checked)):
        reports[0]["errors"].append({"row": None, "error": error})
    return reports


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
    report["rows"] = len(found) + (len(bad) if source.max_samples is None else 0)  # samples are of the good rows
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
        `set`, `where`, `kind`, `row`, `rows` (how many can be used), `sampled` (whether `max_samples` takes this one),
        `model`, `template`, `model_max_length`, `images` (path, size, visual tokens; of a video also `frames`, the
        numbers of those that the model gets, and `frame_rate`, those of the file a second), `prompt` and `learned`
        (character ranges of it), `expected` of a test row, `lengths`, `tokens` (runs of visual tokens as one entry with
        a `count`).

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
        raise UsageError(f"data {name}: there is no such data set{hint} there are {', '.join(known) or 'none'}")
    name, where, use = found
    try:
        rows = open_rows(use.data)
    except DataError as error:  # other rows are bad: this one can be looked at
        try:
            rows = open_rows(_tolerant(use.data))
        except DataError:
            raise error from None
    dropped = left_out(use.data, use.model, use.model_max_length, use.prompts)
    usable = rows.without([*rows.origin.bad, *dropped])
    row = _row(f"data.{name}", usable, number)
    (encoder, processor), template = use.encoder(), template_of(use.data)
    sample = encoder.encode_prompt(row) if use.prompts else encoder.encode(row)
    lengths, rendered = encoder.lengths(row, use.prompts), render(template, row, processor.chat, use.prompts)
    return {
        "set": name, "where": where, "kind": use.data.kind, "row": row.index, "rows": len(usable),
        "sampled": row.index in usable.numbers or row.index in dropped,
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
        numbers = rows.origin.numbers
        near = int(numbers[np.abs(numbers - number).argmin()])
        raise UsageError(
            f"row {number}: {where} has rows {numbers.min()} to {numbers.max()}, {len(numbers):,} in all, "
            f"and not this one; the nearest is {near}"
        )
    return rows.origin.row(int(positions[0]))


def _expected(row: Row) -> str | None:
    return next((turn.text for turn in reversed(row.turns) if turn.role == "assistant"), None)


def _images(row: Row, processor: VisionTextProcessor, kept: int) -> list[dict[str, Any]]:
    found = []
    for place, (image, text) in enumerate(zip(row.images, processor.images.texts(row.images), strict=True)):
        seen: dict[str, Any] = {"visual_tokens": text.num_visual_tokens, "seen": place < kept}
        if image.video:
            clip = processor.images.clip(image)
            height, width = clip.height, clip.width
            seen |= {"frames": list(frames_of(clip, image.reading)), "frame_rate": clip.rate}
        else:
            height, width = image_size(image.path, image.reading)
        found.append({"path": image.path, "width": width, "height": height, **seen})
    return found


def _tokens(sample: Sample, processor: VisionTextProcessor) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    visual = processor.placeholder_ids
    for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
        if token in visual and found and found[-1]["id"] == token:
            found[-1]["count"] += 1
            continue
        text = processor.tokenizer.convert_ids_to_tokens(token)
        found.append({"id": token, "text": text, "count": 1, "learned": label >= 0})
    return found

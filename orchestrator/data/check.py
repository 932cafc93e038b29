"""The check before anything starts: every row of the data, and what the model's processor makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from orchestrator.data.progress import progress
from orchestrator.data.records.columns import Chunks, Columns, DamagedColumns, batches_of, keep_columns, open_columns
from orchestrator.data.records.conversations import fault_lines
from orchestrator.data.records.row_index import IndexedRows, open_rows
from orchestrator.data.rows import FAULTS_SHOWN, Row, open_data_set, raise_for_faults
from orchestrator.errors import DataError, UsageError
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.cells.identity_fields import data_identity, settings_identity
from orchestrator.plan.identity import digest
from orchestrator.plan.jobs import EvaluationJob, Job, StageJob
from orchestrator.spec.components import DataSpec
from orchestrator.spec.model import ModelSpec

if TYPE_CHECKING:
    from orchestrator.data.processing.encode import Encoder
    from orchestrator.data.processing.processor import VisionTextProcessor


_VERSION = 1
CHUNK_ROWS = 4096
_COUNTS = ("number", "tokens", "labels", "kept_tokens", "kept_labels", "kept_visual", "kept_images")
_SCHEMA = pa.schema([*((name, pa.int64()) for name in _COUNTS), ("fault", pa.string())])


@dataclass(frozen=True)
class TrialOf:
    """What is tried: rows of a data set with a model's processor.

    Attributes:
        prompts: Whether rows are test prompts; else they are trained on.
    """

    data: DataSpec
    model: ModelSpec
    model_max_length: int
    prompts: bool

    @property
    def file(self) -> str:
        """Name of the file that keeps what was found.

        Raises:
            OSError: the storage fails.
            DataError: the data is not here.
        """
        identity, absent = data_identity(self.data)
        if absent is not None:
            raise DataError(absent)
        model = settings_identity(self.model)
        facts = [_VERSION, version("transformers"), identity, model, self.model_max_length, self.prompts]
        return f"tried-{digest(facts)}.arrow"


class Tried:
    """What came out, one entry a row."""

    def __init__(self, columns: Columns, of: TrialOf) -> None:
        self._columns, self.of = columns, of

    def __len__(self) -> int:
        return len(self._columns)

    def count(self, name: str) -> np.ndarray:
        """Return (N,) of each row: `tokens`, `labels`, `kept_tokens`, `kept_labels`, `kept_visual`, `kept_images`."""
        return self._columns.numpy(name)

    @cached_property
    def bad(self) -> dict[int, str]:
        """Index of each row that cannot be used, or whose answers are all cut off, to the reason."""
        numbers, faults = self.count("number"), self._columns.column("fault")
        found = {int(n): str(f) for n, f in zip(numbers, faults.to_pylist(), strict=True) if f is not None}
        if not self.of.prompts:
            lost = (self.count("kept_labels") == 0) & np.asarray(faults.is_null())
            for number, tokens in zip(numbers[lost].tolist(), self.count("tokens")[lost].tolist(), strict=True):
                limit = self.of.model_max_length
                found[number] = f"model_max_length {limit} cuts off every answer of its {tokens:,} tokens; raise it"
        return dict(sorted(found.items()))

    @property
    def with_images(self) -> int:
        """Rows with an image that the model sees."""
        return int(np.count_nonzero(self.count("kept_images")))

    def remarks(self) -> list[str]:
        """Return what users should know of rows that are used."""
        labels, kept = self.count("labels"), self.count("kept_labels")
        cut = (kept > 0) & (kept < labels)
        if self.of.prompts or not cut.any():
            return []
        share = 1 - kept[cut].sum() / labels.sum()
        return [
            f"{int(cut.sum()):,} of {len(self):,} rows lose a part of their answers beyond model_max_length "
            f"{self.of.model_max_length} ({share:.1%} of all tokens that are learned)"
        ]


def tried(of: TrialOf) -> Tried | None:
    """Return what an earlier trial found; None where there was none."""
    columns = open_columns(of.file, _check)
    return None if columns is None else Tried(columns, of)


def left_out(data: DataSpec, model: ModelSpec, model_max_length: int, prompts: bool) -> list[int]:
    """Return the indices of rows that a trial found unusable where the data set drops such rows; needs no torch."""
    found = tried(TrialOf(data, model, model_max_length, prompts))
    return [] if found is None or found_faults(found) else list(found.bad)


def found_faults(found: Tried) -> list[str]:
    """Return what forbids a run: bad rows, unless they are dropped and few enough. First how many they are."""
    if not found.bad:
        return []
    share, data = len(found.bad) / len(found), found.of.data
    lines = fault_lines(found.bad, len(found))
    if getattr(data, "on_bad_row", "fail") != "drop":
        drop = ", or on_bad_row: drop leaves them out" if hasattr(data, "on_bad_row") else ""
        return [f"this model cannot use {len(found.bad):,} of {len(found):,} rows; mend them{drop}", *lines]
    allowed = getattr(data, "max_bad_share", 0.0)
    if share <= allowed and share < 1:
        return []
    return [f"this model cannot use {share:.2%} of the rows, max_bad_share allows {allowed:.2%}", *lines]


def try_rows(of: TrialOf) -> Tried:
    """Try every row that was not tried before.

    Raises:
        DataError: the rows cannot be read.
        UsageError: the model's processor cannot be used at all.
        OSError: the storage fails.
    """
    file = of.file
    known = tried(of)
    if known is not None:
        return known
    from orchestrator.data.processing.encode import Encoder
    from orchestrator.data.processing.processor import load_processor
    from orchestrator.data.train_data import template_of

    rows, processor = open_rows(of.data), load_processor(of.model)
    trial = _Trial(rows, Encoder(processor, template_of(of.data), of.model_max_length), processor, of.prompts)
    chunks, done = Chunks(file, _SCHEMA), list[Columns]()
    what = "test prompts tried" if of.prompts else "rows tried"
    with progress(what, len(rows)) as advance:
        for number, first in enumerate(range(0, len(rows), CHUNK_ROWS)):
            some = rows[first : first + CHUNK_ROWS]
            done.append(chunks.get(number) or chunks.put(number, trial.batch(some)))
            advance(len(some))
    kept = keep_columns(file, lambda: batches_of(done), _SCHEMA)
    chunks.forget()
    return Tried(kept, of)


def _check(columns: Columns) -> None:
    if columns.schema.names != _SCHEMA.names:
        raise DamagedColumns("another table")
    for name in _SCHEMA.names:
        columns.column(name)


class _Trial:
    """One model's processor and the rows that go through it."""

    def __init__(self, rows: IndexedRows, encoder: Encoder, processor: VisionTextProcessor, prompts: bool) -> None:
        self._encoder, self._processor, self._prompts = encoder, processor, prompts
        self._sizes = rows.origin.images.sizes if rows.num_images.any() else {}
        if self._sizes:
            processor.images.know_sizes(self._sizes)
        self._faults_by_size: dict[tuple[int, int] | None, str | None] = {}

    def batch(self, rows: Sequence[Row]) -> pa.RecordBatch:
        """Return what some rows come to."""
        values = zip(*self._entries(rows), strict=True)
        arrays = [pa.array(column, type=field.type) for column, field in zip(values, _SCHEMA, strict=True)]
        return pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA)

    def _entries(self, rows: Sequence[Row]) -> Iterator[tuple[Any, ...]]:
        for row in rows:
            try:
                fault = self._image_fault(row)
                if self._prompts and not any(turn.role == "assistant" for turn in row.turns):
                    fault = "no answer to compare with"
                if fault is None:
                    yield (row.index, *self._encoder.lengths(row, self._prompts), None)
                    continue
            except DataError as error:
                fault = str(error).removeprefix(f"row {row.index}: ")
            except (OSError, MemoryError, UsageError):
                raise
            # A template or a processor raises whatever it stumbles over.
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
            yield (row.index, *[0] * (len(_COUNTS) - 1), fault)

    def _image_fault(self, row: Row) -> str | None:
        """Return what the processor says to images of these sizes: no processor looks further."""
        for image in row.images:
            size = self._sizes.get(image.path)
            if size not in self._faults_by_size:
                try:
                    self._processor.pixels([image])
                    self._faults_by_size[size] = None
                except DataError as error:
                    self._faults_by_size[size] = str(error).removeprefix(image.path).strip()
            if (fault := self._faults_by_size[size]) is not None:
                return f"{image.path} {fault}"
        return None


_OF_IMAGES = ("vision_tower", "projector", "compressor")


@dataclass(frozen=True)
class Use:
    """Data sets that one phase trains on, or one evaluation tests on.

    Attributes:
        where: The phase's or evaluation's key path.
        entries: `{"name", "spec"}` and, where rows are left out, `left_out`, of each set.
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


@dataclass
class Findings:
    """What a check found.

    Attributes:
        remarks: What users should know.
        replan: Whether rows are left out that the plan did not leave out.
    """

    remarks: dict[str, None] = field(default_factory=dict)
    replan: bool = False


def uses_of_jobs(work: Iterable[Job]) -> Iterator[Use]:
    """Return what some work uses."""
    for job in work:
        if isinstance(job, StageJob):
            recipe = job.recipe
            train = tuple(recipe["train"])
            yield Use(f"phases.{job.phase}", job.data, job.model, recipe["model_max_length"], train)
        elif isinstance(job, EvaluationJob):
            yield _of_test(job)


def uses_of_cells(cells: Iterable[Cell]) -> Iterator[Use]:
    """Return what some cells use, done or not."""
    for cell in cells:
        for plan in cell.phases:
            length, train = plan.recipe.model_max_length, tuple(plan.recipe.train)
            yield Use(f"phases.{plan.name}", plan.data, cell.root.model, length, train)
        yield from map(_of_test, cell.evaluations)


def _of_test(job: EvaluationJob) -> Use:
    entry = {"name": "", "spec": job.data, "content": job.content, "left_out": list(job.left_out)}
    return Use(f"evaluate.{job.name}", (entry,), job.model, job.model_max_length)


def check_uses(uses: Iterable[Use]) -> Findings:
    """Read every row and image, and try each with the model's processor, as far as that was not done before.

    Raises:
        DataError: rows cannot be used, or a part that trains is reached by no row.
    """
    distinct = {digest([use.entries, use.model, use.model_max_length, sorted(use.train)]): use for use in uses}
    specs: dict[str, DataSpec] = {}
    for use in distinct.values():
        for entry in use.entries:
            specs.setdefault(digest(entry["spec"]), _spec_of(entry))
    findings = Findings()
    for spec in specs.values():
        raise_for_faults(_called(spec), open_data_set(spec).check())
        open_rows(spec)
        findings.remarks |= dict.fromkeys(f"{_called(spec)}: {text}" for text in spec.remarks())
    for use in distinct.values():
        _try(use, findings)
    return findings


def _try(use: Use, findings: Findings) -> None:
    model = ModelSpec.model_validate(use.model)
    found: list[Tried] = []
    for entry in use.entries:
        one = try_rows(TrialOf(_spec_of(entry), model, use.model_max_length, use.prompts))
        name = f".data.{entry['name']}" if entry["name"] else ""
        if faults := found_faults(one):
            more = [f"... and {len(faults) - FAULTS_SHOWN} more"] if len(faults) > FAULTS_SHOWN else []
            raise DataError("\n    ".join([f"{use.where}{name}: {faults[0]}", *faults[1:FAULTS_SHOWN], *more]))
        findings.replan |= list(one.bad) != list(entry.get("left_out", ()))
        if one.bad:
            some = [f"row {number}: {reason}" for number, reason in list(one.bad.items())[:3]]
            more = ["..."] if len(one.bad) > len(some) else []
            text = f"{len(one.bad):,} of {len(one):,} rows dropped, which this model cannot use: "
            findings.remarks[f"{use.where}{name}: {text}{'; '.join(some + more)}"] = None
        findings.remarks |= dict.fromkeys(f"{use.where}{name}: {text}" for text in one.remarks())
        found.append(one)
    unreached = [part for part in use.train if part in _OF_IMAGES]
    if unreached and not any(one.with_images for one in found):
        raise DataError(_no_image_seen(use, unreached, found))


def _no_image_seen(use: Use, unreached: Sequence[str], found: Sequence[Tried]) -> str:
    rows = sum(map(len, found))
    rest = ", ".join(part for part in use.train if part not in unreached)
    advice = f"train: [{rest}]" if rest else "data with images"
    return (
        f"{use.where}.train: {', '.join(unreached)} would be trained, but none of the {rows:,} rows has an image that "
        f"the model sees within model_max_length {use.model_max_length}; give {advice}"
    )


def _spec_of(entry: dict[str, Any]) -> DataSpec:
    from orchestrator import registry

    spec: DataSpec = registry.spec_class(registry.DATA, entry["spec"]["kind"]).model_validate(entry["spec"])
    return spec


def _called(spec: DataSpec) -> str:
    return " ".join([f"data of kind {spec.kind}", *(str(getattr(spec, name)) for name in spec.path_fields[:1])])

"""Contract kits: what they share, those of schedules and data kinds, and all of them on a plug-in file."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from orchestrator import registry
from orchestrator.data.records.image_files import BadImage, file_of, open_image
from orchestrator.data.records.video_files import clip_of, frames_of
from orchestrator.data.rows import VIDEO_MARK, DataSet, ImageRef, Row, Turn, evenly_spread, open_data_set
from orchestrator.errors import DataError, UsageError, shorten
from orchestrator.plan.identity import digest
from orchestrator.spec.base import Component, validation_text
from orchestrator.spec.checks.places import implementation_error
from orchestrator.spec.components import DataSpec, ScheduleSpec, StageTable, merge_actions

SpecType = TypeVar("SpecType", bound=Component)
Reference = Component | type[Component] | Mapping[str, Any] | str | Path
"""A component: a spec, a spec class, a mapping with a `kind`, or a plug-in file that defines one of its sort."""


class Broken(AssertionError):
    """A promise that does not hold; the message says what was found and what to do."""


class ContractError(AssertionError):
    """A component breaks its contract; the message lists every promise it breaks.

    Attributes:
        broken: A line a promise: what was promised, what was found, what to do.
    """

    def __init__(self, component: str, broken: Sequence[str]) -> None:
        count = f"{len(broken)} promise{'s' if len(broken) > 1 else ''}"
        super().__init__("\n  ".join([f"{component} breaks {count} of its contract:", *broken]))
        self.broken = tuple(broken)


@dataclass(frozen=True)
class ContractReport:
    """What a contract kit found of a component that keeps its contract.

    Attributes:
        component: Its `kind`.
        held: The promises that were checked and hold.
        skipped: Those that could not be checked, and why.
    """

    component: str
    held: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """A line each of what was checked, and of what could not be."""
        return (*(f"holds: {promise}" for promise in self.held), *(f"not checked: {one}" for one in self.skipped))

    def __str__(self) -> str:
        return "\n  ".join([f"{self.component}:", *self.lines])


@dataclass
class Contract:
    """Collects the promises of one component that hold, that are broken, and that cannot be checked."""

    component: str
    held: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @contextmanager
    def promise(self, text: str) -> Iterator[None]:
        """Check one promise within the block, which raises `Broken` where it does not hold."""
        try:
            yield
        except Broken as error:
            self.broken.append(f"{text}: {error}")
        except Exception as error:
            self.broken.append(f"{text}: it raised {type(error).__name__}: {error}")
        else:
            self.held.append(text)

    def report(self) -> ContractReport:
        """Return the report of a component that keeps its contract.

        Raises:
            ContractError: a promise is broken.
        """
        if self.broken:
            raise ContractError(self.component, self.broken)
        return ContractReport(self.component, tuple(self.held), tuple(self.skipped))


def component_of(
    reference: Reference, base: type[SpecType], kit: str, defaults: Mapping[str, Any] | None = None
) -> SpecType:
    """Return the spec that a reference means.

    A class's required fields take the first of their `Field(examples=[...])`.

    Args:
        reference: A spec, a spec class, a mapping with a `kind`, or a plug-in file.
        base: The base class of its sort.
        kit: Name of the kit, for messages.
        defaults: Values of required fields that the kit knows itself.

    Raises:
        UsageError: it is no such component, or a required field has no value.
    """
    if isinstance(reference, base):
        return reference
    if not isinstance(reference, str | Path | Mapping) and not (
        isinstance(reference, type) and issubclass(reference, base)
    ):
        raise UsageError(f"{kit}: {reference!r} is no {base.__name__}, mapping with a `kind`, or plug-in file")
    cls: type[SpecType] = registry.class_of(reference, base.registry_group, kit)
    given = reference if isinstance(reference, Mapping) else {}
    refuse_unfinished(cls, kit)
    examples = {name: one.examples[0] for name, one in cls.model_fields.items() if one.is_required() and one.examples}
    values = {"kind": cls.kind_name(), **examples, **(defaults or {}), **given}
    missing = sorted(name for name, one in cls.model_fields.items() if one.is_required() and name not in values)
    if missing:
        first = missing[0]
        raise UsageError(
            f"{kit}: {values['kind']} requires {', '.join(missing)}; give values "
            f"(--set {values['kind']}.{first}=VALUE, in Python a mapping), or write "
            f"`{first}: Annotated[TYPE, Field(examples=[VALUE])]` in {cls.__name__}, which the kit then uses"
        )
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{kit}: {values!r} is no {values['kind']}: {validation_text(error)}") from error


def refuse_unfinished(cls: type[Component], kit: str) -> None:
    """Refuse a class that no spec can be made of.

    Raises:
        UsageError: it has no `kind`, or lacks what its base class leaves to it.
    """
    if not isinstance(cls.model_fields["kind"].default, str):
        raise UsageError(f'{kit}: {cls.__name__} has no kind; write `kind: Literal["NAME"] = "NAME"` in it')
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise UsageError(f"{kit}: {cls.__name__} lacks {', '.join(missing)}; its base class says what it is")


def check_spec(contract: Contract, spec: Component, methods: Sequence[str] = ()) -> None:
    """Check what the specs of all sorts promise: a description, an identity, an implementation.

    Args:
        contract: Takes the results.
        spec: The spec.
        methods: What its implementation must have; none for a sort without implementations.
    """
    cls = type(spec)
    with contract.promise("its class has a docstring, whose first line `llavolta components` shows"):
        if not (cls.__doc__ or "").strip():
            raise Broken(f"{cls.__name__} has none; say in one line what it does")
    with contract.promise("class attributes name fields that exist"):
        named = {*cls.path_fields, *cls.not_identity}
        if unknown := sorted(named - set(cls.model_fields)):
            raise Broken(f"path_fields and not_identity name {', '.join(unknown)}, which {cls.__name__} has not")
    with contract.promise("its values are JSON, and made again from them it is the same"):
        values = spec.model_dump(mode="json")
        again = cls.model_validate(values)
        if again != spec or digest(again.model_dump(mode="json")) != digest(values):
            raise Broken(
                f"{values} becomes {again.model_dump(mode='json')}; a validator changes values that it made itself, "
                "so that the identity of a cell would move"
            )
    if methods:
        with contract.promise(f"its implementation exists and has {', '.join(methods)}"):
            if wrong := implementation_error(cls, tuple(methods)):
                raise Broken(f"{wrong}; set `implementation: ClassVar[str]` to `module:Class`")
            found = registry.load_object(cls.implementation)
            if lacking := [name for name in methods if not callable(getattr(found, name, None))]:
                raise Broken(f"{cls.implementation} has no {', '.join(lacking)}")


def shown(value: Any) -> str:
    """Return a value as messages show it."""
    return shorten(repr(value), 120)


PHASES = ((97, 128), (400, 128), (1000, 1), (5197, 256))
"""Phases the kit tries: (optimizer steps, global batch size); lengths that shares divide, and that they do not."""
_SHORT = range(1, 13)
"""Steps of phases that may be too short: each gives a ValueError or a table without a flaw."""


def check_schedule(schedule: Reference, phases: Sequence[tuple[int, int]] = PHASES) -> ContractReport:
    """Prove that a schedule keeps its contract: one line in a plug-in's tests.

    `compile` is a pure function of the spec, the phase's steps and its batch size. Its actions cover all steps without
    gap or overlap, equal neighbours merged; they, `final` and the teachers name variants that `variants` lists or the
    table derives from one of those; stage runs end in rising order, the last with the phase. A phase that is too short
    is a `ValueError` and nothing else.

    Args:
        schedule: A spec, a spec class (required fields take their `Field(examples=[...])`), a mapping with a `kind`, or
            a plug-in file that defines one schedule.
        phases: Optimizer steps and global batch sizes to try.

    Returns:
        What was checked.

    Raises:
        ContractError: an AssertionError; a promise is broken. The message lists all that are, and what to do.
        UsageError: it is no schedule.

    Example:
        >>> check_schedule({"kind": "interleaved", "compressor": "heavy", "full_share": "1/10"})
    """
    spec = component_of(schedule, ScheduleSpec, "check_schedule")  # type: ignore[type-abstract]  # it is only named
    contract = Contract(spec.kind)
    check_spec(contract, spec)
    with contract.promise("variants() lists the names it uses, each once"):
        names = spec.variants()
        if not isinstance(names, tuple) or not names or not all(isinstance(name, str) and name for name in names):
            raise Broken(f"it returned {shown(names)}; return a tuple of names of variants, at least one")
        if len(set(names)) < len(names):
            raise Broken(f"it returned {names}; list each name once")
    tables = []
    with contract.promise("compile() gives a table for a phase that is long enough, else a ValueError"):
        reasons = []
        for steps, batch in phases:
            try:
                tables.append((steps, batch, spec.compile(steps, batch)))
            except ValueError as error:
                reasons.append(f"{steps} steps of {batch}: {error}")
        if not tables:
            raise Broken(
                f"no phase can be compiled: {'; '.join(reasons)}; give a spec that fits one, or other `phases`"
            )
        if wrong := [table for *_, table in tables if not isinstance(table, StageTable)]:
            raise Broken(f"it returned {shown(wrong[0])}; return a plugin.StageTable")
    with contract.promise("a phase of a few steps is compiled, or refused by a ValueError"):
        for steps in _SHORT:
            try:
                tables.append((steps, 1, spec.compile(steps, 1)))
            except ValueError as error:
                if not str(error):
                    raise Broken("the ValueError says nothing; say how many steps are needed") from None
    if not contract.broken:
        _check_tables(contract, spec, tables)
    return contract.report()


def _check_tables(contract: Contract, spec: ScheduleSpec, tables: Sequence[tuple[int, int, StageTable]]) -> None:
    with contract.promise("compile() is a pure function: called again, of an equal spec, it gives the same"):
        state = random.getstate()
        again = type(spec).model_validate(spec.model_dump(mode="json"))
        for steps, batch, table in tables:
            for number, one in enumerate((spec, again)):
                random.seed(number)  # a draw that is not seeded by the spec would show
                if one.compile(steps, batch) != table:
                    raise Broken(
                        f"two tables of {steps} steps differ; draw from a hash of (a seed of the spec, step) and read "
                        "neither a clock nor a global random state"
                    )
        random.setstate(state)
    with contract.promise("actions cover every step, equal neighbours merged"):
        for steps, _, table in tables:
            if problem := table.problem(steps):
                raise Broken(problem)
            if table.actions != merge_actions(list(table.actions)):
                raise Broken(
                    f"of {steps} steps equal neighbours are two actions; make them one with plugin.merge_actions"
                )
    with contract.promise("every variant is one that variants() lists, or derived from one"):
        for *_, table in tables:
            _check_names(table, set(spec.variants()))


def _check_names(table: StageTable, named: set[str]) -> None:
    if unknown := sorted({base for base, _ in table.derived.values()} - named):
        raise Broken(f"derived variants come from {', '.join(unknown)}, which variants() does not list")
    used = {name for *_, name in table.actions} | {table.final, *table.teachers}
    used |= {teaching.teacher for teaching in table.teachers.values()}
    used |= {name for students in table.students.values() for name in students.variants} | set(table.students)
    if unknown := sorted(used - named - set(table.derived)):
        raise Broken(f"it uses {', '.join(unknown)}, which variants() does not list and the table does not derive")


_SOME = 200
"""Rows and images that are looked at, spread evenly."""
_ROLES = re.compile(r"(system )?(user assistant )+")


def check_data(data: Reference) -> ContractReport:
    """Prove that a data kind keeps its contract: one line in a plug-in's tests.

    `rows()` gives what `Row` says, as many as `num_rows` counts, in an order that another reading repeats; images open;
    `check()` reports no errors; `max_samples` and `first_rows` cut; `content_digest` is a SHA-256 that stays while the
    content does and changes with it; nothing of this loads torch. Where a spec has `path_fields`, the kit changes
    copies of the files they name, and of an image below them, to see the digest change.

    Args:
        data: A spec, a spec class (required fields take their `Field(examples=[...])`), a mapping with a `kind`, or a
            plug-in file that defines one data kind. Its data must be here.

    Returns:
        What was checked, and what could not be.

    Raises:
        ContractError: an AssertionError; a promise is broken. The message lists all that are, and what to do.
        UsageError: it is no data kind.

    Example:
        >>> check_data({"kind": "llava_json", "data_path": "rows.json"})
    """
    spec = component_of(data, DataSpec, "check_data")  # type: ignore[type-abstract]  # it is only named
    contract = Contract(spec.kind)
    check_spec(contract, spec, ("rows", "check"))
    rows: Sequence[Row] = ()
    with contract.promise("rows() gives a sequence of rows, as many as num_rows counts"):
        rows, counted = open_data_set(spec).rows(), spec.num_rows()
        if not len(rows):
            raise Broken("there are none; check it on data with at least one row")
        if counted is not None and counted != len(rows):
            raise Broken(
                f"num_rows counts {counted}, rows() gives {len(rows)}; the planner derives steps from num_rows"
            )
    if contract.broken:
        return contract.report()
    some = [(place, rows[place]) for place in evenly_spread(len(rows), _SOME)]
    with contract.promise("every row is what `Row` says"):
        for place, row in some:
            _check_row(place, row)
    with contract.promise("another reading gives the same rows in the same order"):
        again = open_data_set(type(spec).model_validate(spec.model_dump(mode="json"))).rows()
        for place, row in some:
            if rows[place] != row or again[place] != row:
                raise Broken(
                    f"place {place} holds another row; sort what a folder or a set lists, and draw from no global "
                    "random state"
                )
    with contract.promise("images open"):
        images = dict.fromkeys(image for _, row in some for image in getattr(row, "images", ()))
        for place in evenly_spread(len(images), _SOME):
            _open(list(images)[place])
    with contract.promise("check() reports no errors in good data, as a list of texts"):
        _check_check(open_data_set(spec))
    _check_cuts(contract, spec, len(rows))
    _check_digest(contract, spec, rows)
    _check_torch_free(contract, spec)
    return contract.report()


def _check_row(place: int, row: Row) -> None:
    where = f"place {place}"
    if not isinstance(row, Row):
        raise Broken(f"{where} holds {shown(row)}; return plugin.Row")
    where = f"row {row.index} (place {place})"
    if not isinstance(row.turns, tuple) or not all(isinstance(turn, Turn) for turn in row.turns):
        raise Broken(f"{where} has the turns {shown(row.turns)}; give a tuple of plugin.Turn")
    if not isinstance(row.images, tuple) or not all(isinstance(image, ImageRef) for image in row.images):
        raise Broken(f"{where} has the images {shown(row.images)}; give a tuple of plugin.ImageRef")
    roles = "".join(f"{turn.role} " for turn in row.turns)
    if not _ROLES.fullmatch(roles):
        raise Broken(
            f"{where} has turns of {roles.strip() or 'no role'}; they are user and assistant in turn, the user first "
            "and the assistant last, before them at most one of the system"
        )
    if not all(isinstance(turn.text, str) for turn in row.turns):
        raise Broken(f"{where} has a turn whose text is no str")
    for mark in row.marks:
        what, count = mark.strip("<>"), sum(image.video == (mark == VIDEO_MARK) for image in row.images)
        marks = sum(turn.text.count(mark) for turn in row.turns)
        if marks != count:
            raise Broken(f"{where} has {count} {what}s and {marks} marks {mark}; put a mark for each {what}")
    if not (row.answer_type is None or isinstance(row.answer_type, str)):
        raise Broken(f"{where} has the answer_type {row.answer_type!r}; it is a str or None")


def _open(image: ImageRef) -> None:
    try:
        if image.video:
            frames_of(clip_of(image.path), image.reading)
        else:
            open_image(image.path, image.reading)
    except BadImage as error:
        raise Broken(f"{image.path} {error}; leave such rows out, or report them in check()") from error


def _check_check(data_set: DataSet) -> None:
    for every_row in (True, False):
        errors = data_set.check(every_row)
        if not isinstance(errors, list) or not all(isinstance(error, str) for error in errors):
            raise Broken(f"check(every_row={every_row}) returned {shown(errors)}; return a list of texts")
        if errors:
            raise Broken(f"check(every_row={every_row}) reports {len(errors)}, first: {errors[0]}")


def _check_cuts(contract: Contract, spec: DataSpec, count: int) -> None:
    with contract.promise("max_samples cuts rows and num_rows alike"):
        cut = type(spec).model_validate({**spec.model_dump(mode="json"), "max_samples": 1})
        if (found := len(open_data_set(cut).rows())) != 1 or cut.num_rows() not in (1, None):
            raise Broken(
                f"with max_samples 1 there are {found} rows and num_rows says {cut.num_rows()}; plugin.evenly_spread "
                "gives the places of the rows to take"
            )
    with contract.promise("first_rows gives a smaller set of the same kind"), tempfile.TemporaryDirectory() as folder:
        few = spec.first_rows(2, Path(folder))
        if not 1 <= len(open_data_set(few).rows()) <= min(2, count):
            raise Broken(f"first_rows(2, ...) has {len(open_data_set(few).rows())} rows")


def _check_digest(contract: Contract, spec: DataSpec, rows: Sequence[Row]) -> None:
    before = ""
    with contract.promise("content_digest is a SHA-256 that stays while the content does"):
        before = spec.content_digest()
        if not isinstance(before, str) or not re.fullmatch("[0-9a-f]{64}", before):
            raise Broken(f"it is {before!r}; return 64 hexadecimal digits, e.g. of plugin.content_digest(path)")
        if type(spec).model_validate(spec.model_dump(mode="json")).content_digest() != before:
            raise Broken("an equal spec has another one; digest the content, not the path, time or order of reading")
    if contract.broken:
        return
    paths = {name: Path(value) for name in spec.path_fields if (value := getattr(spec, name)) is not None}
    files = [path for path in paths.values() if path.is_file()]
    roots = [path if path.is_dir() else path.parent for path in paths.values() if path.exists()]
    images = [Path(file_of(image.path)) for place in evenly_spread(len(rows), _SOME) for image in rows[place].images]
    below = [image for image in images if any(root.resolve() in image.resolve().parents for root in roots)]
    if not files and not below:
        contract.skipped.append("content_digest changes with the content: the spec has no path_fields to change")
    for what, path in (("a file", files[0] if files else None), ("an image", below[0] if below else None)):
        if path is None:
            continue
        with contract.promise(f"content_digest changes with the content of {what}"):
            after = None
            # A file of many (Parquet, tar) that is refused where something follows behind its end was noticed, too.
            with suppress(DataError), _changed(path, paths) as moved:
                after = type(spec).model_validate({**spec.model_dump(mode="json"), **moved}).content_digest()
            if after == before:
                raise Broken(f"another {path.name} has the same digest; digest its bytes, images included")


@contextmanager
def _changed(file: Path, paths: Mapping[str, Path]) -> Iterator[dict[str, str]]:
    """Yield the path fields in a copy, made of links, of the folder that holds them all, where one file differs."""
    places = [path.resolve() for path in paths.values()]
    root = Path(os.path.commonpath([file.resolve().parent, *(p if p.is_dir() else p.parent for p in places)]))
    with tempfile.TemporaryDirectory() as folder:
        source, target = root, Path(folder)
        for part in file.resolve().relative_to(root).parts:
            for other in source.iterdir():
                if other.name != part:
                    (target / other.name).symlink_to(other)
            source, target = source / part, target / part
            if source.is_dir():
                target.mkdir()
        # A line end behind a text, or behind the end of an image, is another content and reads the same.
        target.write_bytes(source.read_bytes() + b"\n")
        yield {name: str(Path(folder) / path.resolve().relative_to(root)) for name, path in paths.items()}


_READ_ALONE = """
import importlib, sys
from pathlib import Path
sys.path[:] = {path!r}
from orchestrator import registry
from orchestrator.data.rows import open_data_set
if {file!r}:
    registry.load_plugin({file!r}, Path("."))
    cls = registry.spec_class(registry.DATA, {kind!r})
else:
    cls = getattr(importlib.import_module({module!r}), {name!r})
spec = cls.model_validate({values!r})
spec.num_rows(), len(open_data_set(spec).rows())
sys.exit(7 if "torch" in sys.modules else 0)
"""


def _check_torch_free(contract: Contract, spec: DataSpec) -> None:
    cls, text = type(spec), "counting and reading rows loads no torch"
    module = sys.modules[cls.__module__]
    if getattr(module, cls.__name__, None) is not cls:
        contract.skipped.append(f"{text}: {cls.__qualname__} is defined inside a function")
        return
    by_path = cls.__module__.startswith("llavolta_plugin_")
    code = _READ_ALONE.format(
        path=sys.path,
        file=module.__file__ if by_path else "",
        kind=spec.kind,
        module=cls.__module__,
        name=cls.__name__,
        values=spec.model_dump(mode="json"),
    )
    with contract.promise(text):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
        if done.returncode == 7:
            raise Broken("it does; import torch inside the functions that need it, which are none here")
        if done.returncode:
            raise Broken(f"a process of its own cannot read it: {done.stderr.strip().splitlines()[-1]}")


_KITS = {
    registry.COMPRESSORS: "orchestrator.compression.testing:check_compressor",
    registry.SCHEDULES: f"{__name__}:check_schedule",
    registry.DATA: f"{__name__}:check_data",
    registry.EVALUATIONS: "orchestrator.testing.evaluation:check_evaluation",
}
"""Each sort's kit, loaded when it is used: those of compressors and evaluations need torch."""


@dataclass(frozen=True)
class Checked:
    """What the contract kit said of one component.

    Attributes:
        kind: Its `kind`.
        sort: `compressors`, `schedules`, `data` or `evaluations`.
        broken: The promises it breaks, in words; empty where it keeps its contract.
        report: What was checked, and how it came out, a line each.
    """

    kind: str
    sort: str
    broken: tuple[str, ...]
    report: tuple[str, ...]


def check_file(
    file: str | Path,
    values: Mapping[str, Mapping[str, Any]] | None = None,
    families: Collection[str] | None = None,
    *,
    on_checked: Callable[[Checked], None] = lambda checked: None,
) -> list[Checked]:
    """Return the result of every component that a plug-in file defines, in the file's order.

    Args:
        file: The plug-in.
        values: By kind, values of fields; those a kit cannot guess are required.
        families: Model families on which compressors are checked; by default all.
        on_checked: Called with each result as soon as it is there.

    Raises:
        UsageError: the file is no plug-in, values are given for a kind that it does not define, or a family is unknown.
    """
    had_torch = "torch" in sys.modules
    defined = registry.load_plugin(str(file), Path.cwd())
    classes = [cls for cls in defined if cls.registry_group in registry.SORTS.values()]
    if not classes:
        raise UsageError(f"check: {file} defines trackers alone, which there is no kit for; a run tries them")
    loads_torch = "torch" in sys.modules and not had_torch
    kinds, values = [cls.kind_name() for cls in classes], values or {}
    if unknown := sorted(set(values) - set(kinds)):
        raise UsageError(f"check: {file} defines no {', '.join(unknown)}; it defines {', '.join(kinds)}")
    if families is not None:
        known = registry.load_object("orchestrator.compression.testing.families:TINY")
        if wrong := sorted(set(families) - set(known)):
            raise UsageError(f"check: no family {', '.join(wrong)}; known: {', '.join(known)}")
    results = []
    for cls in classes:
        results.append(_checked(cls, values.get(cls.kind_name(), {}), families, loads_torch))
        on_checked(results[-1])
    return results


def _checked(cls: type[Any], values: Mapping[str, Any], families: Collection[str] | None, loads_torch: bool) -> Checked:
    sort = next(name for name, group in registry.SORTS.items() if group == cls.registry_group)
    kind, broken, report = cls.kind_name(), [], ()
    if loads_torch:
        broken.append("importing the file loads torch, which `validate` does not; import it inside the implementation")
    try:
        refuse_unfinished(cls, "check")
        kit = registry.load_object(_KITS[cls.registry_group])
        options = {"families": families} if cls.registry_group == registry.COMPRESSORS else {}
        report = kit({"kind": kind, **values}, **options).lines
    except ContractError as error:
        broken += error.broken
    except (AssertionError, UsageError) as error:
        broken.append(str(error))
    return Checked(kind, sort, tuple(broken), report)

"""`check_data`: a data kind yields the rows it counts, always the same ones, and its digest follows their content."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from orchestrator.data.records.image_files import BadImage, open_image
from orchestrator.data.rows import IMAGE_MARK, DataSet, ImageRef, Row, Turn, evenly_spread, open_data_set
from orchestrator.spec.components import DataSpec
from orchestrator.testing.contract import (
    Broken,
    Contract,
    ContractReport,
    Reference,
    check_spec,
    component_of,
    shorten,
)

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
        raise Broken(f"{where} holds {shorten(row)}; return plugin.Row")
    where = f"row {row.index} (place {place})"
    if not isinstance(row.turns, tuple) or not all(isinstance(turn, Turn) for turn in row.turns):
        raise Broken(f"{where} has the turns {shorten(row.turns)}; give a tuple of plugin.Turn")
    if not isinstance(row.images, tuple) or not all(isinstance(image, ImageRef) for image in row.images):
        raise Broken(f"{where} has the images {shorten(row.images)}; give a tuple of plugin.ImageRef")
    roles = "".join(f"{turn.role} " for turn in row.turns)
    if not _ROLES.fullmatch(roles):
        raise Broken(
            f"{where} has turns of {roles.strip() or 'nobody'}; they are user and assistant in turn, the user first "
            "and the assistant last, before them at most one of the system"
        )
    if not all(isinstance(turn.text, str) for turn in row.turns):
        raise Broken(f"{where} has a turn whose text is no str")
    marks = sum(turn.text.count(IMAGE_MARK) for turn in row.turns)
    if marks != len(row.images):
        raise Broken(f"{where} has {len(row.images)} images and {marks} marks {IMAGE_MARK}; put a mark for each image")
    if not (row.answer_type is None or isinstance(row.answer_type, str)):
        raise Broken(f"{where} has the answer_type {row.answer_type!r}; it is a str or None")


def _open(image: ImageRef) -> None:
    try:
        open_image(image.path, image.reading)
    except BadImage as error:
        raise Broken(f"{image.path} {error}; leave such rows out, or report them in check()") from error


def _check_check(data_set: DataSet) -> None:
    for every_row in (True, False):
        errors = data_set.check(every_row)
        if not isinstance(errors, list) or not all(isinstance(error, str) for error in errors):
            raise Broken(f"check(every_row={every_row}) returned {shorten(errors)}; return a list of texts")
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
    images = [Path(image.path) for place in evenly_spread(len(rows), _SOME) for image in rows[place].images]
    below = [image for image in images if any(root.resolve() in image.resolve().parents for root in roots)]
    if not files and not below:
        contract.skipped.append("content_digest changes with the content: the spec has no path_fields to change")
    for what, path in (("a file", files[0] if files else None), ("an image", below[0] if below else None)):
        if path is None:
            continue
        with contract.promise(f"content_digest changes with the content of {what}"):
            with _changed(path, paths) as moved:
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

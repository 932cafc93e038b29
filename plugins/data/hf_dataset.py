"""`hf_dataset`: a Hugging Face data set (Parquet and what else the library `datasets` reads), its columns mapped."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from orchestrator import plugin
from orchestrator.data.records.conversations import READ_KEYS, RecordOptions, parse_record, short
from orchestrator.data.records.json_records import BadRow
from orchestrator.data.records.record_set import RecordSet, RecordsSpec
from orchestrator.plan.identity import cache_folder, digest, shared_cache_folder, source_code
from orchestrator.spec.model_facts import hub_repository, hub_snapshot

_READERS = tuple(f"orchestrator.data.{name}" for name in ("rows", "records.json_records", "records.conversations"))
ROWS_AT_ONCE = 32
_SPLIT = re.compile(r"[A-Za-z0-9_.]+")
_SLICED = re.compile(r"[A-Za-z0-9_.]+(\[[^\]]*\])?(\+[A-Za-z0-9_.]+(\[[^\]]*\])?)*")


_FOR_EVALUATIONS = ("answers", "options", "category")


class ColumnNames(plugin.Spec):
    """Which columns are read, as what; all others are left unread. Class labels are read as their names."""

    image: str | None = Field(default=None, examples=["image"])
    """An image or a list of images, embedded in the data; null: text-only rows."""
    conversations: str | None = Field(default=None, examples=["conversations"])
    """Turns, LLaVA's (`from`, `value`) or with `role` and `content`; or give `question` and `answer`."""
    question: str | None = Field(default=None, examples=["question"])
    """A question; the marks of the row's images are put before it unless it has them."""
    answer: str | None = Field(default=None, examples=["answer"])
    """Its answer, or a list of answers, of which the most frequent is taken, the first of equally frequent ones. An
    integer is taken as its digits; beside `options` it is refused, since it may count them from 0 or from 1.
    """
    system: str | None = Field(default=None, examples=["system"])
    """A system text."""
    id: str | None = Field(default=None, examples=["question_id"])
    """Names a row in messages, beside its number."""
    answers: str | None = Field(default=None, examples=["answers"])
    """For evaluations: a list of answers, all of which are kept."""
    options: str | None = Field(default=None, examples=["choices"])
    """For evaluations: a list of the options of a choice."""
    category: str | None = Field(default=None, examples=["question_type"])
    """For evaluations: a text, which groups accuracies."""
    others: dict[str, str] = Field(default={}, examples=[{"difficulty": "level"}])
    """For evaluations of your own: what they read a column as, and the column."""

    # What evaluations read of a row changes no training; they count it themselves.
    not_identity: ClassVar[frozenset[str]] = frozenset({*_FOR_EVALUATIONS, "others"})

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What it was before evaluations read columns, so that experiments without them keep their records.
        return {name: value for name, value in dump(self).items() if name not in self.not_identity or value}

    @model_validator(mode="after")
    def _turns(self) -> ColumnNames:
        pair = [self.question, self.answer]
        if (self.conversations is None) == (None in pair) or (self.conversations is not None and any(pair)):
            raise PydanticCustomError("columns", "give `conversations`, or `question` and `answer`")
        if taken := [name for name in self.others if name in (*READ_KEYS, *type(self).model_fields)]:
            text = "{names} has a place of its own; `others` is for what it does not name"
            raise PydanticCustomError("columns_others", text, {"names": ", ".join(taken)})
        return self

    @property
    def names(self) -> list[str]:
        """The columns that are read."""
        of_conversation = [value for name, value in self.model_dump().items() if name not in self.not_identity]
        return list(dict.fromkeys(name for name in (*of_conversation, *self.evaluated.values()) if name is not None))

    @property
    def evaluated(self) -> dict[str, str]:
        """What evaluations read, and the column it is read from."""
        named = {name: getattr(self, name) for name in _FOR_EVALUATIONS}
        return {name: column for name, column in named.items() if column is not None} | self.others


class HfDatasetSpec(RecordsSpec):
    """Rows of a data set that the library `datasets` reads from a folder, a file, or the hub's cache on this machine.

    Rows are numbered in the library's order. They are read once; embedded images are put into the cache, each under its
    own SHA-256. A hub's data set is never downloaded silently: `llavolta fetch SPEC` fetches it.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.data.hf_dataset:HfDataset"
    path_fields: ClassVar[tuple[str, ...]] = ("data_path",)
    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"num_samples", "max_bad_share", "streaming", "repo_id", "revision"}
    )

    kind: Literal["hf_dataset"] = "hf_dataset"
    data_path: str | None = Field(default=None, examples=["data/my_set"])
    """Folder laid out as a hub's data set, or one file (`.parquet`, `.arrow`, `.json`, `.csv`); or give `repo_id`."""
    repo_id: str | None = Field(default=None, examples=["HuggingFaceM4/ChartQA"])
    """Name of a data set on the hub, read from the hub's cache on this machine."""
    revision: str = "main"
    """Branch, tag or commit of `repo_id`, as it is in the cache."""
    name: str | None = None
    """Configuration, where the data set has several."""
    split: str = Field(default="train", examples=["train[:95%]"])
    """Split, or a part of it in the library's notation: `train[:95%]`, `train[100:200]`, `train+validation`."""
    columns: ColumnNames = ColumnNames(image="image", conversations="conversations")
    """Which columns are read."""
    streaming: plugin.Flag = False
    """Whether the library reads rows as a stream, without the copy of the data that it else makes in the cache. The row
    index fixes their order either way. A stream has no parts: `split` is then a whole split.
    """

    @model_validator(mode="after")
    def _one_source(self) -> HfDatasetSpec:
        if (self.data_path is None) == (self.repo_id is None):
            raise PydanticCustomError("hf_source", "give either `data_path` or `repo_id`")
        if not _SLICED.fullmatch(self.split):
            raise PydanticCustomError("hf_split", "a split is written `train`, `train[:95%]` or `train+validation`")
        if self.streaming and not _SPLIT.fullmatch(self.split):
            text = "a stream has no parts, its length is not known; give a whole split, or `streaming: false`"
            raise PydanticCustomError("hf_streaming", text)
        return self

    def column_names(self) -> tuple[str, ...]:
        """Return what evaluations can read."""
        return tuple(self.columns.evaluated)

    def column_sources(self) -> dict[str, str]:
        """Return the data's column of each."""
        return self.columns.evaluated

    def record_options(self) -> RecordOptions:
        """Return how records and images are read."""
        return replace(super().record_options(), columns=self.column_names())

    @property
    def source(self) -> str:
        """The folder, file, or the data set's name on the hub."""
        return self.data_path or f"{self.repo_id} (revision {self.revision})"

    def folder(self) -> Path:
        """Return the folder or file that is read.

        Raises:
            FileNotFoundError: the hub's cache does not have it.
        """
        if self.data_path is not None:
            return Path(self.data_path)
        found = hub_snapshot(str(self.repo_id), self.revision, "dataset")
        if found is None:
            raise FileNotFoundError(hub_repository(str(self.repo_id), "dataset"))
        return found

    def is_here(self) -> bool:
        """Return whether the data is on this machine."""
        try:
            return self.folder().exists()
        except FileNotFoundError:
            return False

    def source_digest(self) -> str:
        """Return the SHA-256 over the files' names and contents."""
        return plugin.content_digest(self.folder())


class HfDataset(RecordSet[HfDatasetSpec]):
    """The rows of one split."""

    def index(self) -> plugin.RowIndex:
        """Return the split's rows, good and bad, in the library's order.

        Raises:
            DataError: `datasets` is not installed or cannot read the data, or a column is missing.
            FileNotFoundError: the data is not on this machine.
            OSError: the storage fails.
        """
        spec, options, content = self._spec, self._spec.record_options(), self._spec.source_digest()
        columns = spec.columns.model_dump()
        pictures = _pictures_folder()
        about = {"kind": spec.kind, "plain": spec.conversation_template == "plain", "options": repr(options)}
        about |= {"name": spec.name, "split": spec.split, "columns": columns}
        source = {**about, "content": content, "code": source_code(__name__, *_READERS)}

        def entries() -> Iterator[Callable[[], plugin.Row | tuple[int, str]]]:
            for number, values in enumerate(_values_of(spec, content)):
                entry = _entry(number, values, spec.columns, pictures, spec.conversation_template, options)
                yield partial(_itself, entry)
            if spec.source_digest() != content:
                raise plugin.DataError(f"{spec.source} changes while it is read; wait until it is complete")

        found = plugin.row_index(source, entries, str(pictures), options.reading)
        if found.images.not_named_by_content():
            # Somebody emptied or damaged the cache: the pictures are written again.
            for _ in entries():
                pass
            found = plugin.row_index(source, entries, str(pictures), options.reading)
        if not len(found):
            raise plugin.DataError(f"{spec.source} has no rows in {spec.split}")
        return found

    def _not_there(self) -> str:
        if self._spec.repo_id is None:
            return super()._not_there()
        spec = self._spec
        return (
            f"{spec.source} is not in the hub's cache ({hub_repository(str(spec.repo_id), 'dataset')}); fetch it with "
            f"`llavolta fetch SPEC`, or `hf download --repo-type dataset {spec.repo_id} --revision {spec.revision}`"
        )


def _itself(entry: plugin.Row | tuple[int, str]) -> plugin.Row | tuple[int, str]:
    return entry


def _pictures_folder() -> Path:
    """Return the first cache that can be written, shared by all nodes if there is one."""
    for base in dict.fromkeys((shared_cache_folder(), cache_folder())):
        folder = base / "pictures"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise plugin.DataError(
        f"hf_dataset: embedded images cannot be written to {cache_folder()}; set XDG_CACHE_HOME to a writable folder"
    )


def _values_of(spec: HfDatasetSpec, content: str) -> Iterator[Mapping[str, Any]]:
    """Return the mapped columns of each row, images as bytes, in order.

    Raises:
        DataError: `datasets` is not installed or cannot read it, or a column is missing.
    """
    if importlib.util.find_spec("datasets") is None:
        raise plugin.DataError(
            "hf_dataset: the package datasets is not installed; pip install 'llavolta-orchestrator[data]'"
        )
    import datasets

    folder = spec.folder()
    # The library knows its copy of local files by path and time; ours is told apart by their content.
    place = {"cache_dir": str(cache_folder() / "datasets" / digest([content])[:16])}
    if folder.is_file():
        kinds = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}
        kind = kinds.get(folder.suffix.lower())
        if kind is None:
            raise plugin.DataError(f"{folder}: a file is one of {', '.join(kinds)}")
        where: dict[str, Any] = {"path": kind, "data_files": {"train": str(folder)}}
    else:
        where = {"path": str(folder), "name": spec.name}
    try:
        rows = datasets.load_dataset(**where, **place, split=spec.split, streaming=spec.streaming)
        features = rows.features or {}
        missing = [name for name in spec.columns.names if name not in features]
        if missing:
            raise plugin.DataError(
                f"{spec.source} has no column {', '.join(missing)}; it has {', '.join(features) or 'no names of them'}"
            )
        # As Arrow, where an image is the bytes that it was stored as.
        labels = _class_names(features, spec.columns.names)
        for table in rows.select_columns(spec.columns.names).with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
            for values in table.to_pylist():
                yield values | {name: _named(values[name], classes) for name, classes in labels.items()}
    except (plugin.DataError, FileNotFoundError, MemoryError):
        raise
    # Whatever a library says of a file that it cannot read.
    except Exception as error:
        raise plugin.DataError(f"{spec.source}, split {spec.split}, cannot be read by datasets: {error}") from error


def _class_names(features: Mapping[str, Any], columns: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of classes of each column that holds class labels, alone or in lists."""
    labels = {name: getattr(features[name], "feature", features[name]) for name in columns}
    return {name: list(label.names) for name, label in labels.items() if hasattr(label, "names")}


def _named(given: Any, classes: Sequence[str]) -> Any:
    """Return a class label's name, or a list's; None for one that no class has, as the -1 of a hidden answer."""
    if isinstance(given, list):
        return [_named(one, classes) for one in given]
    return classes[given] if given is not None and 0 <= given < len(classes) else None


def _entry(
    number: int, values: Mapping[str, Any], columns: ColumnNames, pictures: Path, template: str, options: RecordOptions
) -> plugin.Row | tuple[int, str]:
    """Return the row, or its number and why it cannot be used."""
    try:
        return parse_record(number, _record(values, columns, pictures), pictures, template, options)
    except BadRow as error:
        named = f" ({columns.id} {short(values[columns.id])})" if columns.id is not None else ""
        return number, f"{error}{named}"


def _record(values: Mapping[str, Any], columns: ColumnNames, pictures: Path) -> dict[str, Any]:
    """Return a row as a record in LLaVA's format, its images in the cache.

    Raises:
        BadRow: an image is none, or there is no answer.
    """
    given = values[columns.image] if columns.image is not None else None
    images = [] if given is None else given if isinstance(given, list) else [given]
    record: dict[str, Any] = {name: _by_row(values[column]) for name, column in columns.evaluated.items()}
    record["image"] = [_picture(image, str(columns.image), pictures) for image in images]
    if columns.system is not None and values[columns.system] is not None:
        record["system"] = values[columns.system]
    if columns.conversations is not None:
        return {**record, "conversations": _by_row(values[columns.conversations])}
    question = values[str(columns.question)]
    answer = _answer(values[str(columns.answer)], str(columns.answer), columns.options)
    if not isinstance(question, str):
        raise BadRow(f"`{columns.question}` is {short(question)}, not a text")
    if plugin.IMAGE_MARK not in question:
        question = f"{plugin.IMAGE_MARK}\n" * len(images) + question
    return {**record, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def _by_row(value: Any) -> Any:
    """Return a struct of lists, as the library makes of a list of mappings, as that list."""
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        return [dict(zip(value, parts, strict=False)) for parts in zip(*value.values(), strict=False)]
    return value


def _answer(value: Any, column: str, options: str | None) -> str:
    answers: Sequence[Any] = value if isinstance(value, list) else [value]
    if not answers:
        raise BadRow(f"`{column}` is empty: the row has no answer")
    # A yes or no that is stored as a truth value may be asked for in other words.
    if all(isinstance(answer, int) and not isinstance(answer, bool) for answer in answers):
        if options is not None:
            raise BadRow(
                f"`{column}` is {short(value)}, a number, and the row has options (`{options}`), which it may count "
                "from 0 or from 1; give a column that holds the option's text or its letter"
            )
        answers = [str(answer) for answer in answers]
    if not all(isinstance(answer, str) for answer in answers):
        raise BadRow(f"`{column}` is {short(value)}, neither a text, an integer nor a list of them")
    return str(max(answers, key=answers.count))  # the first of equally frequent ones


def _picture(image: Any, column: str, pictures: Path) -> str:
    """Put an image into the cache under its SHA-256, unless it is there; return its name there.

    Raises:
        BadRow: it is no image that is embedded.
    """
    data = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(image, dict) and data is None and image.get("path"):
        try:
            data = Path(image["path"]).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BadRow(f"the image {image['path']} is missing") from error
    if not isinstance(data, bytes):
        raise BadRow(f"`{column}` is {short(image)}, not an embedded image")
    name = sha256(data).hexdigest()
    path = pictures / name[:2] / name
    try:
        if sha256(path.read_bytes()).hexdigest() == name:
            return f"{name[:2]}/{name}"
    except FileNotFoundError:
        path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f"{name}.{os.getpid()}.{secrets.token_hex(4)}")
    aside.write_bytes(data)
    aside.replace(path)
    return f"{name[:2]}/{name}"

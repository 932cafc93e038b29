"""YAML text to a tree of nodes with positions; hostile or ambiguous YAML is an error, found in one bounded pass."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from orchestrator.errors import ErrorDetail, SpecError
from orchestrator.spec.yaml.node import Mark, Node, Path, dotted

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_NODES = 50_000
MAX_ERRORS = 100
_LOADER: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ufffe\uffff]")
_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")
_HEX = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {"": None, "~": None}
_WORDS |= dict.fromkeys(("null", "Null", "NULL"))
_WORDS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)
_WORDS |= {sign + word: float(sign + "inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")}
_WORDS |= {word: float("nan") for word in (".nan", ".NaN", ".NAN")}
_TAG = "tag:yaml.org,2002:"
_MERGE = "<<"


class _TooMuchError(Exception):
    """A limit is passed: reading stops at once."""

    def __init__(self, message: str, mark: Mark) -> None:
        self.message, self.mark = message, mark


@dataclass
class _Open:
    """A mapping or list whose end was not read yet."""

    node: Node
    anchor: str | None
    key: str | None = None
    merges: list[Node] = field(default_factory=list)


def read_tree(data: bytes | str, file: str | None) -> Node:
    """Read one YAML document whose root is a mapping.

    Args:
        data: The file's content.
        file: Its name in positions; None for a value given by `--set`.

    Raises:
        SpecError: it is not such a document; with every duplicate key and tag, and the first syntax error.
    """
    root, errors = read_value(data, file)
    if not errors and root.value is None:
        errors.append(ErrorDetail("the file is empty; an experiment needs at least name and model", file))
    elif not errors and not root.is_mapping:
        errors.append(root.error(f"expected a mapping of keys, got a {kind_of(root.value)}"))
    if errors:
        raise SpecError(errors)
    return root


def read_value(data: bytes | str, file: str | None) -> tuple[Node, list[ErrorDetail]]:
    """Any YAML value and its errors; the value means nothing when there are errors."""
    nothing = Node(None, Mark(file))
    if len(data) > MAX_BYTES:
        return nothing, [ErrorDetail("the file has more than 1 MB, the most an experiment file may have", file)]
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        column = error.start - (error.object.rfind(b"\n", 0, error.start) + 1) + 1
        byte = f"0x{error.object[error.start]:02x}"
        return nothing, [ErrorDetail(f"byte {byte} is not UTF-8; save the file as UTF-8", file, line, column)]
    if control := _CONTROL.search(text):
        line, start = text.count("\n", 0, control.start()) + 1, text.rfind("\n", 0, control.start())
        return nothing, [ErrorDetail(str(control_character(control.group())), file, line, control.start() - start)]
    reader = _Reader(file)
    try:
        return reader.read(text), reader.errors
    except _TooMuchError as error:
        return nothing, [*reader.errors, ErrorDetail(error.message, *error.mark)]
    except yaml.YAMLError as error:
        return nothing, [*reader.errors, _syntax_error(error, file)]


def control_character(text: str) -> str | None:
    """Return what is wrong where a text has a control character: no path takes it, and a terminal obeys it."""
    found = _CONTROL.search(text)
    return found and f"the control character U+{ord(found.group()):04X} cannot be part of an experiment file"


def kind_of(value: Any) -> str:
    """Return a word for the kind of a value: mapping, list, text, ..."""
    if isinstance(value, dict):
        return "mapping"
    if isinstance(value, list | tuple):
        return "list"
    if isinstance(value, bool):
        return "true or false"
    if value is None:
        return "null"
    return "number" if isinstance(value, int | float) else "text"


def _syntax_error(error: yaml.YAMLError, file: str | None) -> ErrorDetail:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    context = getattr(error, "context", None)
    message = "not valid YAML: " + (f"{problem} {context}" if context else problem)
    hint = None
    if "mapping values are not allowed" in problem:
        hint = "a `:` inside a text needs quotes; a key further in needs the right indentation"
    elif "cannot start any token" in problem:
        hint = "indent with blanks, not tabs, and quote texts that begin with @ ` or %"
    elif "end of stream" in problem or "',' or" in problem:
        hint = "a bracket or a quote is not closed"
    line, column = (mark.line + 1, mark.column + 1) if mark else (None, None)
    return ErrorDetail(message, file, line, column, hint=hint)


class _Reader:
    """Builds nodes from the parser's events with a stack of its own, so that no nesting can exhaust C's."""

    def __init__(self, file: str | None) -> None:
        self.file = file
        self.errors: list[ErrorDetail] = []
        self.open: list[_Open] = []
        self.anchors: dict[str, Node | None] = {}
        self.nodes = 0
        self.root: Node | None = None
        self.documents = 0

    def read(self, text: str) -> Node:
        """Return the root's node."""
        loader = _LOADER(text)
        while True:
            event = loader.get_event()
            if isinstance(event, yaml.StreamEndEvent):
                return self.root or Node(None, Mark(self.file, 1, 1))
            mark = Mark(self.file, event.start_mark.line + 1, event.start_mark.column + 1)
            if isinstance(event, yaml.ScalarEvent):
                self._scalar(event, mark)
            elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
                self._begin(event, mark)
            elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
                self._end()
            elif isinstance(event, yaml.AliasEvent):
                self._alias(str(event.anchor), mark)
            elif isinstance(event, yaml.DocumentStartEvent):
                self.documents += 1
                if self.documents > 1:
                    raise _TooMuchError("a second document begins here (`---`); one file holds one experiment", mark)

    def _count(self, size: int, mark: Mark) -> None:
        self.nodes += size
        if self.nodes > MAX_NODES:
            raise _TooMuchError(f"more than {MAX_NODES} values, aliases (`*name`) counted as often as used", mark)

    def _path(self, last: str | None = None) -> str:
        keys: Path = tuple(len(o.node.value) if o.node.is_list else o.key or "" for o in self.open)
        return dotted(keys if last is None else (*keys[:-1], last))

    def _begin(self, event: Any, mark: Mark) -> None:
        if len(self.open) >= MAX_DEPTH:
            raise _TooMuchError(f"nested deeper than {MAX_DEPTH} levels", mark)
        if self.open and self.open[-1].node.is_mapping and self.open[-1].key is None:
            raise _TooMuchError("a key must be text, not a mapping or a list", mark)
        self._count(1, mark)
        mapping = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in (None, "!", _TAG + ("map" if mapping else "seq")):
            self._tag_error(event.tag, mark)
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        self.open.append(_Open(Node({} if mapping else [], mark), event.anchor))

    def _end(self) -> None:
        done = self.open.pop()
        node = done.node
        for source in done.merges:
            for key, child in source.value.items():
                if key not in node.value:
                    node.value[key], node.keys[key] = child, source.keys[key]
        children = node.value.values() if node.is_mapping else node.value
        node.size = 1 + sum(child.size for child in children)
        if done.anchor is not None:
            self.anchors[done.anchor] = node
        self._add(node)

    def _alias(self, name: str, mark: Mark) -> None:
        if name not in self.anchors:
            raise _TooMuchError(f"the alias *{name} has no anchor &{name} before it", mark)
        node = self.anchors[name]
        if node is None:
            raise _TooMuchError(f"the alias *{name} stands inside its own anchor", mark)
        self._count(node.size, mark)
        if self.open and self.open[-1].node.is_mapping and self.open[-1].key is None:
            self._key(node, mark)
        else:
            self._add(node)

    def _scalar(self, event: Any, mark: Mark) -> None:
        self._count(1, mark)
        if problem := control_character(event.value):  # written as an escape, such as "\\0"
            self._add_error(ErrorDetail(problem, *mark, path=self._path()))
        plain = not event.style and event.tag is None
        node = Node(event.value, mark)
        if plain or (event.tag is not None and event.tag != "!"):
            node.value = self._resolve(event, mark)
            node.text = event.value or None
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        if self.open and self.open[-1].node.is_mapping and self.open[-1].key is None:
            self._key(node, mark, merge=plain and event.value == _MERGE)
        else:
            self._add(node)

    def _resolve(self, event: Any, mark: Mark) -> Any:
        text: str = event.value
        if event.tag is not None and event.tag != _TAG + "str":
            if event.tag not in {_TAG + name for name in ("int", "float", "bool", "null")}:
                self._tag_error(event.tag, mark)
                return text
        elif event.tag is not None:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if not text or len(text) > 400 or text[0] not in "+-.0123456789":
            return text
        if _INTEGER.fullmatch(text):
            return int(text.replace("_", ""))
        if _HEX.fullmatch(text):
            return int(text, 0)
        return float(text.replace("_", "")) if _FLOAT.fullmatch(text) else text

    def _tag_error(self, tag: str, mark: Mark) -> None:
        short = tag.replace(_TAG, "!!")
        message = f"the tag {short} is not allowed: an experiment file holds plain values only"
        self._add_error(ErrorDetail(message, *mark, path=self._path()))

    def _key(self, node: Node, mark: Mark, merge: bool = False) -> None:
        top = self.open[-1]
        if merge:
            top.key = _MERGE
            return
        if not isinstance(node.value, str):
            if node.is_mapping or node.is_list:
                raise _TooMuchError("a key must be text, not a mapping or a list", mark)
            message = f"the key {node.written()} is not text; write it in quotes"
            self._add_error(ErrorDetail(message, *mark, path=self._path(node.written())))
        key = node.value if isinstance(node.value, str) else node.written()
        if key in top.node.value:
            first = top.node.keys[key]
            message = f"the key `{key}` is written twice, first in line {first.line}; keep one of them"
            self._add_error(ErrorDetail(message, *mark, path=self._path(key)))
        top.key = key
        top.node.keys.setdefault(key, mark)

    def _add_error(self, error: ErrorDetail) -> None:
        self.errors.append(error)
        if len(self.errors) >= MAX_ERRORS:
            raise _TooMuchError(f"reading stops after {MAX_ERRORS} errors", Mark(error.file, error.line, error.column))

    def _add(self, node: Node) -> None:
        if not self.open:
            self.root = node
            return
        top = self.open[-1]
        if top.node.is_list:
            top.node.value.append(node)
            return
        assert top.key is not None
        if top.key == _MERGE and _MERGE not in top.node.keys:
            sources = node.value if node.is_list else [node]
            if not all(source.is_mapping for source in sources):
                raise _TooMuchError("`<<` takes a mapping (`<<: *name`) or a list of mappings", node.mark)
            top.merges.extend(sources)
        else:
            top.node.value[top.key] = node
        top.key = None

"""Errors of a validation placed in the tree: file, line, column, what is allowed, the nearest name, what the key is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator import registry
from orchestrator.errors import ErrorDetail, shorten
from orchestrator.spec.phase import PhaseSpec
from orchestrator.spec.yaml.key_hints import hint_for_key, hint_for_value
from orchestrator.spec.yaml.node import Mark, Node, Path, as_yaml, dotted
from orchestrator.spec.yaml.parser import kind_of, read_value
from orchestrator.spec.yaml.schema import (
    NAMED,
    UnknownPathError,
    component_class,
    description_at,
    find_path,
    kind_at,
    names_at,
)

_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?")
_SPACED = re.compile(r"[-+]?[0-9]{1,3}( [0-9]{3})+")
_DECIMAL_COMMA = re.compile(r"[-+]?[0-9]+,[0-9]{1,2}")
_PERCENT = re.compile(r"([-+]?[0-9]*\.?[0-9]+) ?%")
_FRACTION = re.compile(r"([0-9]+) ?/ ?([0-9]+)")
_POWER = re.compile(r"([0-9.]+) ?(?:\*|x|×) ?10 ?(?:\^|\*\*) ?([-+]?[0-9]+)")
_SUFFIX = {"k": 10**3, "K": 10**3, "m": 10**6, "M": 10**6, "b": 10**9, "B": 10**9}
_NULLS = ("none", "null", "nil", "~", "", "n/a", "undefined")
_TRUE = ("yes", "y", "on", "true", "t", "1", "enable", "enabled")
_FALSE = ("no", "n", "off", "false", "f", "0", "disable", "disabled")


def rewriting(node: Node, allowed: str, path: str) -> str | None:
    """Return how to write a value so that it is of the type that belongs there; None where that is not plain.

    Args:
        node: The value as it stands in the file.
        allowed: What may stand there, in the words of the messages: `a number or a mapping of keys`.
        path: Its dotted path, for an axis.
    """
    value = node.value
    if isinstance(value, str):
        return _of_text(value.strip(), node.text is None, allowed)
    if node.is_list and node.value and "list" not in allowed and not path.startswith(("matrix", "zip", "report")):
        if any(item.is_mapping or item.is_list for item in node.value):
            return None
        return f"several values are an axis of the grid: matrix: {{{path}: {node.written()}}}"
    quoted = f'put it in quotes: "{node.written()}"' if "text" in allowed else None
    if isinstance(value, bool):
        return quoted
    if isinstance(value, int | float):
        if "true or false" in allowed and value in (0, 1):
            return f"write {'true' if value else 'false'}"
        if isinstance(value, float) and value.is_integer() and "whole number" in allowed:
            return f"write {int(value)}"
        return f"write [{as_yaml(node.plain())}]" if "a list" in allowed else quoted
    return None


def _of_text(text: str, is_quoted: bool, allowed: str) -> str | None:
    low = text.lower()
    if "number" in allowed and (found := _number(text)) is not None:
        value, how = found
        if "a number" not in allowed:
            if not float(value).is_integer():
                return None  # a share or a rate where a count belongs: another key is meant
            value = int(value)
        written = text if not how else f"{value:.12g}" if isinstance(value, float) else str(value)
        return f"write {written} without quotes" if not how else f"write {written}, {how}"
    if "true or false" in allowed and low in (*_TRUE, *_FALSE):
        return f"write {'true' if low in _TRUE else 'false'}" + (
            " without quotes" if is_quoted and low in ("true", "false") else ""
        )
    if low in _NULLS and allowed:
        return "write null, or leave the key out: both take the default"
    if "a list" in allowed and text:
        return f"write [{shorten(text.strip('[]'))}]"
    return None


def _number(text: str) -> tuple[float | int, str] | None:
    """Return the number a text means, and what must change in how it is written; empty where only quotes must go."""
    text = text.replace("\N{MINUS SIGN}", "-")
    node, errors = read_value(text, None) if text and len(text) < 60 else (None, [None])
    value: Any = node.value if node is not None and not errors else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value, ""
    if _THOUSANDS.fullmatch(text) or _SPACED.fullmatch(text):
        plain = text.replace(",", "").replace(" ", "")
        return (float(plain) if "." in plain else int(plain)), "without separators"
    if _DECIMAL_COMMA.fullmatch(text):
        return float(text.replace(",", ".")), "with a decimal point"
    if match := _PERCENT.fullmatch(text):
        return float(f"{float(match[1]) / 100:.12g}"), "as a decimal"
    if (match := _FRACTION.fullmatch(text)) and int(match[2]):
        return int(match[1]) / int(match[2]), "as a decimal"
    if match := _POWER.fullmatch(text):
        return float(f"{match[1]}e{match[2]}"), "as a decimal"
    if text[-1:] in _SUFFIX and re.fullmatch(r"[0-9]+(\.[0-9]+)?", text[:-1]):
        found = float(text[:-1]) * _SUFFIX[text[-1]]
        return (int(found) if found.is_integer() else found), "in full"
    return None


_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "component_type": "a mapping with a `kind`",
    "tuple_type": "a list",
    "list_type": "a list",
}
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_UNKNOWN_KIND = "unknown kind `"
_OWN_KIND = "a kind of your own needs its file under plugins, where a list replaces an inherited one"
_NAME = "letters, digits, `.`, `_` and `-`, beginning with a letter or a digit, at most 64"


@dataclass(frozen=True)
class _Error:
    """One of Pydantic's errors at a path of the tree."""

    path: Path
    union: Path | None  # where one of several choices was tried, None where there was no choice
    type: str
    context: dict[str, Any]
    text: str
    key: bool = False


@dataclass(frozen=True)
class Finding:
    """An error before its position is known."""

    path: Path
    message: str
    allowed: str | None = None
    hint: str | None = None

    def inside(self, path: Path) -> Finding:
        """Return the same finding with its path below another one."""
        return replace(self, path=(*path, *self.path))


def explain(found: Sequence[Any], root: Node, prefix: Path = ()) -> list[ErrorDetail]:
    """Return the errors of a failed validation.

    Args:
        found: `ValidationError.errors()`; those inside components are unfolded.
        root: The tree that was validated, for positions.
        prefix: Path of the part that was validated.
    """
    strays = {section: keys for section in (*NAMED, "phases") if (keys := stray_keys(root, section))}
    flat = [error for raw in found for error in _flatten(raw, root, prefix, ())]
    errors = [
        _nameless(section, keys, root)
        for section, keys in strays.items()
        if any(error.path[:1] == (section,) for error in flat)
    ]
    unions = dict[Path, list[_Error]]()
    for error in flat:
        if error.path[:1] and error.path[1:2] and error.path[1] in strays.get(str(error.path[0]), ()):
            continue  # reported once for the section
        if error.type == "missing" and _misspelt(error.path, root) is not None:
            continue  # reported where the key is misspelt
        if error.union is None:
            errors.append(_detail([error], root))
        else:
            unions.setdefault(error.union, []).append(error)
    for where, group in unions.items():
        inside = [error for error in group if len(error.path) > len(where) or error.type.startswith("component_kind")]
        errors.extend(_detail([error], root) for error in inside)
        if not inside:
            errors.append(_detail(group, root))
    return list(dict.fromkeys(errors))


def locate(root: Node, path: Sequence[str | int], key: bool = False) -> tuple[Mark, str | None]:
    """Return the position and written value of a path; of the deepest part that was written where it has a default.

    Args:
        root: The tree.
        path: Where to look.
        key: Position of the key instead of the value.
    """
    node, mark = root, Mark(root.mark.file, 1, 1) if root.mark.line is not None else root.mark
    for index, step in enumerate(path):
        child = node.get(step)
        if child is None:
            return mark, None
        own = node.keys.get(step, child.mark) if isinstance(step, str) else child.mark
        inline = child.mark.line == own.line or not (child.is_mapping or child.is_list)
        # What is written in block style begins at its first key, which is not where the user looks for it.
        mark = child.mark if index == len(path) - 1 and not key and inline else own
        node = child
    return mark, node.written()


def error_at(
    root: Node, path: Path, message: str, allowed: str | None = None, hint: str | None = None, key: bool = False
) -> ErrorDetail:
    """Return an error at the value of a path (with `key` at its key), or at what holds it where it is a default."""
    mark, value = locate(root, path, key=key)
    return ErrorDetail(message, *mark, path=dotted(path), value=value, allowed=allowed, hint=hint)


def name_error(
    root: Node, path: Path, message: str, allowed: str | None = None, hint: str | None = None
) -> ErrorDetail:
    """Return an error of the key of a path, which is also what the error shows as the value."""
    return replace(error_at(root, path, message, allowed, hint, key=True), value=str(path[-1]))


def unknown_name(name: str, known: Sequence[str]) -> tuple[str | None, str | None]:
    """Return what is allowed instead of an unknown name, and the nearest as a hint."""
    return ", ".join(known) or "nothing is defined yet", registry.did_you_mean(name, known)


def unknown_key(name: str, known: Sequence[str], place: Path) -> tuple[str | None, str | None]:
    """Return what is allowed instead of an unknown key of the block at `place`, and what it may mean as a hint."""
    return unknown_name(name, known)[0], hint_for_key(name, known, dotted(place))


def unknown_path(error: UnknownPathError) -> tuple[str, str | None, str | None]:
    """Return a message, what is allowed and a hint for a dotted path that leads nowhere."""
    place = f" under {dotted(error.prefix)}" if error.prefix else ""
    return f"`{error.key}` is not known{place}", *unknown_key(error.key, error.known, error.prefix)


def check_path(
    root: Node, name: str, where: Path, errors: list[ErrorDetail], what: str = "not a key path"
) -> Path | None:
    """Return the path a dotted name stands for; where there is none, an error that begins with `what`, and None."""
    try:
        return find_path(root, name)
    except UnknownPathError as error:
        message, allowed, hint = unknown_path(error)
        errors.append(error_at(root, where, f"{what}: {message}", allowed, hint, key=isinstance(where[-1], str)))
        return None


def is_unknown_kind(error: ErrorDetail) -> bool:
    """Return whether an error says that no component of a kind is known, as when its plug-in could not be imported."""
    return error.message.startswith(_UNKNOWN_KIND)


def stray_keys(root: Node, section: str) -> tuple[str, ...]:
    """Return the keys that stand where names of entries belong, as in `evaluate: {kind: exact_match, data: test}`."""
    entries = root.entries(section)
    if section == "phases":
        return tuple(key for key in entries if key in PhaseSpec.model_fields or key in PhaseSpec.aliases)
    odd = [key for key, child in entries.items() if not _is_entry(child)]
    if not odd:
        return ()  # no component is imported where all is well
    family = NAMED[section]
    kinds = registry.kinds(family.registry_group)
    fields = {key for kind in kinds for key in component_class(family, kind).model_fields}
    return tuple(key for key in odd if key in fields)


def _is_entry(node: Node) -> bool:
    if node.is_list:
        return bool(node.value) and all(item.is_mapping and kind_at(item) is not None for item in node.value)
    return kind_at(node) is not None


def _nameless(section: str, keys: Sequence[str], root: Node) -> ErrorDetail:
    names = [key for key in root.entries(section) if key not in keys]
    name = names[0] if names else {"phases": "finetune"}.get(section, "NAME")
    what = "phases by name" if section == "phases" else "entries by name"
    listed = ", ".join(f"`{key}`" for key in keys)
    message = f"`{section}` holds {what}; the level with the name is missing above {listed}"
    hint = f"write {section}: {{{name}: {{{keys[0]}: ...}}}}" + (
        "" if names or section == "phases" else ", NAME of your choice"
    )
    return error_at(root, (section, keys[0]), message, ", ".join(names) or None, hint, key=True)


def _misspelt(path: Path, root: Node) -> str | None:
    """Return the unknown key beside a missing one that is likely to be it."""
    known = names_at(root, path[:-1])
    return registry.nearest(str(path[-1]), [name for name in root.entries(*path[:-1]) if name not in known])


def _flatten(raw: Any, root: Node, prefix: Path, location: tuple[Any, ...]) -> list[_Error]:
    location = (*location, *raw["loc"])
    if raw["type"] in ("component_kind", "component_kind_missing"):
        location = (*location, "kind")
    if raw["type"] == "component":
        return [error for inner in raw["ctx"]["errors"] for error in _flatten(inner, root, prefix, location)]
    node: Node | None = root.at(prefix)
    path, union, key = list(prefix), None, False
    for index, step in enumerate(location):
        child = node.get(step) if node is not None else None
        if child is not None:
            path.append(step)
            node = child
        elif step == "[key]":
            key = True
        elif (raw["type"] == "missing" and index == len(location) - 1) or (
            step == "kind" and index == len(location) - 1
        ):
            path.append(step)
        elif not (isinstance(step, int) and node is not None and not node.is_list):
            union = tuple(path) if union is None else union
    context = raw.get("ctx", {})
    return [_Error(tuple(path), union, raw["type"], context, raw["msg"], key)]


def _detail(group: list[_Error], root: Node) -> ErrorDetail:
    error = group[0]
    if error.type in ("missing", "component_kind_missing"):
        return _missing(error, root)
    if error.type == "extra_forbidden":
        return _unknown_key(error.path, root)
    mark, value = locate(root, error.path, key=error.key)
    node = root.at(error.path)
    message, allowed, hint = _words(group, node)
    if error.key:
        value = str(error.path[-1])
    about = None if error.key or error.type.startswith("component") else description_at(root, error.path)
    return ErrorDetail(message, *mark, path=dotted(error.path), value=value, allowed=allowed, hint=hint, about=about)


def _missing(error: _Error, root: Node) -> ErrorDetail:
    path = error.path
    mark, _ = locate(root, path[:-1], key=True)
    key = str(path[-1])
    near = _misspelt(path, root)
    hint = f"is `{near}` meant to be `{key}`?" if near else None
    allowed = ", ".join(error.context["known"]) if "known" in error.context else None
    about = description_at(root, path)
    return ErrorDetail(f"the key `{key}` is missing", *mark, path=dotted(path), allowed=allowed, hint=hint, about=about)


def _unknown_key(path: Path, root: Node) -> ErrorDetail:
    allowed, hint = unknown_key(str(path[-1]), names_at(root, path[:-1]), path[:-1])
    return error_at(root, path, f"unknown key `{path[-1]}`", allowed, hint, key=True)


def _words(group: list[_Error], node: Node | None) -> tuple[str, str | None, str | None]:
    allowed = " or ".join(dict.fromkeys(text for error in group if (text := _allowed(error))))
    pointed = [error for error in group if error.type not in _KINDS]
    error = pointed[0] if pointed else group[0]
    value = node.value if node is not None else None
    place = next(
        (str(key) for key in reversed(error.path[:-1] if error.key else error.path) if isinstance(key, str)), ""
    )
    if error.key and error.type == "literal_error":
        allowed, name = _allowed(error), str(error.path[-1])
        return f"unknown key `{name}`", allowed, hint_for_value(place, name, allowed.split(", "))
    if error.key:
        return "this name cannot be used", f"a name is made of {_NAME}", None
    rewritten = rewriting(node, allowed, dotted(error.path)) if node is not None else None
    if not pointed:
        kind = kind_of(value)
        given = kind if kind in ("text", "null", "true or false") else f"a {kind}"
        return f"expected {allowed}, got {given}", allowed, rewritten
    if error.type in _BOUNDS:
        return f"must be {_allowed(error)}", allowed, None
    if error.type == "literal_error":
        known = [name.strip("'") for name in error.context["expected"].replace(" or ", ", ").split(", ")]
        near = hint_for_value(place, value, known) if isinstance(value, str) else None
        return "not one of the values that are known here", allowed, near or rewritten
    if error.type == "component_kind":
        kind, choices = error.context["kind"], error.context["known"]
        near = hint_for_value("kind", kind, choices)
        return f"{_UNKNOWN_KIND}{kind}`", unknown_name(kind, choices)[0], near or _OWN_KIND
    # A mapping was read as one; that text could stand in its place does not help.
    return _sentence(error), None if node is not None and node.is_mapping else allowed or None, rewritten


_SENTENCES = {
    "finite_number": "the number must be finite",
    "string_pattern_mismatch": f"a name is made of {_NAME}",
    "union_tag_not_found": "the `kind` is missing or unknown",
    "union_tag_invalid": "the `kind` is missing or unknown",
}


def _sentence(error: _Error) -> str:
    if error.type == "value_error":
        return str(error.context["error"])
    if error.type == "too_short":
        least = error.context["min_length"]
        return f"at least {least} {'entry is' if least == 1 else 'entries are'} needed"
    return _SENTENCES.get(error.type, error.text)


def _allowed(error: _Error) -> str:
    if error.type in _KINDS:
        return _KINDS[error.type]
    if error.type in _BOUNDS:
        word, key = _BOUNDS[error.type]
        return f"{word} {error.context[key]:g}"
    if error.type == "literal_error":
        return str(error.context["expected"]).replace("'", "").replace(" or ", ", ")
    if error.type in ("union_tag_not_found", "union_tag_invalid"):
        return "staged_space, uniform, log_uniform, choice"
    return ""

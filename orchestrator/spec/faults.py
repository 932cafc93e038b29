"""Pydantic's errors told as faults: plain sentences with file, line, column, what is allowed and the nearest name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator import registry
from orchestrator.errors import Fault
from orchestrator.spec.node import Mark, Node, Path, dotted
from orchestrator.spec.shape import names_at
from orchestrator.spec.yaml_tree import kind_of

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


def explain(errors: Sequence[Any], root: Node, prefix: Path = ()) -> list[Fault]:
    """Faults of a failed validation.

    Args:
        errors: `ValidationError.errors()`; those inside components are unfolded.
        root: The tree that was validated, for positions.
        prefix: Path of the part that was validated.
    """
    flat = [error for raw in errors for error in _flatten(raw, root, prefix, ())]
    faults, unions = [], dict[Path, list[_Error]]()
    for error in flat:
        if error.union is None:
            faults.append(_fault([error], root))
        else:
            unions.setdefault(error.union, []).append(error)
    for where, group in unions.items():
        inside = [error for error in group if len(error.path) > len(where) or error.type.startswith("component_kind")]
        faults.extend(_fault([error], root) for error in inside)
        if not inside:
            faults.append(_fault(group, root))
    return sorted(dict.fromkeys(faults), key=lambda fault: (fault.file or "", fault.line or 0, fault.column or 0))


def locate(root: Node, path: Sequence[str | int], key: bool = False) -> tuple[Mark, str | None]:
    """Position and written value of a path; of the deepest part that was written where it has a default.

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


def fault_at(root: Node, path: Path, message: str, allowed: str | None = None, hint: str | None = None) -> Fault:
    """A fault at the value of a path, or at what holds it where the value is a default."""
    mark, value = locate(root, path)
    return Fault(message, *mark, path=dotted(path), value=value, allowed=allowed, hint=hint)


def unknown_name(name: str, known: Sequence[str]) -> tuple[str | None, str | None]:
    """What is allowed instead of an unknown name, and the nearest as a hint."""
    near = registry.nearest(name, tuple(known)) if known else None
    allowed = ", ".join(known) if known else "nothing is defined yet"
    return allowed, f"did you mean {near}?" if near else None


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


def _fault(group: list[_Error], root: Node) -> Fault:
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
    return Fault(message, *mark, path=dotted(error.path), value=value, allowed=allowed, hint=hint)


def _missing(error: _Error, root: Node) -> Fault:
    path = error.path
    mark, _ = locate(root, path[:-1], key=True)
    key = str(path[-1])
    parent = root.at(path[:-1])
    written = tuple(parent.value) if parent is not None and parent.is_mapping else ()
    known = names_at(root, path[:-1])
    near = registry.nearest(key, [name for name in written if name not in known])
    hint = f"is `{near}` meant to be `{key}`?" if near else None
    allowed = ", ".join(error.context["known"]) if "known" in error.context else None
    return Fault(f"the key `{key}` is missing", *mark, path=dotted(path), allowed=allowed, hint=hint)


def _unknown_key(path: Path, root: Node) -> Fault:
    mark, value = locate(root, path, key=True)
    allowed, hint = unknown_name(str(path[-1]), names_at(root, path[:-1]))
    return Fault(f"unknown key `{path[-1]}`", *mark, path=dotted(path), value=value, allowed=allowed, hint=hint)


def _words(group: list[_Error], node: Node | None) -> tuple[str, str | None, str | None]:
    allowed = " or ".join(dict.fromkeys(text for error in group if (text := _allowed(error))))
    pointed = [error for error in group if error.type not in _KINDS]
    error = pointed[0] if pointed else group[0]
    value = node.value if node is not None else None
    if error.key and error.type == "literal_error":
        allowed = _allowed(error)
        return f"unknown key `{error.path[-1]}`", allowed, unknown_name(str(error.path[-1]), allowed.split(", "))[1]
    if error.key:
        return "this name cannot be used", f"a name is made of {_NAME}", None
    if not pointed:
        return f"{_with_article(kind_of(value))} stands where {allowed} belongs", allowed, None
    if error.type in _BOUNDS:
        return f"must be {_allowed(error)}", allowed, None
    if error.type == "literal_error":
        known = [name.strip("'") for name in error.context["expected"].replace(" or ", ", ").split(", ")]
        near = registry.nearest(value, known) if isinstance(value, str) else None
        return "not one of the values that are known here", allowed, f"did you mean {near}?" if near else None
    if error.type == "component_kind":
        choices, hint = unknown_name(error.context["kind"], error.context["known"])
        return f"unknown kind `{error.context['kind']}`", choices, hint
    # A mapping was read as one; that text could stand in its place does not help.
    return _sentence(error), None if node is not None and node.is_mapping else allowed or None, None


def _with_article(kind: str) -> str:
    return kind if kind in ("text", "null", "true or false") else f"a {kind}"


def _sentence(error: _Error) -> str:
    if error.type == "value_error":
        return str(error.context["error"])
    if error.type == "too_short":
        least = error.context["min_length"]
        return f"at least {least} {'entry is' if least == 1 else 'entries are'} needed"
    if error.type == "finite_number":
        return "the number must be finite"
    if error.type == "string_pattern_mismatch":
        return f"a name is made of {_NAME}"
    if error.type in ("union_tag_not_found", "union_tag_invalid"):
        return "the `kind` is missing or unknown"
    return error.text


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

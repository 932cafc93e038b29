"""`search.promote`: the best trials can be run again, with something that is not as it was in the search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.errors import ErrorDetail
from orchestrator.spec.grid import SECTIONS
from orchestrator.spec.yaml.node import Node
from orchestrator.spec.yaml.schema import UnknownPathError, find_path
from orchestrator.spec.yaml.validation_errors import check_path, error_at

_PATH = ("search", "promote")


def check_promote(root: Node) -> Iterator[ErrorDetail]:
    """Check that something changes, that seeds differ, that there is one baseline, that nothing drawn is set."""
    node = root.at(_PATH)
    if node is None or not node.is_mapping:
        return
    changes, seeds = root.entries(*_PATH, "set"), node.get("seeds")
    if not changes and seeds is None:
        hint = "give seeds, or what to set"
        yield error_at(root, _PATH, "the best trials would be run again as they were", hint=hint)
    given = seeds.plain() if seeds is not None and seeds.is_list else []
    if len({repr(seed) for seed in given}) < len(given):
        yield error_at(root, (*_PATH, "seeds"), "a seed stands there twice; it would count as one", "different numbers")
    if node.get("baseline") is not None and root.at(("report", "baseline")) is not None:
        message = "promoted trials have a baseline of their own"
        yield error_at(root, ("report", "baseline"), message, hint="take it or search.promote.baseline out")
    drawn = {name: path for name in root.entries("search", "space") if (path := _found(root, name)) is not None}
    for name in changes:
        where, errors = (*_PATH, "set", name), list[ErrorDetail]()
        path = check_path(root, name, where, errors)
        yield from errors
        if path is None:
            continue
        if path[0] == "seed":
            yield error_at(root, where, "seeds are not set", hint="give them as search.promote.seeds", key=True)
        elif path[0] not in SECTIONS:
            message = f"`{name}` cannot be set for a trial: it is no part of a cell"
            yield error_at(root, where, message, "paths under " + ", ".join(SECTIONS), key=True)
        for other in (other for other, at in drawn.items() if _is_within(path, at) or _is_within(at, path)):
            message = f"`{other}` is searched: a trial would not be run again with what it drew"
            yield error_at(root, where, message, hint="take one of them out", key=True)


def _found(root: Node, name: str) -> Sequence[object] | None:
    try:
        return find_path(root, name)
    except UnknownPathError:  # reported where it stands
        return None


def _is_within(path: Sequence[object], other: Sequence[object]) -> bool:
    return tuple(path[: len(other)]) == tuple(other)

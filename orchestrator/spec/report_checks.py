"""`report:` against the grid: a baseline that some cell has, and axes that exist."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.errors import Fault
from orchestrator.spec.axes import Assignment, Axes, value_key
from orchestrator.spec.faults import locate, unknown_key
from orchestrator.spec.node import Node, Path, dotted
from orchestrator.spec.shape import UnknownPathError, find_path


def check_report(root: Node, axes: Axes, cells: Sequence[Assignment]) -> list[Fault]:
    """Return the baseline and `mean_over` name axes of the grid, and some cell is the baseline."""
    faults: list[Fault] = []
    report = root.get("report")
    baseline = report.get("baseline") if report is not None else None
    wanted: dict[str, str] = {}
    if baseline is not None and baseline.is_mapping:
        for name, node in baseline.value.items():
            path = check_path(root, name, ("report", "baseline", name), faults)
            if path is not None:
                wanted[dotted(path)] = value_key(node)
        if not faults and cells and not any(_matches(root, cell, wanted) for cell in cells):
            allowed = "; ".join(
                f"{axis}: {', '.join(setting.node.written() for setting in settings)}"
                for axis, settings in axes.values.items()
            )
            message = "no cell of the grid is the baseline"
            faults.append(_fault(root, ("report", "baseline"), message, allowed or "the grid has no axes"))
    over = report.get("mean_over") if report is not None else None
    for index, node in enumerate(over.value if over is not None and over.is_list else []):
        if isinstance(node.value, str):
            check_path(root, node.value, ("report", "mean_over", index), faults)
    return faults


def _matches(root: Node, cell: Assignment, wanted: dict[str, str]) -> bool:
    own = {setting.axis: setting.key for setting in cell}
    for axis, key in wanted.items():
        if axis not in own:
            node = root.at(find_path(root, axis))
            own[axis] = value_key(node) if node is not None else "null"
        if own[axis] != key:
            return False
    return True


def check_path(root: Node, name: str, where: Path, faults: list[Fault]) -> Path | None:
    """Return the path a dotted name stands for; a fault at `where` and None where there is no such path."""
    try:
        return find_path(root, name)
    except UnknownPathError as error:
        allowed, hint = unknown_key(error.key, error.known, error.prefix)
        place = f" under {dotted(error.prefix)}" if error.prefix else ""
        message = f"a key path belongs here: `{error.key}` is not known{place}"
        faults.append(_fault(root, where, message, allowed, hint, key=isinstance(where[-1], str)))
        return None


def _fault(
    root: Node, path: Path, message: str, allowed: str | None, hint: str | None = None, key: bool = False
) -> Fault:
    mark, value = locate(root, path, key=key)
    return Fault(message, *mark, path=dotted(path), value=value, allowed=allowed, hint=hint)

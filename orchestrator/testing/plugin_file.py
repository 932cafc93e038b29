"""`llavolta check FILE`: the contract kits on every component that a plug-in file defines."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import registry
from orchestrator.errors import UsageError
from orchestrator.testing.contract import ContractError, refuse_unfinished

# By the sort's entry-point group, found by name: the kits of compressors and evaluations need torch.
_KITS = {
    registry.COMPRESSORS: "orchestrator.compression.testing:check_compressor",
    registry.SCHEDULES: "orchestrator.testing.schedule:check_schedule",
    registry.DATA: "orchestrator.testing.data:check_data",
    registry.EVALUATIONS: "orchestrator.testing.evaluation:check_evaluation",
}


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
    file: Path, values: Mapping[str, Mapping[str, Any]], families: Collection[str] | None = None
) -> Iterable[Checked]:
    """Yield the result of every component that a plug-in file defines, in the file's order.

    Args:
        file: The plug-in.
        values: By kind, values of fields; those a kit cannot guess are required.
        families: Model families on which compressors are checked; by default all.

    Raises:
        UsageError: the file is no plug-in, values are given for a kind that it does not define, or a family is unknown.
    """
    had_torch = "torch" in sys.modules
    classes = registry.load_plugin(str(file), Path.cwd())
    loads_torch = "torch" in sys.modules and not had_torch
    kinds = [cls.kind_name() for cls in classes]
    if unknown := sorted(set(values) - set(kinds)):
        raise UsageError(f"check: {file} defines no {', '.join(unknown)}; it defines {', '.join(kinds)}")
    if families is not None:
        known = importlib.import_module("orchestrator.compression.testing.families").TINY
        if wrong := sorted(set(families) - set(known)):
            raise UsageError(f"check: no family {', '.join(wrong)}; known: {', '.join(known)}")
    return (_checked(cls, values.get(cls.kind_name(), {}), families, loads_torch) for cls in classes)


def _checked(cls: type[Any], values: Mapping[str, Any], families: Collection[str] | None, loads_torch: bool) -> Checked:
    sort = next(name for name, group in registry.SORTS.items() if group == cls.registry_group)
    kind, broken, report = cls.kind_name(), [], ()
    if loads_torch:
        broken.append("importing the file loads torch, which `validate` does not; import it inside the implementation")
    try:
        refuse_unfinished(cls, "check")
        module, _, name = _KITS[cls.registry_group].partition(":")
        kit: Callable[..., Any] = getattr(importlib.import_module(module), name)
        options = {"families": families} if cls.registry_group == registry.COMPRESSORS else {}
        report = kit({"kind": kind, **values}, **options).lines
    except ContractError as error:
        broken += error.broken
    except (AssertionError, UsageError) as error:
        broken.append(str(error))
    return Checked(kind, sort, tuple(broken), report)

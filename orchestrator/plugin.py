"""Everything a plug-in's author imports: spec classes, what implementations get and return, and the contract kits.

    from orchestrator import plugin

    class MySpec(plugin.CompressorSpec): ...

A plug-in's module is imported wherever a spec is read, so importing this one loads no torch: names that need it are
imported when they are first used (PEP 562), which is when an implementation runs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from orchestrator.data.rows import (
    IMAGE_MARK,
    DataSet,
    ImageReading,
    ImageRef,
    Row,
    Turn,
    evenly_spread,
    file_exists,
    raise_for_errors,
)
from orchestrator.errors import DataError, UsageError
from orchestrator.plan.identity import content_digest
from orchestrator.spec.base import (
    Count,
    Flag,
    Integer,
    NonNegative,
    Positive,
    Share,
    Spec,
    Whole,
    parse_share,
)
from orchestrator.spec.components import (
    BlockCompressorSpec,
    CompressorSpec,
    DataSpec,
    DistillSpec,
    EvaluationSpec,
    Grid,
    ScheduleSpec,
    StageTable,
    Teaching,
    amount_to_keep,
    block_to_keep,
    merge_actions,
    teachers_of,
)

if TYPE_CHECKING:
    from orchestrator.compression.ops import (
        TOLERANCE,
        Windows,
        along_both_axes,
        argmax,
        argmin,
        at_least_float32,
        cosines,
        distances,
        full_precision,
        is_top,
        merge,
        places_of,
        ranked,
        sum_members,
        tokens_at,
        top_tokens,
        window_bounds,
        windows_over,
    )
    from orchestrator.compression.protocol import (
        Compressor,
        Context,
        Enters,
        Kept,
        Learns,
        Resizes,
        evenly_spaced,
        take,
        take_windows,
    )
    from orchestrator.compression.testing import check_compressor
    from orchestrator.data.records.row_index import num_words
    from orchestrator.evaluation.generate import greedy_answers
    from orchestrator.evaluation.protocol import Evaluation, EvaluationData, Outcome, Workers, prediction
    from orchestrator.testing.contract import check_data, check_schedule
    from orchestrator.testing.evaluation import check_evaluation

_LOADED_WHEN_USED = {
    "orchestrator.compression.ops": (
        "TOLERANCE Windows along_both_axes argmax argmin at_least_float32 cosines distances full_precision is_top "
        "merge places_of ranked sum_members tokens_at top_tokens window_bounds windows_over"
    ),
    "orchestrator.compression.protocol": (
        "Compressor Context Enters Kept Learns Resizes evenly_spaced take take_windows"
    ),
    "orchestrator.compression.testing": "check_compressor",
    "orchestrator.data.records.row_index": "IndexedRows RowIndex num_words row_index",
    "orchestrator.evaluation.generate": "greedy_answers",
    "orchestrator.evaluation.protocol": "Evaluation EvaluationData Outcome Workers prediction",
    "orchestrator.testing.evaluation": "check_evaluation",
    "orchestrator.testing.contract": "check_data check_schedule",
}
_MODULE_OF = {name: module for module, names in _LOADED_WHEN_USED.items() for name in names.split()}

__all__ = [
    "IMAGE_MARK",
    "TOLERANCE",
    "BlockCompressorSpec",
    "Compressor",
    "CompressorSpec",
    "Context",
    "Count",
    "DataError",
    "DataSet",
    "DataSpec",
    "DistillSpec",
    "Enters",
    "Evaluation",
    "EvaluationData",
    "EvaluationSpec",
    "Flag",
    "Grid",
    "ImageReading",
    "ImageRef",
    "Integer",
    "Kept",
    "Learns",
    "NonNegative",
    "Outcome",
    "Positive",
    "Resizes",
    "Row",
    "ScheduleSpec",
    "Share",
    "Spec",
    "StageTable",
    "Teaching",
    "Turn",
    "UsageError",
    "Whole",
    "Windows",
    "Workers",
    "along_both_axes",
    "amount_to_keep",
    "argmax",
    "argmin",
    "at_least_float32",
    "block_to_keep",
    "check_compressor",
    "check_data",
    "check_evaluation",
    "check_schedule",
    "content_digest",
    "cosines",
    "distances",
    "evenly_spaced",
    "evenly_spread",
    "file_exists",
    "full_precision",
    "greedy_answers",
    "is_top",
    "merge",
    "merge_actions",
    "num_words",
    "parse_share",
    "places_of",
    "prediction",
    "raise_for_errors",
    "ranked",
    "sum_members",
    "take",
    "take_windows",
    "teachers_of",
    "tokens_at",
    "top_tokens",
    "window_bounds",
    "windows_over",
]


def __getattr__(name: str) -> Any:
    """Return a name that needs torch; its module is imported now.

    Raises:
        AttributeError: there is no such name.
    """
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; dir() of it lists what it has")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

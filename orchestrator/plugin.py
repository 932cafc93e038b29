"""Everything a plug-in's author imports: spec classes, what implementations get and return, and the contract kits.

    from orchestrator import plugin

    class MySpec(plugin.CompressorSpec): ...

A plug-in's module is imported wherever a spec is read, so importing this one loads no torch: every name is imported
when it is first used (PEP 562), one that needs torch therefore when an implementation runs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.compression.ops import TOLERANCE as TOLERANCE
    from orchestrator.compression.ops import Windows as Windows
    from orchestrator.compression.ops import along_both_axes as along_both_axes
    from orchestrator.compression.ops import argmax as argmax
    from orchestrator.compression.ops import argmin as argmin
    from orchestrator.compression.ops import at_least_float32 as at_least_float32
    from orchestrator.compression.ops import cosines as cosines
    from orchestrator.compression.ops import distances as distances
    from orchestrator.compression.ops import full_precision as full_precision
    from orchestrator.compression.ops import is_top as is_top
    from orchestrator.compression.ops import merge as merge
    from orchestrator.compression.ops import places_of as places_of
    from orchestrator.compression.ops import ranked as ranked
    from orchestrator.compression.ops import sum_members as sum_members
    from orchestrator.compression.ops import tokens_at as tokens_at
    from orchestrator.compression.ops import top_tokens as top_tokens
    from orchestrator.compression.ops import window_bounds as window_bounds
    from orchestrator.compression.ops import windows_over as windows_over
    from orchestrator.compression.protocol import Compressor as Compressor
    from orchestrator.compression.protocol import Context as Context
    from orchestrator.compression.protocol import Enters as Enters
    from orchestrator.compression.protocol import Kept as Kept
    from orchestrator.compression.protocol import Learns as Learns
    from orchestrator.compression.protocol import Resizes as Resizes
    from orchestrator.compression.protocol import evenly_spaced as evenly_spaced
    from orchestrator.compression.protocol import take as take
    from orchestrator.compression.protocol import take_windows as take_windows
    from orchestrator.compression.testing import check_compressor as check_compressor
    from orchestrator.data.records.row_index import num_words as num_words
    from orchestrator.data.rows import IMAGE_MARK as IMAGE_MARK
    from orchestrator.data.rows import VIDEO_MARK as VIDEO_MARK
    from orchestrator.data.rows import DataSet as DataSet
    from orchestrator.data.rows import ImageReading as ImageReading
    from orchestrator.data.rows import ImageRef as ImageRef
    from orchestrator.data.rows import Row as Row
    from orchestrator.data.rows import Turn as Turn
    from orchestrator.data.rows import evenly_spread as evenly_spread
    from orchestrator.data.rows import file_exists as file_exists
    from orchestrator.data.rows import raise_for_errors as raise_for_errors
    from orchestrator.errors import DataError as DataError
    from orchestrator.errors import StageRunError as StageRunError
    from orchestrator.errors import UsageError as UsageError
    from orchestrator.evaluation.evaluate import AnswerLoss as AnswerLoss
    from orchestrator.evaluation.evaluate import PromptBatch as PromptBatch
    from orchestrator.evaluation.evaluate import answer_losses as answer_losses
    from orchestrator.evaluation.evaluate import generate as generate
    from orchestrator.evaluation.evaluate import greedy_answers as greedy_answers
    from orchestrator.evaluation.evaluate import prompt_batch as prompt_batch
    from orchestrator.evaluation.protocol import Evaluation as Evaluation
    from orchestrator.evaluation.protocol import EvaluationData as EvaluationData
    from orchestrator.evaluation.protocol import Outcome as Outcome
    from orchestrator.evaluation.protocol import Workers as Workers
    from orchestrator.evaluation.protocol import last_answer as last_answer
    from orchestrator.evaluation.protocol import mean_scores as mean_scores
    from orchestrator.evaluation.protocol import outcome_of as outcome_of
    from orchestrator.evaluation.protocol import pictures_of as pictures_of
    from orchestrator.evaluation.protocol import prediction as prediction
    from orchestrator.evaluation.protocol import text_column as text_column
    from orchestrator.machine import Load as Load
    from orchestrator.machine import device_name as device_name
    from orchestrator.machine import peak_bytes as peak_bytes
    from orchestrator.plan.cell_record import CellRecord as CellRecord
    from orchestrator.plan.identity import content_digest as content_digest
    from orchestrator.spec.base import Count as Count
    from orchestrator.spec.base import Flag as Flag
    from orchestrator.spec.base import Integer as Integer
    from orchestrator.spec.base import NonNegative as NonNegative
    from orchestrator.spec.base import Positive as Positive
    from orchestrator.spec.base import Share as Share
    from orchestrator.spec.base import Spec as Spec
    from orchestrator.spec.base import Whole as Whole
    from orchestrator.spec.base import parse_share as parse_share
    from orchestrator.spec.components import BlockCompressorSpec as BlockCompressorSpec
    from orchestrator.spec.components import CompressorSpec as CompressorSpec
    from orchestrator.spec.components import DataSpec as DataSpec
    from orchestrator.spec.components import DistillSpec as DistillSpec
    from orchestrator.spec.components import EvaluationSpec as EvaluationSpec
    from orchestrator.spec.components import GenerationSpec as GenerationSpec
    from orchestrator.spec.components import Grid as Grid
    from orchestrator.spec.components import ScheduleSpec as ScheduleSpec
    from orchestrator.spec.components import StageTable as StageTable
    from orchestrator.spec.components import Students as Students
    from orchestrator.spec.components import Teaching as Teaching
    from orchestrator.spec.components import amount_to_keep as amount_to_keep
    from orchestrator.spec.components import block_to_keep as block_to_keep
    from orchestrator.spec.components import merge_actions as merge_actions
    from orchestrator.spec.components import teachers_of as teachers_of
    from orchestrator.testing.contract import check_data as check_data
    from orchestrator.testing.contract import check_schedule as check_schedule
    from orchestrator.testing.evaluation import check_evaluation as check_evaluation
    from orchestrator.tracking.protocol import Tracker as Tracker

_NAMES = {
    "orchestrator.compression.ops": (
        "TOLERANCE Windows along_both_axes argmax argmin at_least_float32 cosines distances full_precision is_top "
        "merge places_of ranked sum_members tokens_at top_tokens window_bounds windows_over"
    ),
    "orchestrator.compression.protocol": (
        "Compressor Context Enters Kept Learns Resizes evenly_spaced take take_windows"
    ),
    "orchestrator.compression.testing": "check_compressor",
    "orchestrator.data.records.row_index": "num_words",
    "orchestrator.data.rows": (
        "IMAGE_MARK VIDEO_MARK DataSet ImageReading ImageRef Row Turn evenly_spread file_exists raise_for_errors"
    ),
    "orchestrator.errors": "DataError StageRunError UsageError",
    "orchestrator.evaluation.evaluate": "AnswerLoss PromptBatch answer_losses generate greedy_answers prompt_batch",
    "orchestrator.evaluation.protocol": (
        "Evaluation EvaluationData Outcome Workers last_answer mean_scores outcome_of pictures_of prediction "
        "text_column"
    ),
    "orchestrator.machine": "Load device_name peak_bytes",
    "orchestrator.plan.cell_record": "CellRecord",
    "orchestrator.plan.identity": "content_digest",
    "orchestrator.spec.base": "Count Flag Integer NonNegative Positive Share Spec Whole parse_share",
    "orchestrator.spec.components": (
        "BlockCompressorSpec CompressorSpec DataSpec DistillSpec EvaluationSpec GenerationSpec Grid ScheduleSpec "
        "StageTable Students Teaching amount_to_keep block_to_keep merge_actions teachers_of"
    ),
    "orchestrator.testing.contract": "check_data check_schedule",
    "orchestrator.testing.evaluation": "check_evaluation",
    "orchestrator.tracking.protocol": "Tracker",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)
# Used by what comes with the package, and not promised to others.
_MODULE_OF |= dict.fromkeys(("IndexedRows", "RowIndex", "row_index"), "orchestrator.data.records.row_index") | {
    "Encoder": "orchestrator.data.processing.encode",
    "VisionTextProcessor": "orchestrator.data.processing.processor",
    "load_exported": "orchestrator.models.export",
    "Point": "orchestrator.plan.step_history",
    "nearest": "orchestrator.registry",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used.

    Raises:
        AttributeError: there is no such name.
    """
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; dir() of it lists what it has")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

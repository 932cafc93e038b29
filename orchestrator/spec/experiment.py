"""ExperimentSpec: the root of one experiment file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from orchestrator.spec.base import Integer, Name, Spec
from orchestrator.spec.components import Data, Evaluation, Points, Schedule
from orchestrator.spec.infrastructure import ClusterSpec, ReportSpec, TrackingSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.phase import PhasesSpec
from orchestrator.spec.search import SearchSpec


def _as_points(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


Variant = Annotated[Points, BeforeValidator(_as_points), Field(min_length=1)]
Axis = Annotated[tuple[Any, ...], Field(min_length=1)]


class ExperimentSpec(Spec):
    """One experiment file; the reference in docs/ explains every key."""

    schema_version: Literal[1] = 1
    """Version of this format."""
    name: Name = Field(examples=["easy-vqa-schedules"])
    """Name of the experiment, and of its MLflow experiment unless `tracking.experiment_name` is given."""
    description: str = ""
    """What the experiment is for, in a sentence; shown in reports."""
    plugins: tuple[str, ...] = Field(default=(), examples=[["plugins/my_method.py"]])
    """Plug-ins to import: Python files, relative to the file that writes them, or installed modules."""
    seed: Integer = 0
    """Seed of everything random: initial weights, data order, dropout, random methods."""
    model: ModelSpec
    """Vision-language model that is trained."""
    data: dict[Name, Data] = Field(default_factory=dict, examples=[{"train": {"kind": "easy_vqa", "split": "train"}}])
    """Named data sets, for phases to train on and evaluations to test on."""
    compressors: dict[Name, Variant] = Field(
        default_factory=dict, examples=[{"heavy": {"kind": "average_pool", "layer": 2, "stride": 8}}]
    )
    """Named variants: a compressor with its parameters, or a list of several points along the depth. `full` and
    `final` are reserved names.
    """
    schedules: dict[Name, Schedule] = Field(
        default_factory=dict,
        examples=[{"two_stage": {"kind": "stages", "stages": [{"share": "1/2", "compressor": "heavy"}, {}]}}],
    )
    """Named schedules: how a phase is divided into stages, each under one variant."""
    phases: PhasesSpec = PhasesSpec()
    """Training phases, `pretrain` before `finetune`; `{}` evaluates the model as it comes."""
    evaluate: dict[Name, Evaluation] = Field(
        default_factory=dict, examples=[{"vqa": {"kind": "exact_match", "data": "test", "under": ["final", "full"]}}]
    )
    """Named evaluations of finished cells. A new one runs alone; nothing is trained again for it."""
    matrix: dict[str, Axis] = Field(
        default_factory=dict, examples=[{"phases.finetune.schedule": ["full", "four_stage"], "seed": [0, 1]}]
    )
    """Axes of the grid: a dotted path of the file to the list of its values. Every combination is a cell."""
    zip: tuple[dict[str, Axis], ...] = Field(
        default=(),
        examples=[[{"phases.finetune.learning_rate": [1e-3, 2e-3], "phases.finetune.max_steps": [400, 200]}]],
    )
    """Groups of axes that move together: the first values make one choice, the second ones another, and so on."""
    exclude: tuple[dict[str, Any], ...] = Field(
        default=(), examples=[[{"phases.finetune.schedule": "full", "seed": 1}]]
    )
    """Cells left out: those that have all values of one of the mappings, axis to value."""
    include: tuple[dict[str, Any], ...] = Field(
        default=(), examples=[[{"phases.finetune.schedule": "four_stage", "seed": 2}]]
    )
    """Cells added to the grid as they are: axis to value."""
    cell_name: str | None = Field(default=None, examples=["{schedule}-{seed}"])
    """Template of the cells' names, with axes in braces; null joins short names of the axes and their values."""
    controls: tuple[str, ...] = Field(default=(), examples=[["random_drop", "stride"]])
    """Plain methods that run beside every cell that compresses, at the same budget of visual tokens."""
    cluster: ClusterSpec = ClusterSpec()
    """Machine or cluster; it changes no result."""
    tracking: TrackingSpec = TrackingSpec()
    """Where results are recorded; it changes no result."""
    report: ReportSpec = ReportSpec()
    """Comparisons in the table of results."""
    search: SearchSpec | None = None
    """A search of schedules, for `llavolta search`; null runs the grid alone."""

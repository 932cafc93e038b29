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
    """One experiment file; the reference in docs/ explains every key.

    `compressors` maps a variant's name to its points along the depth (one or several).
    """

    schema_version: Literal[1] = 1
    name: Name
    description: str = ""
    plugins: tuple[str, ...] = ()
    seed: Integer = 0
    model: ModelSpec
    data: dict[Name, Data] = Field(default_factory=dict)
    compressors: dict[Name, Variant] = Field(default_factory=dict)
    schedules: dict[Name, Schedule] = Field(default_factory=dict)
    phases: PhasesSpec = PhasesSpec()
    evaluate: dict[Name, Evaluation] = Field(default_factory=dict)
    matrix: dict[str, Axis] = Field(default_factory=dict)
    zip: tuple[dict[str, Axis], ...] = ()
    exclude: tuple[dict[str, Any], ...] = ()
    include: tuple[dict[str, Any], ...] = ()
    cell_name: str | None = None
    controls: tuple[str, ...] = ()
    cluster: ClusterSpec = ClusterSpec()
    tracking: TrackingSpec = TrackingSpec()
    report: ReportSpec = ReportSpec()
    search: SearchSpec | None = None

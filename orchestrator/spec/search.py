"""`search:`, what a schedule search may propose and what it optimises (validated now; run by the search verb)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from orchestrator.spec.base import Count, Flag, Positive, Share, Spec


class AlgorithmSpec(Spec):
    """Search algorithm."""

    kind: Literal["optuna", "random", "grid"] = "optuna"
    sampler: Literal["tpe", "nsga2", "random"] | None = None
    population_size: Count | None = None


class SchedulerSpec(Spec):
    """Early stopping of trials; one objective only."""

    kind: Literal["asha"] = "asha"
    rungs: tuple[Share, ...]
    under: str = "full"


class BudgetSpec(Spec):
    """The search stops before the trial that would exceed it."""

    train_tflops: Positive | None = None
    trials: Count | None = None
    gpu_hours: Positive | None = None


class StagedSpaceSpec(Spec):
    """Proposes staged schedules."""

    kind: Literal["staged_space"]
    num_stages: tuple[Count, ...]
    variants: tuple[str, ...]
    heavy_to_light: Flag = True
    last: str | None = None
    boundaries: Share = Field(default="1/8", validate_default=True)


class UniformSpec(Spec):
    """A number between two bounds, drawn uniformly or log-uniformly."""

    kind: Literal["uniform", "log_uniform"]
    low: Positive
    high: Positive


class ChoiceSpec(Spec):
    """One of a list of values."""

    kind: Literal["choice"]
    values: tuple[str | int | float | bool, ...] = Field(min_length=1)


def _space_tag(value: object) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "uniform" if kind == "log_uniform" else kind if isinstance(kind, str) else None


SpaceEntry = Annotated[
    Annotated[StagedSpaceSpec, Tag("staged_space")]
    | Annotated[UniformSpec, Tag("uniform")]
    | Annotated[ChoiceSpec, Tag("choice")],
    Discriminator(_space_tag),
]


class SearchSpec(Spec):
    """A schedule search (docs/concepts/search.md)."""

    aliases: ClassVar[dict[str, str]] = {"num_samples": "num_trials", "n_trials": "num_trials"}

    objectives: dict[str, Literal["max", "min"]] = Field(min_length=1)
    algorithm: AlgorithmSpec = AlgorithmSpec()
    scheduler: SchedulerSpec | None = None
    num_trials: Count = 24
    budget: BudgetSpec | None = None
    constraints: dict[str, str] = Field(default_factory=dict)
    space: dict[str, SpaceEntry] = Field(min_length=1)

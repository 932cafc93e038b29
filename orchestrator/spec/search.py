"""`search:`, what a schedule search may propose, and what it optimises."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, JsonValue, Tag

from orchestrator.spec.base import Count, Flag, Integer, Positive, Share, Spec, Whole
from orchestrator.spec.constraint import ConstraintText

Plain = str | int | float | bool
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class AlgorithmSpec(Spec):
    """How trials are proposed."""

    added_later: ClassVar[frozenset[str]] = frozenset({"prefer_shared", "seed"})

    kind: Literal["optuna", "random", "grid"] = "optuna"
    """Proposer: Optuna's samplers, independent random draws, or `grid`, every recipe of the space once, in an order
    drawn by the seed."""
    sampler: Literal["tpe", "nsga2", "random"] | None = None
    """Optuna's sampler; null takes `tpe`, the tree-structured Parzen estimator. `nsga2`, a genetic algorithm, needs
    many trials, and draws at random what not every trial has."""
    population_size: Annotated[int, Field(strict=True, ge=2)] | None = None
    """Trials of one generation of `nsga2`, the first of which is random; null takes Optuna's default, 50."""
    prefer_shared: Flag = False
    """Draws eight recipes for each trial and takes the one that adds the least training to that of the trials before it
    (docs/concepts/search.md)."""
    seed: Whole | None = None
    """Seed of what is drawn; null takes the file's `seed`. With another one it is another search, of the same training:
    what searches have in common is trained once."""

    @property
    def is_nsga2(self) -> bool:
        """Whether trials come in generations."""
        return self.kind == "optuna" and self.sampler == "nsga2"


class SchedulerSpec(Spec):
    """Early stopping of trials; for a single objective, which an evaluation measures."""

    kind: Literal["asha"] = "asha"
    """Method: asynchronous successive halving (Li et al. 2020). A trial is compared with those that were at the rung
    before it and waits for none, so the first ones go on."""
    rungs: tuple[Share, ...] = Field(min_length=1, examples=[["1/4", "1/2"]])
    """Shares of a trial's optimizer steps, those of all its phases, after which the worse trials stop; rising."""
    under: str = "full"
    """Variant under which trials are compared at a rung; `final` is each one's own last variant."""
    reduction_factor: Annotated[int, Field(strict=True, ge=2)] = 2
    """Of so many trials that were at a rung the best one goes on; of fewer too. Equal ones go on together."""


class BudgetSpec(Spec):
    """Limits of a search: it stops before the trial that would exceed one of them, and goes on once they are raised."""

    train_tflops: Positive | None = None
    """Most training operations that all trials together add, in 10^12 by the cost formula; null sets no limit. A trial
    adds the stage runs that were neither stored nor planned when it was proposed, each counted once: what it shares
    with earlier trials or with a grid costs nothing, attempts after a failure are not counted again. What constraints
    compare with counts as if trained alone."""
    trials: Count | None = None
    """Most trials, if that is fewer than `num_trials`; null sets no limit."""
    gpu_hours: Positive | None = None
    """Most hours of training of all workers' devices together that trials add, those still to come estimated by the
    speed measured so far (until it is known one trial runs alone); null sets no limit. Evaluations are not counted."""


class PromoteSpec(Spec):
    """The best trials again, once all have ended: with more seeds, or as the file would have it without the search."""

    top: Count = 5
    """Most trials: of the front, by the first objective; with one objective the best."""
    seeds: Annotated[tuple[Whole, ...], Field(min_length=1)] | None = Field(default=None, examples=[[1, 2, 3]])
    """Seeds of each; null takes those of the trials. A cell that a trial was is not trained again."""
    set: dict[str, JsonValue] = Field(default_factory=dict, examples=[{"phases.finetune.max_steps": 400}])
    """Dotted paths of the file to what they are there; none that is searched."""
    baseline: str | None = Field(default=None, examples=["full"])
    """Schedule or variant that is run likewise, in the last phase of the file as it stands: what the best trials are
    compared with. null runs none; `report.baseline` has no place beside it."""


class SpaceEntrySpec(Spec):
    """One path of the space."""

    added_later: ClassVar[frozenset[str]] = frozenset({"when"})

    when: dict[str, Plain | tuple[Plain, ...]] = Field(
        default={}, examples=[{"phases.finetune.lr_scheduler_type": "cosine"}]
    )
    """Draws it only where paths above it, each a `choice`, have this value, or one of these; else what the file says
    stays."""


class StagedSpaceSpec(SpaceEntrySpec):
    """Proposes schedules of stages."""

    kind: Literal["staged_space"]
    """A schedule of stages."""
    num_stages: tuple[Count, ...] = Field(examples=[[2, 3, 4]])
    """Numbers of stages to choose from."""
    variants: tuple[str, ...] = Field(examples=[["heavy", "wide", "light", "full"]])
    """Variants that a stage may have, by their names under `compressors`; `full` is no compression."""
    heavy_to_light: Flag = True
    """Whether each stage is at most as compressed as the one before it."""
    last: str | None = Field(default=None, examples=["full"])
    """Variant of the last stage; null leaves it to the search."""
    boundaries: Share = Field(default="1/8", validate_default=True)
    """Share of the phase at whose multiples stages end. A coarse grid lets trials share their beginnings."""


class UniformSpec(SpaceEntrySpec):
    """A number between two bounds, drawn uniformly or log-uniformly."""

    added_later: ClassVar[frozenset[str]] = frozenset({"when", "step"})

    kind: Literal["uniform", "log_uniform"]
    """Distribution: uniform in the number, or in its logarithm."""
    low: Finite
    """Lower bound, inclusive."""
    high: Finite
    """Upper bound, inclusive."""
    step: Positive | None = None
    """Draws only numbers that are whole steps above `low`; null draws any. Not in the logarithm."""


class IntUniformSpec(SpaceEntrySpec):
    """A whole number between two bounds, drawn uniformly or log-uniformly."""

    kind: Literal["int_uniform", "log_int_uniform"]
    """Distribution: uniform in the whole number, or in its logarithm."""
    low: Integer
    """Lower bound, inclusive."""
    high: Integer
    """Upper bound, inclusive."""
    step: Count | None = None
    """Draws only numbers that are whole steps above `low`; null draws any. Not in the logarithm."""


class ChoiceSpec(SpaceEntrySpec):
    """One of a list of values."""

    kind: Literal["choice"]
    """One of a list of values."""
    values: tuple[Plain | list[JsonValue] | dict[str, JsonValue], ...] = Field(
        min_length=1, examples=[[1e-5, 2e-5, 5e-5]]
    )
    """Values to choose from; lists and mappings too."""


_TAGS = {"log_uniform": "uniform", "log_int_uniform": "int_uniform"}


def _space_tag(value: object) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return _TAGS.get(kind, kind) if isinstance(kind, str) else None


SpaceEntry = Annotated[
    Annotated[StagedSpaceSpec, Tag("staged_space")]
    | Annotated[UniformSpec, Tag("uniform")]
    | Annotated[IntUniformSpec, Tag("int_uniform")]
    | Annotated[ChoiceSpec, Tag("choice")],
    Discriminator(_space_tag),
]


def measured_by(objective: str) -> tuple[str, str] | None:
    """Return the evaluation that an objective is of, and the metric's name in it; None for a cost."""
    first, _, rest = objective.partition("/")
    entry, _, metric = rest.partition("/")
    if first != "eval" or not metric:
        return None
    under, _, inner = metric.partition("/")
    return entry, inner if inner and under.startswith("under_") else metric


class SearchSpec(Spec):
    """A search of schedules and hyperparameters with one or several objectives (docs/concepts/search.md)."""

    aliases: ClassVar[dict[str, str]] = {"num_samples": "num_trials", "n_trials": "num_trials"}

    objectives: dict[str, Literal["max", "min"]] = Field(
        min_length=1, examples=[{"eval/vqa/accuracy": "max", "cost/train_tflops": "min"}]
    )
    """Metrics to optimise, each `max` or `min`. Several give a Pareto front."""
    algorithm: AlgorithmSpec = AlgorithmSpec()
    """Method that proposes trials."""
    scheduler: SchedulerSpec | None = None
    """Early stopping of trials; null trains every trial to its end, those too that were stopped before."""
    num_trials: Count = 24
    """Trials in all; equal trials are trained once."""
    budget: BudgetSpec | None = None
    """Limits beside `num_trials`; null sets none."""
    promote: PromoteSpec | None = None
    """What the best trials are run again with; null runs none again."""
    constraints: dict[str, ConstraintText] = Field(
        default_factory=dict, examples=[{"eval/vqa/accuracy": ">= full - 0.005"}]
    )
    """Conditions by metric that a trial must meet to be on the front: `>=` or `<=`, then a number, or a schedule or
    variant with a number added or subtracted. That schedule is trained too, in the last phase of the file as it is."""
    space: dict[str, SpaceEntry] = Field(
        min_length=1,
        examples=[{"phases.finetune.learning_rate": {"kind": "log_uniform", "low": 1e-5, "high": 1e-4}}],
    )
    """What is searched: a dotted path of the file to a distribution."""

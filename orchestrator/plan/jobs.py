"""Jobs: what a worker is asked to do, as plain values, so that a job can be sent, recorded and compared."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter

from orchestrator.plan.identity import digest

FULL = "full"
Keep = Literal["none", "weights", "full"]
"""What stays of a finished state beside its result."""


@dataclass(frozen=True)
class Distillation:
    """What a step learns from beside its labels: a pass without gradient of the same model under fuller points.

    The loss is `(1 - weight) CE + weight T^2 KL(teacher || student)`, or `CE + weight T^2 KL` (`DistillSpec`).

    Attributes:
        teacher: The teacher's variant, for people. Never part of an identity.
        points: Resolved points of the teacher's pass; empty for full tokens.
        weight: Share of the distillation in the loss, or its factor.
        temperature: `T`, which divides both passes' logits.
        added: The labels' loss keeps its own weight of 1.
    """

    teacher: str
    points: tuple[dict[str, Any], ...]
    weight: float
    temperature: float
    added: bool = False

    def fields(self) -> dict[str, Any]:
        """Return its values by name; `added` only where it is true, as it was written before there was one."""
        return {name: value for name, value in asdict(self).items() if name != "added" or value}


@dataclass(frozen=True)
class StudentPasses:
    """Further passes of a step, each under its own points and learning from the step's own pass (`Students`).

    Attributes:
        variants: Their variants, for people. Never part of an identity.
        points: Resolved points of each pass.
        weight: Factor of each pass's `T^2 KL(own || pass)` in the loss.
        temperature: `T`.
    """

    variants: tuple[str, ...]
    points: tuple[tuple[dict[str, Any], ...], ...]
    weight: float
    temperature: float


@dataclass(frozen=True)
class Action:
    """What the optimizer steps `first_step` to `last_step` (0-based, half open) of a phase do.

    Attributes:
        variant: Name for people; `full` where there is no compressor. Never part of an identity.
        points: Resolved points of the variant, each a mapping `attach` accepts; empty for full tokens.
        distill: What the steps learn from beside their labels; None for labels alone.
        students: Further passes of each step; None where it has one.
    """

    first_step: int
    last_step: int
    variant: str
    points: tuple[dict[str, Any], ...] = ()
    distill: Distillation | None = None
    students: StudentPasses | None = None

    @property
    def trained_passes(self) -> tuple[tuple[dict[str, Any], ...], ...]:
        """Points of every pass that trains: the step's own, then the students'."""
        return (self.points, *(self.students.points if self.students is not None else ()))

    @property
    def all_points(self) -> tuple[dict[str, Any], ...]:
        """Points of every pass of a step: those that train, then the teacher's."""
        taught = self.distill.points if self.distill is not None else ()
        return tuple(point for points in self.trained_passes for point in points) + taught


@dataclass(frozen=True)
class RootJob:
    """Write the initial weights of (model, seed) once, as safetensors."""

    id: str
    model: dict[str, Any]
    seed: int
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class StartJob:
    """Put together the weights a phase starts from, where they are not simply another state's.

    Attributes:
        id: Identity: (base and source states, or the folder's content and the model's settings; the parts).
        model: `ModelSpec` as a mapping; a folder's weights must be those of this model.
        base: State that gives what `parts` leaves out; None where all comes from the folder.
        source: State that gives the parts; None where a folder does.
        folder: Folder that gives the parts, or all; None where a state does.
        parts: What comes from `source` or `folder`; empty for all.
    """

    id: str
    model: dict[str, Any]
    base: str | None
    source: str | None
    folder: str | None
    parts: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rehearsed:
    """What was tried before a stage run may begin (`plan/tree.py`).

    Attributes:
        jobs: Rehearsals it waits for.
        cells: For each cell that needs the stage run, or several alike, the keys of what it does.
    """

    jobs: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class StageJob:
    """One stage run: from a parent state to the state after step `last_step` of a phase.

    Attributes:
        id: Identity of the state it leads to; its folder in the ledger.
        parent: Identity of the state it starts from: a root, another stage run, or what a `StartJob` put together.
        starts_phase: True for the first stage run of a phase: weights come from the parent, optimizer, clock and
            learned points are new.
        total_steps: Optimizer steps of the whole phase; the learning rate depends on it and on the step alone.
        table: The phase's compiled schedule from step 0 to `last_step`; saved in checkpoints, checked on load.
        model: `ModelSpec` as a mapping, paths absolute.
        data: The phase's data sets: `{"name", "share", "spec", "content"}`, `spec` a `DataSpec` as a mapping, paths
            absolute, `content` the digest of its content when it was planned; `left_out` where rows are left out that
            the model cannot use.
        recipe: `PhaseSpec` as a mapping.
        seed: Seed of data order, dropout and random methods in this phase.
        checkpoint_every: Optimizer steps between checkpoints inside the stage run.
        keep: What stays when it is finished: `full` checkpoint, `weights`, or `none`.
        plugins: Plug-ins to import on the worker; absolute paths or modules.
        rehearsed: What was to be tried first; None where nothing was.
    """

    id: str
    parent: str
    phase: str
    starts_phase: bool
    first_step: int
    last_step: int
    total_steps: int
    table: tuple[Action, ...]
    model: dict[str, Any]
    data: tuple[dict[str, Any], ...]
    recipe: dict[str, Any]
    seed: int
    checkpoint_every: int = 200
    keep: Keep = "full"
    deterministic: bool = False
    plugins: tuple[str, ...] = ()
    rehearsed: Rehearsed | None = None

    def action_at(self, step: int) -> Action:
        """Return the action of one optimizer step."""
        at = bisect.bisect_right(self.table, step, key=lambda action: action.last_step)
        if at < len(self.table) and self.table[at].first_step <= step:
            return self.table[at]
        raise IndexError(f"stage run {self.id}: step {step} is outside its table, which ends at {self.last_step}")


@dataclass(frozen=True)
class EvaluationJob:
    """One evaluation of one state under one variant.

    Attributes:
        id: Identity: (state, evaluation and its data, points).
        state: Stage run (or root) whose weights are tested.
        name: Entry under `evaluate:`.
        under: `final`, `full` or a variant's name, as the user asked.
        points: Points the model is tested under; empty for full tokens.
        spec: `EvaluationSpec` as a mapping.
        data: `DataSpec` as a mapping, paths absolute; empty where the evaluation brings its own.
        content: Digest of its content when it was planned; None: it could not be read.
        left_out: Indices of rows that are left out, since the model cannot use them.
        part: Which part of the entry it is, such as a benchmark of a suite; empty where it is one piece.
    """

    id: str
    state: str
    name: str
    under: str
    points: tuple[dict[str, Any], ...]
    spec: dict[str, Any]
    data: dict[str, Any]
    model: dict[str, Any]
    model_max_length: int = 2048
    plugins: tuple[str, ...] = field(default=())
    content: str | None = None
    left_out: tuple[int, ...] = ()
    part: str = ""

    @property
    def label(self) -> str:
        """Its entry's name, and after a slash its part."""
        return f"{self.name}/{self.part}" if self.part else self.name

    @property
    def place(self) -> str:
        """What stands before its metrics in MLflow."""
        return "/".join(filter(None, (place_of(self.name, self.under), self.part)))


@dataclass(frozen=True)
class RehearsalJob:
    """Try what stage runs will do, before any is trained; nothing stays of it but a note of how each trial went.

    Attributes:
        parent: State whose weights are opened.
        stage: A stage run of one step for each action that is tried.
        keys: What each of its actions is noted under.
        evaluations: Evaluations that are tried on one row each; the state is not the one they name.
        evaluation_keys: What each of them is noted under.
        only_on_gpu: On a CPU nothing is tried.
    """

    id: str
    parent: str
    stage: StageJob
    keys: tuple[str, ...]
    evaluations: tuple[EvaluationJob, ...]
    evaluation_keys: tuple[str, ...]
    only_on_gpu: bool
    plugins: tuple[str, ...] = ()


Job = RootJob | StartJob | RehearsalJob | StageJob | EvaluationJob
_KINDS: dict[str, type[Any]] = {
    "root": RootJob, "start": StartJob, "rehearsal": RehearsalJob, "stage": StageJob, "evaluation": EvaluationJob,
}  # fmt: skip


def place_of(evaluation: str, under: str) -> str:
    """Return what stands in MLflow before the metrics of an evaluation under a variant."""
    return f"eval/{evaluation}" if under == "final" else f"eval/{evaluation}/under_{under}"


def needs_of(job: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the states that a job, as `job_to_json` writes it, starts from, then the rehearsals it waits for."""
    states = tuple(job[name] for name in ("parent", "state", "base", "source") if job.get(name) is not None)
    return states + tuple((job.get("rehearsed") or {}).get("jobs", ()))


def action_digest(action: Action) -> str:
    """Return what decides the memory of an action and the code it runs: the points of its passes."""
    passes: list[Any] = [list(action.points), None if action.distill is None else list(action.distill.points)]
    if action.students is not None:
        passes.append(list(action.students.points))
    return digest(passes)


def job_to_json(job: Job) -> dict[str, Any]:
    """Return a JSON mapping with the job's `type`."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(job, cls))
    return {"type": kind, **_shortened(asdict(job))}


def _shortened(fields: dict[str, Any]) -> dict[str, Any]:
    for action in fields.get("table", ()):
        for name in ("distill", "students"):
            if action[name] is None:  # as it was written before there were any
                del action[name]
        if not action.get("distill", {}).get("added", True):
            del action["distill"]["added"]
    if "rehearsed" in fields and fields["rehearsed"] is None:
        del fields["rehearsed"]
    if fields.get("part") == "":
        del fields["part"]
    if "stage" in fields:
        _shortened(fields["stage"])
    return fields


def job_from_json(value: Mapping[str, Any]) -> Job:
    """Return the job written by `job_to_json`."""
    job: Job = _reader(value["type"]).validate_python({name: item for name, item in value.items() if name != "type"})
    return job


@cache
def _reader(kind: str) -> TypeAdapter[Any]:
    return TypeAdapter(_KINDS[kind])

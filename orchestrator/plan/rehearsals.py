"""The rehearsals of a work list: what must be tried before the first training step, and which stage runs wait for it.

One rehearsal for each distinct way to train a phase (model, data, batch and engine settings). It tries each action of
the stage runs that are to be done, and the evaluations of the cells whose last phase it is. What was tried is noted in
the ledger by key and kind of device, so that it is not tried again; the keys of a cell decide whether it can be
trained, and a stage run is left out where none of its cells can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.plan.identity import content_digest, digest
from orchestrator.plan.jobs import (
    Action,
    EvaluationJob,
    Job,
    RehearsalJob,
    Rehearsed,
    RootJob,
    StageJob,
    StartJob,
    action_digest,
)  # fmt: skip
from orchestrator.plan.ledger import Ledger
from orchestrator.spec.infrastructure import ClusterSpec

if TYPE_CHECKING:
    from orchestrator.plan.tree import StageTree

# What moves numbers but neither memory nor code.
_NOT_TRIED = frozenset(
    {
        "schedule", "seed", "start_from", "max_steps", "num_train_epochs", "max_train_tflops", "match_train_tflops",
        "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm",
    }
)  # fmt: skip


def with_rehearsals(tree: StageTree, work: list[Job], ledger: Ledger) -> list[Job]:
    """The work list with its rehearsals right after the weights they open; as it is where none are wanted."""
    runs = [job for job in work if isinstance(job, StageJob)]
    if not runs or tree.cluster is None or not _is_wanted(tree.cluster):
        return work
    plan = _Rehearsals(tree, tree.cluster, ledger)
    for job in runs:
        plan.take(job)
    keys = plan.keys_of_cells(work)
    ready: list[Job] = []
    after: dict[str, list[Job]] = {}
    listed = {job.id for job in work}
    for rehearsal in plan.jobs():
        (after.setdefault(rehearsal.parent, []) if rehearsal.parent in listed else ready).append(rehearsal)
    for each in work:
        ready.append(plan.waiting(each, keys) if isinstance(each, StageJob) else each)
        ready += after.pop(each.id, [])
    # All weights first, then all rehearsals: nothing is trained before what may fail has been tried.
    first = (RootJob, StartJob, RehearsalJob)
    if any(isinstance(job, StartJob) for job in work):
        return ready  # what is put together may come out of a stage run
    return [job for job in ready if isinstance(job, first)] + [job for job in ready if not isinstance(job, first)]


def _is_wanted(cluster: ClusterSpec) -> bool:
    """`auto`: where there may be GPUs; the workers of another machine find that out themselves."""
    if cluster.rehearse != "auto":
        return cluster.rehearse
    if cluster.use_gpu != "auto":
        return cluster.use_gpu
    return cluster.address is not None or any(Path(place).exists() for place in ("/dev/nvidiactl", "/dev/kfd"))


@dataclass
class _One:
    """One rehearsal as it grows."""

    first: StageJob
    parent: str
    actions: dict[str, Action] = field(default_factory=dict)
    evaluations: dict[str, EvaluationJob] = field(default_factory=dict)


class _Rehearsals:
    def __init__(self, tree: StageTree, cluster: ClusterSpec, ledger: Ledger) -> None:
        self._tree, self._cluster, self._ledger = tree, cluster, ledger
        self._found: dict[str, _One] = {}
        self._about: dict[tuple[int, ...], str] = {}
        self._keys: dict[tuple[Any, ...], str] = {}
        self._keys_of: dict[str, tuple[str, ...]] = {}
        self._about_of: dict[str, str] = {}
        self._job_of_key: dict[str, str] = {}

    def take(self, job: StageJob) -> None:
        """Adds what a stage run does."""
        about = self._way_of(job)
        one = self._found.setdefault(about, _One(job, self._origin(job)))
        keys = []
        for action in job.table:
            if action.last_step > job.first_step:
                near = (about, id(action.points), id(action.distill))
                key = self._keys.setdefault(near, digest([about, action_digest(action)]))
                one.actions.setdefault(key, action)
                keys.append(key)
        self._keys_of[job.id], self._about_of[job.id] = tuple(dict.fromkeys(keys)), about

    def keys_of_cells(self, work: Sequence[Job]) -> dict[str, tuple[str, ...]]:
        """What each cell needs to have been tried, in its order; adds the evaluations that are to be done."""
        tests: dict[str, list[EvaluationJob]] = {}
        for job in work:
            if isinstance(job, EvaluationJob):
                tests.setdefault(job.state, []).append(job)
        found = {}
        for cell, path in self._tree.path_of.items():
            path = (*self._tree.origins_of.get(cell, ()), *path)
            keys = [key for run in path for key in self._keys_of.get(run, ())]
            last = self._about_of.get(path[-1]) if path else None
            if last is not None:
                for test in tests.get(self._tree.state_of[cell], ()):
                    key = digest([last, "evaluation", list(test.points), test.spec, test.data, test.model_max_length])
                    self._found[last].evaluations.setdefault(key, test)
                    keys.append(key)
            found[cell] = tuple(dict.fromkeys(keys))
        return found

    def jobs(self) -> list[RehearsalJob]:
        """The rehearsals."""
        made = []
        for about, one in self._found.items():
            identity = digest(["rehearsal", about, list(one.actions), list(one.evaluations)])
            table = tuple(
                replace(action, first_step=at, last_step=at + 1) for at, action in enumerate(one.actions.values())
            )
            stage = replace(
                one.first, id=identity, parent=one.parent, starts_phase=True, first_step=0, last_step=len(table),
                total_steps=len(table), table=table, keep="full", plugins=(),
            )  # fmt: skip
            made.append(
                RehearsalJob(
                    identity, one.parent, stage, tuple(one.actions), tuple(one.evaluations.values()),
                    tuple(one.evaluations), self._cluster.rehearse == "auto", one.first.plugins,
                )
            )  # fmt: skip
            self._job_of_key |= dict.fromkeys((*one.actions, *one.evaluations), identity)
        return made

    def waiting(self, job: StageJob, keys: dict[str, tuple[str, ...]]) -> StageJob:
        """A stage run that waits for what all of its cells need; after `jobs`."""
        cells = {keys[cell] for cell in self._tree.cells_of[job.id]}
        wanted = sorted({self._job_of_key[key] for one in cells for key in one})
        return replace(job, rehearsed=Rehearsed(tuple(wanted), tuple(sorted(cells))))

    def _way_of(self, job: StageJob) -> str:
        """Digest of what a trial depends on beside the action."""
        near = (id(job.recipe), id(job.model), id(job.data))
        if near not in self._about:
            cluster = self._cluster
            recipe = {name: value for name, value in job.recipe.items() if name not in _NOT_TRIED}
            plugins = [content_digest(name) if name.endswith(".py") else name for name in job.plugins]
            self._about[near] = digest(
                {
                    "model": job.model, "recipe": recipe, "data": [entry["spec"] for entry in job.data],
                    "plugins": plugins, "deterministic": job.deterministic, "gpu": cluster.use_gpu,
                    "workers": cluster.model_dump(mode="json")["num_workers"],
                    "resources": cluster.resources_per_worker,
                }
            )  # fmt: skip
        return self._about[near]

    def _origin(self, job: StageJob) -> str:
        """A state whose weights are there before the stage run's own parent is."""
        state = job.parent
        while state in self._tree.stage_runs and not self._ledger.has(state, "weights"):
            state = self._tree.stage_runs[state].parent
        return state

"""The stage tree: all cells' stage runs, equal beginnings merged, what is to do (docs/concepts/stage-tree.md)."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.plan.cells.cell import Cell, PhasePlan, distinct_cells
from orchestrator.plan.identity import content_digest, digest
from orchestrator.plan.jobs import (
    Action,
    EvaluationJob,
    Job,
    Keep,
    RehearsalJob,
    Rehearsed,
    RootJob,
    StageJob,
    StartJob,
    action_digest,
)  # fmt: skip
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.backends.base import most
from orchestrator.spec.infrastructure import ClusterSpec
from orchestrator.spec.phase import PhaseSpec


@dataclass
class Branch:
    """A plan of one lineage with the cells that go through it.

    Attributes:
        owner: A cell whose phase it is; those that go through it may be others, which start from it.
        index: The action under way.
        stage: The stage run under way, as the plan alone would cut them.
    """

    plan: PhasePlan
    owner: Cell
    cells: list[Cell]
    index: int = 0
    stage: int = 0

    @property
    def stage_end(self) -> int:
        """Where the stage run under way ends."""
        return min(self.plan.schedule.stage_ends[self.stage], self.plan.last_step)

    def does(self, end: int) -> str:
        """Return what it does up to a step; equal for branches of one state that do the same."""
        # An action goes up to its end unchanged, so one digest says it all.
        return self.plan.schedule.ids[self.index] if self._action_end() >= end else self.plan.state_at(end)

    def move_to(self, step: int) -> None:
        """Go on to a step before its last one."""
        self.stage += self.stage_end <= step
        while self._action_end() <= step:
            self.index += 1

    def _action_end(self) -> int:
        return self.plan.table[self.index].last_step


def split(group: Sequence[Branch]) -> list[list[Branch]]:
    """Return the branches of one state in parts that do the same up to their first stage end; last part first.

    Two parts differ before the end of either, so no state is ever reached on two ways.
    """
    parts: list[list[Branch]] = []
    undecided = [list(group)]
    while undecided:
        some = undecided.pop()
        end = min(branch.stage_end for branch in some)
        alike: dict[str, list[Branch]] = {}
        for branch in some:
            alike.setdefault(branch.does(end), []).append(branch)
        for part in alike.values():
            # A part without the branch that ends first continues to a later end; its branches may differ before it.
            ends_here = len(part) == 1 or min(branch.stage_end for branch in part) == end
            (parts if ends_here else undecided).append(part)
    order = {id(branch): number for number, branch in enumerate(group)}
    return sorted(parts, key=lambda part: order[id(part[0])], reverse=True)


# What moves numbers but neither memory nor code.
_NOT_TRIED = frozenset(
    {
        "schedule", "seed", "start_from", "max_steps", "num_train_epochs", "max_train_tflops", "match_train_tflops",
        "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm",
    }
)  # fmt: skip


def with_rehearsals(tree: StageTree, work: list[Job], ledger: Ledger) -> list[Job]:
    """Return the work list with its rehearsals right after the weights they open; as it is where none are wanted."""
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
    return sorted(ready, key=lambda job: not isinstance(job, first))


def _is_wanted(cluster: ClusterSpec) -> bool:
    """Return `auto`: where there may be GPUs; the workers of another machine find that out themselves."""
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
        """Add what a stage run does."""
        about = self._way_of(job)
        one = self._found.setdefault(about, _One(job, self._origin(job)))
        keys = []
        for action in job.table:
            if action.last_step > job.first_step:
                near = (about, id(action.points), id(action.distill), id(action.students))
                key = self._keys.setdefault(near, digest([about, action_digest(action)]))
                one.actions.setdefault(key, action)
                keys.append(key)
        self._keys_of[job.id], self._about_of[job.id] = tuple(dict.fromkeys(keys)), about

    def keys_of_cells(self, work: Sequence[Job]) -> dict[str, tuple[str, ...]]:
        """Return what each cell needs to have been tried, in its order; adds the evaluations that are to be done."""
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
        """Return the rehearsals."""
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
        """Return a stage run that waits for what all of its cells need; after `jobs`."""
        cells = {keys[cell] for cell in self._tree.cells_of[job.id]}
        wanted = sorted({self._job_of_key[key] for one in cells for key in one})
        return replace(job, rehearsed=Rehearsed(tuple(wanted), tuple(sorted(cells))))

    def _way_of(self, job: StageJob) -> str:
        """Return the digest of what a trial depends on beside the action."""
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
        """Return a state whose weights are there before the stage run's own parent is."""
        state = job.parent
        while state in self._tree.stage_runs and not self._ledger.has(state, "weights"):
            state = self._tree.stage_runs[state].parent
        return state


@dataclass
class StageTree:
    """Roots, stage runs and evaluations of an experiment; ids are those of the ledger.

    Attributes:
        roots: Initial weights.
        starts: What is put together for phases to start from.
        stage_runs: Depth first: a child follows its parent as closely as can be, so that weights stay in memory.
        evaluations: Distinct evaluations; two names of one setting are one evaluation.
        cells_of: Cells whose path holds a stage run.
        path_of: Stage runs of a cell, from its first phase to its last.
        origins_of: What else a cell stands on: other experiments' states it starts from, what is put together.
        state_of: The state whose weights are a cell's result.
        root_of: Root of a cell.
        evaluations_of: Evaluations of a state.
        order: All states, roots and starts included, in order of execution.
        cluster: Where it runs; None for a tree without cells.
    """

    roots: dict[str, RootJob] = field(default_factory=dict)
    starts: dict[str, StartJob] = field(default_factory=dict)
    stage_runs: dict[str, StageJob] = field(default_factory=dict)
    evaluations: dict[str, EvaluationJob] = field(default_factory=dict)
    cells_of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    path_of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    origins_of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    state_of: dict[str, str] = field(default_factory=dict)
    root_of: dict[str, str] = field(default_factory=dict)
    evaluations_of: dict[str, tuple[EvaluationJob, ...]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    cluster: ClusterSpec | None = None

    def work(self, ledger: Ledger, retry_failed: bool = False) -> list[Job]:
        """Return what is missing, in order of execution: an evaluation comes right after its state.

        What failed, and what stands on it, is left out unless `retry_failed`.
        """
        needed = self.needed(ledger)
        blocked = set() if retry_failed else self.blocked(ledger, needed)
        work: list[Job] = []
        for state in self.order:
            if state in blocked:
                continue
            if state in needed:
                work.append(self.job_of(state))
            for job in self.evaluations_of.get(state, ()):
                if ledger.evaluation(job.id) is None and job.id not in blocked:
                    work.append(job)
        return with_rehearsals(self, work, ledger)

    def before(self, cell: Cell) -> tuple[str, ...]:
        """Return what a cell's first phase stands on: its root, then other experiments' states and starts."""
        return tuple(dict.fromkeys((cell.root.id, *self.origins_of.get(cell.id, ()))))

    def jobs_of(self, cell: Cell) -> tuple[str, ...]:
        """Return ids of all that a cell needs, in order: what it stands on, its stage runs, its evaluations."""
        tests = (job.id for job in cell.tests)
        return tuple(dict.fromkeys((*self.before(cell), *self.path_of[cell.id], *tests)))

    def job_of(self, state: str) -> RootJob | StartJob | StageJob:
        """Return the job that leads to a state."""
        return self.roots.get(state) or self.starts.get(state) or self.stage_runs[state]

    def needs_of(self, state: str) -> tuple[str, ...]:
        """Return the states that a state is made from."""
        if (run := self.stage_runs.get(state)) is not None:
            return (run.parent,)
        start = self.starts.get(state)
        return tuple(need for need in (start.base, start.source) if need is not None) if start is not None else ()

    def needed(self, ledger: Ledger) -> set[str]:
        """Return the states to be written: results that are missing, and what must be stored to get to them."""
        wanted: dict[str, Keep] = {state: "none" for state in self.state_of.values() if state not in self.roots}
        for state, jobs in self.evaluations_of.items():
            if any(ledger.evaluation(job.id) is None for job in jobs):
                wanted[state] = "weights"
        needed: set[str] = set()
        # Children first: a state's level is known once all of its children have asked for it.
        for state in reversed(self.order):
            if state not in wanted or ledger.is_stored(state, wanted[state]):
                continue
            needed.add(state)
            goes_on = state in self.stage_runs and not self.stage_runs[state].starts_phase
            for need in self.needs_of(state):
                wanted[need] = most(wanted.get(need, "none"), "full" if goes_on else "weights")
        return needed

    def blocked(self, ledger: Ledger, needed: Set[str]) -> set[str]:
        """Return the states and evaluations that failed, and those that stand on them."""
        blocked: set[str] = set()
        for state in self.order:
            stands_on = not blocked.isdisjoint(self.needs_of(state))
            if state in needed and (stands_on or ledger.failure(state) is not None):
                blocked.add(state)
            for job in self.evaluations_of.get(state, ()):
                if state in blocked or ledger.failure(job.id) is not None:
                    blocked.add(job.id)
        return blocked


def build_stage_tree(cells: Sequence[Cell], ledger: Ledger | None = None) -> StageTree:
    """Merge the cells' equal beginnings; cuts at every stage's end, where another cell leaves, and where one is tested.

    A policy that mixes variants step by step is one stage run; its beginning is shared up to the end of a stage of
    another cell that does the same until there.

    With a ledger it also cuts where a stored checkpoint lies inside a stage, so that training starts from the
    furthest stored state. Where it cuts never changes the id of a state.
    """
    tree = _Builder(cells, frozenset(), ()).build()
    if ledger is not None:
        stored = ledger.stored_checkpoints(leave_out=tree.stage_runs.keys())
        if stored:
            tree = _Builder(cells, frozenset(stored), tuple(sorted(set(stored.values())))).build()
    return tree


class _Builder:
    def __init__(self, cells: Sequence[Cell], stored: frozenset[str], stored_steps: tuple[int, ...]) -> None:
        self.cells, self.all_cells = distinct_cells(cells), cells
        self.stored, self.stored_steps = stored, stored_steps
        self.tree = StageTree(cluster=cells[0].spec.cluster if cells else None)
        self.paths: dict[str, list[str]] = {cell.id: [] for cell in self.cells}
        self.origins: dict[str, list[str]] = {cell.id: [] for cell in self.cells if cell.starts or cell.sources}
        self.lineages = {cell.id: {plan.lineage for plan in cell.phases} for cell in self.cells}
        self.used_in_starts: set[str] = set()
        self.tested_steps = sorted({each.step for cell in cells for each in cell.along})
        self.starting: dict[str, dict[str, dict[str, Branch]]] = {}
        self.recipes: dict[str, PhaseSpec] = {}  # of each lineage; the cells keep them alive, so that ids stay theirs
        self.dumps: dict[int, dict[str, Any]] = {}
        self.cut_tables: dict[tuple[int, int], tuple[Action, ...]] = {}  # by the table's id

    def build(self) -> StageTree:
        tree = self.tree
        for cell in self.cells:
            tree.state_of[cell.id], tree.root_of[cell.id] = cell.state, cell.root.id
            for owner in (*cell.origins(), cell):
                self._take_in(owner, cell)
        self._evaluations()
        for root in tree.roots:
            tree.order.append(root)
            self._grow(root)
        self._grow_from_starts()
        tree.path_of = {cell: tuple(path) for cell, path in self.paths.items()}
        tree.origins_of = {cell: tuple(dict.fromkeys(states)) for cell, states in self.origins.items()}
        return tree

    def _take_in(self, owner: Cell, cell: Cell) -> None:
        """Add the roots, starts and phases of a cell, or of one that it starts from."""
        self.tree.roots.setdefault(owner.root.id, owner.root)
        for start in owner.starts:
            self.tree.starts.setdefault(start.id, start)
            self.used_in_starts |= {need for need in (start.base, start.source) if need is not None}
        if cell.id in self.origins:
            self.origins[cell.id] += [owner.root.id, *(start.id for start in owner.starts)]
        for plan in owner.phases:
            branches = self.starting.setdefault(plan.start, {}).setdefault(plan.lineage, {})
            through = branches.setdefault(plan.end, Branch(plan, owner, [])).cells
            if not through or through[-1] is not cell:
                through.append(cell)

    def _grow_from_starts(self) -> None:
        """Put jobs that combine states behind all they are made from."""
        waiting = dict(self.tree.starts)
        while waiting:
            placed = set(self.tree.order)
            for start in [start for start in waiting if placed.issuperset(self.tree.needs_of(start))]:
                del waiting[start]
                self.tree.order.append(start)
                self._grow(start)

    def _evaluations(self) -> None:
        found: dict[str, dict[str, EvaluationJob]] = {}
        # Cells of one id may be tested differently only under another spec; all entries of all names count.
        for cell in self.all_cells:
            for job in cell.tests:
                self.tree.evaluations.setdefault(job.id, job)
                found.setdefault(job.state, {}).setdefault(job.id, job)
        self.tree.evaluations_of = {state: tuple(jobs.values()) for state, jobs in found.items()}

    def _grow(self, root: str) -> None:
        # An explicit stack: a schedule may have more actions than Python has frames.
        stack: list[tuple[list[Branch], int, str]] = self._groups_from(root)
        while stack:
            group, step, parent = stack.pop()
            plan = group[0].plan
            end = min(branch.stage_end for branch in group)
            end = self._tested_step_between(plan, step, end) or end
            end = self._stored_step_between(plan, step, end) or end
            state = plan.state_at(end)
            self._add(group, step, end, parent, state)
            going_on = [branch for branch in group if branch.plan.last_step > end]
            if not going_on:
                stack += self._groups_from(state)
                continue
            for branch in going_on:
                branch.move_to(end)
            stack += [(part, end, state) for part in split(going_on)]

    def _groups_from(self, state: str) -> list[tuple[list[Branch], int, str]]:
        groups = []
        for branches in reversed(list(self.starting.get(state, {}).values())):
            groups += [(part, 0, state) for part in split(list(branches.values()))]
        return groups

    def _tested_step_between(self, plan: PhasePlan, first: int, last: int) -> int | None:
        """Return the next step whose state is tested: it is cut there, which changes no state's identity."""
        steps = (step for step in self.tested_steps if first < step < last)
        return next((step for step in steps if plan.state_at(step) in self.tree.evaluations_of), None)

    def _stored_step_between(self, plan: PhasePlan, first: int, last: int) -> int | None:
        if not self.stored:
            return None
        # The furthest one: the shorter ones are of no use to anyone who passes here.
        steps = (s for s in reversed(self.stored_steps) if first < s < last)
        return next((s for s in steps if plan.state_at(s) in self.stored), None)

    def _add(self, group: list[Branch], first: int, last: int, parent: str, state: str) -> None:
        plan, owner, cluster = group[0].plan, group[0].owner, group[0].cells[0].spec.cluster
        members = list(dict.fromkeys(cell.id for branch in group for cell in branch.cells))
        self.tree.order.append(state)
        self.tree.cells_of[state] = tuple(members)
        for member in members:
            own = plan.lineage in self.lineages[member]
            (self.paths if own else self.origins)[member].append(state)
        recipe = self.recipes.setdefault(plan.lineage, plan.recipe)
        if id(recipe) not in self.dumps:
            self.dumps[id(recipe)] = recipe.model_dump(mode="json")
        self.tree.stage_runs[state] = StageJob(
            id=state, parent=parent, phase=plan.name, starts_phase=first == 0, first_step=first, last_step=last,
            total_steps=plan.total_steps, table=self._table(plan, last), model=owner.root.model, data=plan.data,
            recipe=self.dumps[id(recipe)], seed=plan.seed, checkpoint_every=cluster.checkpoint_every,
            keep=self._keep(plan, last, state, cluster.keep.leaf), deterministic=cluster.deterministic,
            plugins=tuple(owner.spec.plugins),
        )  # fmt: skip

    def _table(self, plan: PhasePlan, last: int) -> tuple[Action, ...]:
        """Return what a phase does up to a step; cells of one schedule share it."""
        if last == plan.total_steps:
            return plan.table
        key = (id(plan.table), last)
        if key not in self.cut_tables:
            table = tuple(action for action in plan.table if action.first_step < last)
            self.cut_tables[key] = (*table[:-1], replace(table[-1], last_step=last))
        return self.cut_tables[key]

    def _keep(self, plan: PhasePlan, last: int, state: str, leaf: Keep) -> Keep:
        if last < plan.total_steps:
            return "full"
        # A next phase and an evaluation need the weights, whatever the user wants left of a leaf.
        used = state in self.starting or state in self.tree.evaluations_of or state in self.used_in_starts
        return "weights" if leaf == "none" and used else leaf

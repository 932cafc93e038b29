"""The stage tree: all cells' stage runs, equal beginnings merged, and what of it is still to do (DESIGN section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from orchestrator.plan.branch import Branch, split
from orchestrator.plan.cell import Cell, PhasePlan
from orchestrator.plan.jobs import Action, EvaluationJob, Job, RootJob, StageJob, StartJob
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.rehearsals import with_rehearsals
from orchestrator.spec.infrastructure import ClusterSpec
from orchestrator.spec.phase import PhaseSpec

Level = Literal["result", "weights", "checkpoint"]
_LEVELS: tuple[Level, ...] = ("result", "weights", "checkpoint")


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
        """What is missing, in order of execution: an evaluation comes right after its state.

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

    def job_of(self, state: str) -> RootJob | StartJob | StageJob:
        """The job that leads to a state."""
        return self.roots.get(state) or self.starts.get(state) or self.stage_runs[state]

    def needs_of(self, state: str) -> tuple[str, ...]:
        """States that a state is made from."""
        if (run := self.stage_runs.get(state)) is not None:
            return (run.parent,)
        start = self.starts.get(state)
        return tuple(need for need in (start.base, start.source) if need is not None) if start is not None else ()

    def needed(self, ledger: Ledger) -> set[str]:
        """States to be written: results that are missing, and what must be stored to get to them."""
        wanted: dict[str, int] = {}
        for state in set(self.state_of.values()):
            missing = any(ledger.evaluation(job.id) is None for job in self.evaluations_of.get(state, ()))
            if missing or state not in self.roots:
                wanted[state] = _LEVELS.index("weights" if missing else "result")
        needed: set[str] = set()
        # Children first: a state's level is known once all of its children have asked for it.
        for state in reversed(self.order):
            if state not in wanted or _stored(ledger, state, _LEVELS[wanted[state]]):
                continue
            needed.add(state)
            goes_on = state in self.stage_runs and not self.stage_runs[state].starts_phase
            level: Level = "checkpoint" if goes_on else "weights"
            for need in self.needs_of(state):
                wanted[need] = max(wanted.get(need, 0), _LEVELS.index(level))
        return needed

    def blocked(self, ledger: Ledger, needed: set[str]) -> set[str]:
        """States and evaluations that failed, and those that stand on them."""
        blocked: set[str] = set()
        for state in self.order:
            stands_on = not blocked.isdisjoint(self.needs_of(state))
            if state in needed and (stands_on or ledger.failure(state) is not None):
                blocked.add(state)
            for job in self.evaluations_of.get(state, ()):
                if state in blocked or ledger.failure(job.id) is not None:
                    blocked.add(job.id)
        return blocked


def _stored(ledger: Ledger, state: str, level: Level) -> bool:
    if not ledger.is_done(state):
        return False
    return level == "result" or ledger.has(state, level)


def build_stage_tree(cells: Sequence[Cell], ledger: Ledger | None = None) -> StageTree:
    """Merges the cells' equal beginnings; cuts at every stage's end and wherever another cell leaves.

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
        first: dict[str, Cell] = {}
        for cell in cells:
            first.setdefault(cell.id, cell)
        self.cells, self.all_cells = list(first.values()), cells
        self.stored, self.stored_steps = stored, stored_steps
        self.tree = StageTree(cluster=cells[0].spec.cluster if cells else None)
        self.paths: dict[str, list[str]] = {cell.id: [] for cell in self.cells}
        self.origins: dict[str, list[str]] = {cell.id: [] for cell in self.cells if cell.starts or cell.sources}
        self.lineages = {cell.id: {plan.lineage for plan in cell.phases} for cell in self.cells}
        self.used_in_starts: set[str] = set()
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
        """Roots, starts and phases of a cell, or of one that it starts from."""
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
        """What is put together comes once all it is made from is there."""
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
            for job in cell.evaluations:
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
            end = self._stored_step_between(plan, step, end) or end
            state = plan.state_at(end)
            self._add(group, step, end, parent, state)
            if end == plan.total_steps:
                stack += self._groups_from(state)
                continue
            for branch in group:
                branch.move_to(end)
            stack += [(part, end, state) for part in split(group)]

    def _groups_from(self, state: str) -> list[tuple[list[Branch], int, str]]:
        groups = []
        for branches in reversed(list(self.starting.get(state, {}).values())):
            groups += [(part, 0, state) for part in split(list(branches.values()))]
        return groups

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
        """What a phase does up to a step; cells of one schedule share it."""
        if last == plan.total_steps:
            return plan.table
        key = (id(plan.table), last)
        if key not in self.cut_tables:
            table = tuple(action for action in plan.table if action.first_step < last)
            self.cut_tables[key] = (*table[:-1], replace(table[-1], last_step=last))
        return self.cut_tables[key]

    def _keep(self, plan: PhasePlan, last: int, state: str, leaf: str) -> str:
        if last < plan.total_steps:
            return "full"
        # A next phase and an evaluation need the weights, whatever the user wants left of a leaf.
        used = state in self.starting or state in self.tree.evaluations_of or state in self.used_in_starts
        return "weights" if leaf == "none" and used else leaf

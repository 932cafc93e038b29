"""The stage tree: all cells' stage runs, equal beginnings merged, and what of it is still to do (DESIGN section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from orchestrator.plan.cell import Cell, PhasePlan
from orchestrator.plan.jobs import EvaluationJob, Job, RootJob, StageJob
from orchestrator.plan.ledger import Ledger

Level = Literal["result", "weights", "checkpoint"]
_LEVELS: tuple[Level, ...] = ("result", "weights", "checkpoint")


@dataclass
class StageTree:
    """Roots, stage runs and evaluations of an experiment; ids are those of the ledger.

    Attributes:
        roots: Initial weights.
        stage_runs: Depth first: a child follows its parent as closely as can be, so that weights stay in memory.
        evaluations: Distinct evaluations; two names of one setting are one evaluation.
        cells_of: Cells whose path holds a stage run.
        path_of: Stage runs of a cell, from its first phase to its last.
        state_of: The state whose weights are a cell's result.
        root_of: Root of a cell.
        evaluations_of: Evaluations of a state.
        order: All states, roots included, in order of execution.
    """

    roots: dict[str, RootJob] = field(default_factory=dict)
    stage_runs: dict[str, StageJob] = field(default_factory=dict)
    evaluations: dict[str, EvaluationJob] = field(default_factory=dict)
    cells_of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    path_of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    state_of: dict[str, str] = field(default_factory=dict)
    root_of: dict[str, str] = field(default_factory=dict)
    evaluations_of: dict[str, tuple[EvaluationJob, ...]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

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
                work.append(self.roots[state] if state in self.roots else self.stage_runs[state])
            for job in self.evaluations_of.get(state, ()):
                if ledger.evaluation(job.id) is None and job.id not in blocked:
                    work.append(job)
        return work

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
            if state in self.stage_runs:
                job = self.stage_runs[state]
                level: Level = "weights" if job.starts_phase else "checkpoint"
                wanted[job.parent] = max(wanted.get(job.parent, 0), _LEVELS.index(level))
        return needed

    def blocked(self, ledger: Ledger, needed: set[str]) -> set[str]:
        """States and evaluations that failed, and those that stand on them."""
        blocked: set[str] = set()
        for state in self.order:
            parent = self.stage_runs[state].parent if state in self.stage_runs else None
            if state in needed and (parent in blocked or ledger.failure(state) is not None):
                blocked.add(state)
            for job in self.evaluations_of.get(state, ()):
                if state in blocked or ledger.failure(job.id) is not None:
                    blocked.add(job.id)
        return blocked


def _stored(ledger: Ledger, state: str, level: Level) -> bool:
    if not ledger.is_done(state):
        return False
    return level == "result" or ledger.has(state, level)


@dataclass
class _Branch:
    """A plan of one lineage with the cells that go through it.

    Attributes:
        index: The action under way.
        stage: The stage run under way, as the plan alone would cut them.
    """

    plan: PhasePlan
    cells: list[Cell]
    index: int = 0
    stage: int = 0

    @property
    def stage_end(self) -> int:
        """Where the stage run under way ends."""
        return self.plan.stage_ends[self.stage]

    def does(self, end: int) -> str:
        """What it does up to a step; equal for branches of one state that do the same."""
        # An action goes up to its end unchanged, so one digest says it all.
        return self.plan.points_ids[self.index] if self._action_end() >= end else self.plan.state_at(end)

    def move_to(self, step: int) -> None:
        """Goes on to a step before the phase's end."""
        self.stage += self.stage_end <= step
        while self._action_end() <= step:
            self.index += 1

    def _action_end(self) -> int:
        return self.plan.table[self.index].last_step


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
        self.tree = StageTree()
        self.paths: dict[str, list[str]] = {cell.id: [] for cell in self.cells}
        self.starting: dict[str, dict[str, dict[str, _Branch]]] = {}
        self.dumps: dict[str, dict[str, Any]] = {}

    def build(self) -> StageTree:
        tree = self.tree
        for cell in self.cells:
            tree.roots.setdefault(cell.root.id, cell.root)
            tree.state_of[cell.id], tree.root_of[cell.id] = cell.state, cell.root.id
            for plan in cell.phases:
                branches = self.starting.setdefault(plan.start, {}).setdefault(plan.lineage, {})
                branches.setdefault(plan.end, _Branch(plan, [])).cells.append(cell)
        self._evaluations()
        for root in tree.roots:
            tree.order.append(root)
            self._grow(root)
        tree.path_of = {cell: tuple(path) for cell, path in self.paths.items()}
        return tree

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
        stack: list[tuple[list[_Branch], int, str]] = self._groups_from(root)
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
            stack += [(split, end, state) for split in _split(group)]

    def _groups_from(self, state: str) -> list[tuple[list[_Branch], int, str]]:
        groups = []
        for branches in reversed(list(self.starting.get(state, {}).values())):
            groups += [(split, 0, state) for split in _split(list(branches.values()))]
        return groups

    def _stored_step_between(self, plan: PhasePlan, first: int, last: int) -> int | None:
        # The furthest one: the shorter ones are of no use to anyone who passes here.
        steps = (s for s in reversed(self.stored_steps) if first < s < last)
        return next((s for s in steps if plan.state_at(s) in self.stored), None)

    def _add(self, group: list[_Branch], first: int, last: int, parent: str, state: str) -> None:
        plan, cell = group[0].plan, group[0].cells[0]
        members = [cell.id for branch in group for cell in branch.cells]
        cluster = cell.spec.cluster
        self.tree.order.append(state)
        self.tree.cells_of[state] = tuple(members)
        for member in members:
            self.paths[member].append(state)
        table = plan.table
        if last < plan.total_steps:
            table = tuple(a for a in table if a.first_step < last)
            table = (*table[:-1], replace(table[-1], last_step=last))
        if plan.lineage not in self.dumps:
            self.dumps[plan.lineage] = plan.recipe.model_dump(mode="json")
        self.tree.stage_runs[state] = StageJob(
            id=state, parent=parent, phase=plan.name, starts_phase=first == 0, first_step=first, last_step=last,
            total_steps=plan.total_steps, table=table, model=cell.root.model, data=plan.data,
            recipe=self.dumps[plan.lineage], seed=plan.seed, checkpoint_every=cluster.checkpoint_every,
            keep=self._keep(plan, last, state, cluster.keep.leaf), deterministic=cluster.deterministic,
            plugins=tuple(cell.spec.plugins),
        )  # fmt: skip

    def _keep(self, plan: PhasePlan, last: int, state: str, leaf: str) -> str:
        if last < plan.total_steps:
            return "full"
        # A next phase and an evaluation need the weights, whatever the user wants left of a leaf.
        used = state in self.starting or state in self.tree.evaluations_of
        return "weights" if leaf == "none" and used else leaf


def _split(group: Sequence[_Branch]) -> list[list[_Branch]]:
    """Branches of one state that do the same up to the first stage end among them; last part first, for the stack.

    Two parts differ before the end of either, so no state is ever reached on two ways.
    """
    parts: list[list[_Branch]] = []
    undecided = [list(group)]
    while undecided:
        some = undecided.pop()
        end = min(branch.stage_end for branch in some)
        alike: dict[str, list[_Branch]] = {}
        for branch in some:
            alike.setdefault(branch.does(end), []).append(branch)
        for part in alike.values():
            # A part without the branch that ends first goes on to a later end, up to which it may differ in itself.
            ends_here = len(part) == 1 or min(branch.stage_end for branch in part) == end
            (parts if ends_here else undecided).append(part)
    order = {id(branch): number for number, branch in enumerate(group)}
    return sorted(parts, key=lambda part: order[id(part[0])], reverse=True)

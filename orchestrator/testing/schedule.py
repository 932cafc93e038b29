"""`check_schedule`: a schedule is a pure function of its spec that says of every step what happens in it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from orchestrator.spec.components import ScheduleSpec, StageTable, merge_actions
from orchestrator.testing.contract import (
    Broken,
    Contract,
    ContractReport,
    Reference,
    check_spec,
    component_of,
    shorten,
)

PHASES = ((97, 128), (400, 128), (1000, 1), (5197, 256))
"""Phases the kit tries: (optimizer steps, global batch size); lengths that shares divide, and that they do not."""


def check_schedule(schedule: Reference, phases: Sequence[tuple[int, int]] = PHASES) -> ContractReport:
    """Prove that a schedule keeps its contract: one line in a plug-in's tests.

    `compile` is a pure function of the spec, the phase's steps and its batch size. Its actions cover all steps without
    gap or overlap, equal neighbours merged; they, `final` and the teachers name variants that `variants` lists or the
    table derives from one of those; stage runs end in rising order, the last with the phase. A phase that is too short
    is a `ValueError` and nothing else.

    Args:
        schedule: A spec, a spec class (required fields take their `Field(examples=[...])`), a mapping with a `kind`, or
            a plug-in file that defines one schedule.
        phases: Optimizer steps and global batch sizes to try.

    Returns:
        What was checked.

    Raises:
        ContractError: an AssertionError; a promise is broken. The message lists all that are, and what to do.
        UsageError: it is no schedule.

    Example:
        >>> check_schedule({"kind": "interleaved", "compressor": "heavy", "full_share": "1/10"})
    """
    spec = component_of(schedule, ScheduleSpec, "check_schedule")  # type: ignore[type-abstract]  # it is only named
    contract = Contract(spec.kind)
    check_spec(contract, spec)
    with contract.promise("variants() lists the names it uses, each once"):
        names = spec.variants()
        if not isinstance(names, tuple) or not names or not all(isinstance(name, str) and name for name in names):
            raise Broken(f"it returned {shorten(names)}; return a tuple of names of variants, at least one")
        if len(set(names)) < len(names):
            raise Broken(f"it returned {names}; list each name once")
    tables = []
    with contract.promise("compile() gives a table for a phase that is long enough, else a ValueError"):
        reasons = []
        for steps, batch in phases:
            try:
                tables.append((steps, batch, spec.compile(steps, batch)))
            except ValueError as error:
                reasons.append(f"{steps} steps of {batch}: {error}")
        if not tables:
            raise Broken(
                f"no phase can be compiled: {'; '.join(reasons)}; give a spec that fits one, or other `phases`"
            )
        if wrong := [table for *_, table in tables if not isinstance(table, StageTable)]:
            raise Broken(f"it returned {shorten(wrong[0])}; return a plugin.StageTable")
    with contract.promise("a phase of one step is compiled, or refused by a ValueError"):
        try:
            spec.compile(1, 1)
        except ValueError as error:
            if not str(error):
                raise Broken("the ValueError says nothing; say how many steps are needed") from None
    if not contract.broken:
        _check_tables(contract, spec, tables)
    return contract.report()


def _check_tables(contract: Contract, spec: ScheduleSpec, tables: Sequence[tuple[int, int, StageTable]]) -> None:
    with contract.promise("compile() is a pure function: called again, of an equal spec, it gives the same"):
        state = random.getstate()
        again = type(spec).model_validate(spec.model_dump(mode="json"))
        for steps, batch, table in tables:
            for number, one in enumerate((spec, again)):
                random.seed(number)  # a draw that is not seeded by the spec would show
                if one.compile(steps, batch) != table:
                    raise Broken(
                        f"two tables of {steps} steps differ; draw from a hash of (a seed of the spec, step) and read "
                        "neither a clock nor a global random state"
                    )
        random.setstate(state)
    with contract.promise("actions cover every step, equal neighbours merged"):
        for steps, _, table in tables:
            _check_actions(table, steps)
    with contract.promise("every variant is one that variants() lists, or derived from one"):
        for *_, table in tables:
            _check_names(table, set(spec.variants()))
    with contract.promise("stage runs end in rising order, the last with the phase"):
        for steps, _, table in tables:
            ends = table.stage_ends
            if ends and (ends[-1] != steps or not all(one < other for one, other in pairwise((0, *ends)))):
                raise Broken(
                    f"of {steps} steps stage_ends is {shorten(ends)}; give rising steps up to {steps}, or () for where "
                    "actions end"
                )


def _check_names(table: StageTable, named: set[str]) -> None:
    if unknown := sorted({base for base, _ in table.derived.values()} - named):
        raise Broken(f"derived variants come from {', '.join(unknown)}, which variants() does not list")
    used = {name for *_, name in table.actions} | {table.final, *table.teachers}
    used |= {teaching.teacher for teaching in table.teachers.values()}
    if unknown := sorted(used - named - set(table.derived)):
        raise Broken(f"it uses {', '.join(unknown)}, which variants() does not list and the table does not derive")


def _check_actions(table: StageTable, steps: int) -> None:
    done = 0
    for action in table.actions:
        first, last, _ = action
        if type(first) is not int or type(last) is not int or first >= last:
            raise Broken(f"the action {action} is no stretch (first, last, variant) of whole steps, 0-based, half open")
        if first != done:
            how = "no action" if first > done else "two actions"
            raise Broken(f"of {steps} steps step {min(first, done)} has {how}: {action}")
        done = last
    if done != steps:
        raise Broken(f"the actions end at step {done} of {steps}; the last action ends with the phase")
    if table.actions != merge_actions(list(table.actions)):
        raise Broken(f"of {steps} steps equal neighbours are two actions; make them one with plugin.merge_actions")

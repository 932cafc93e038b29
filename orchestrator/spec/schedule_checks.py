"""Schedules against the phase and the model: every stage starts, and every variant a schedule makes fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.spec.components import ScheduleSpec, StageTable, derive
from orchestrator.spec.model_facts import ModelFacts
from orchestrator.spec.node import Path
from orchestrator.spec.phase import PhaseSpec, PhasesSpec
from orchestrator.spec.steps import known_steps
from orchestrator.spec.variant_checks import Finding, check_variant

ANY_STEPS = 1000


def check_schedule(
    phase: PhaseSpec,
    path: Path,
    data: Any,
    schedules: Mapping[str, Any] | None,
    variants: Mapping[str, Any] | None,
    facts: ModelFacts | None,
) -> Iterator[Finding]:
    """Return every stage of the phase's schedule starts, the stages fill the phase, and what it derives fits the model.

    Where the number of steps is not known yet, only what the schedule derives is checked.
    """
    schedule: Any = phase.schedule
    where: Path = (*path, "schedule")
    if isinstance(schedule, str):
        where = ("schedules", schedule) if schedules and schedule in schedules else where
        schedule = schedules.get(schedule) if schedules else None
    if not isinstance(schedule, ScheduleSpec):
        return
    steps = known_steps(phase, data)
    try:
        table = schedule.compile(steps or ANY_STEPS, phase.global_batch_size)
    except ValueError as error:
        if steps is not None:
            yield Finding(where, f"{error}, of the {steps} steps of phases.{path[-1]}")
        return
    yield from _check_derived(table, where, variants or {}, facts)


def _check_derived(
    table: StageTable, where: Path, variants: Mapping[str, Any], facts: ModelFacts | None
) -> Iterator[Finding]:
    """Return the first value that does not fit; those after it would say the same."""
    for name, (base, changes) in table.derived.items():
        if base not in variants:
            return  # told where names are checked
        try:
            points = derive(variants[base], changes)
        except ValueError as error:
            yield Finding(where, f"`{name}`: {error}")
            return
        found = next(check_variant(points, where, facts), None)
        if found is not None:
            yield Finding(where, f"`{name}`: {found.message}", found.allowed, found.hint)
            return


def check_learning(
    phase: PhaseSpec, path: Path, schedules: Mapping[str, Any], variants: Mapping[str, Any], notices: list[str]
) -> Iterator[Finding]:
    """Return a phase that trains compressors alone uses one that learns; one that learns and does not train is
    noted.
    """
    learns = [name for name in _used(phase, schedules) if any(point.learns for point in variants.get(name, ()))]
    if set(phase.train) == {"compressor"} and not learns:
        hint = "use a variant that learns, or train another part"
        yield Finding((*path, "train"), "nothing trains: no variant of the phase's schedule learns", None, hint)
    if learns and "compressor" not in phase.train:
        notices.append(
            f"phases.{path[-1]}.train: {', '.join(learns)} learns, but `compressor` does not train; it stays as it was "
            "drawn from the seed"
        )


def _used(phase: PhaseSpec, schedules: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the variants a phase uses."""
    schedule: Any = phase.schedule
    if isinstance(schedule, str):
        schedule = schedules.get(schedule, schedule)
    return schedule.variants() if isinstance(schedule, ScheduleSpec) else (schedule,)


def check_tested_variants(
    evaluate: Mapping[str, Any],
    phases: PhasesSpec,
    schedules: Mapping[str, Any],
    variants: Mapping[str, Any],
    num_layers: int | None,
) -> Iterator[Finding]:
    """Return a learned method can be tested only where some phase uses it: else there are no weights to test."""
    used = [phase for phase in (phases.pretrain, phases.finetune) if phase is not None]
    if num_layers is None or any(phase.start_from is not None for phase in used):
        return
    names = [name for phase in used for name in _used(phase, schedules)]
    known = {module for name in names for module in _modules(variants.get(name, ()), num_layers)}
    for key, evaluation in evaluate.items():
        for index, name in enumerate(evaluation.under):
            if not known.issuperset(_modules(variants.get(name, ()), num_layers)):
                message = f"`{name}` learns, but no phase uses it: there is nothing to test"
                yield Finding(("evaluate", key, "under", index), message, "variants that the schedules use")


def _modules(points: Any, num_layers: int) -> set[str]:
    return {name for point in points if (name := point.module_name(num_layers)) is not None}

"""Variants and schedules against the model and the phase: places, needs, amounts; every stage starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from orchestrator.errors import LlavoltaError
from orchestrator.spec.budgets import solve_layer_average
from orchestrator.spec.components import (
    AMOUNTS,
    FULL,
    CompressorSpec,
    Grid,
    ScheduleSpec,
    StageTable,
    adapts,
    adds_for_good,
    adds_tokens,
    cannot_follow,
    derive,
    text_only_problem,
)
from orchestrator.spec.model_facts import ModelFacts
from orchestrator.spec.phase import PhaseSpec, PhasesSpec, known_steps
from orchestrator.spec.sweep import combinations
from orchestrator.spec.yaml.node import Path
from orchestrator.spec.yaml.validation_errors import Finding

ANY_STEPS = 1000


def schedule_of(phase: PhaseSpec, schedules: Mapping[str, Any]) -> ScheduleSpec | str:
    """Return what a phase follows: a schedule, or a variant's name."""
    return schedules.get(phase.schedule, phase.schedule) if isinstance(phase.schedule, str) else phase.schedule


def used_variants(phase: PhaseSpec, schedules: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the variants a phase uses."""
    schedule = schedule_of(phase, schedules)
    return schedule.variants() if isinstance(schedule, ScheduleSpec) else (schedule,)


def check_schedule(
    phase: PhaseSpec,
    path: Path,
    data: Any,
    schedules: Mapping[str, Any] | None,
    variants: Mapping[str, Any] | None,
    facts: ModelFacts | None,
    notices: list[str],
    complete: bool,
) -> Iterator[Finding]:
    """Check that every stage of a schedule starts, that they fill the phase, and that derived variants fit the model.

    Where the number of steps is not known yet, only the names it uses and what it derives are checked; the names
    only where the experiment is `complete`, since an entry with errors of its own is missing here.
    """
    schedule, where = schedule_of(phase, schedules or {}), (*path, "schedule")
    if isinstance(phase.schedule, str):
        where = ("schedules", phase.schedule)
    if not isinstance(schedule, ScheduleSpec):
        return
    steps = known_steps(phase, data)
    try:
        table = schedule.compile(steps or ANY_STEPS, phase.global_batch_size)
        problem = table.problem(steps) if steps is not None else None
        remarks = schedule.remarks(steps) if steps is not None else []
    except ValueError as error:
        if steps is not None:
            yield Finding(where, f"{error}, of the {steps} steps of phases.{path[-1]}")
        return
    except Exception as error:  # a plug-in's own mistake
        failed = f"{type(error).__name__}: {error}"
        yield Finding(where, f"{schedule.kind} cannot be divided into {steps or ANY_STEPS} steps: {failed}")
        return
    if problem is not None:
        hint = f"its compile() is wrong for phases.{path[-1]}: `llavolta check` tests it"
        yield Finding(where, f"{schedule.kind}: {problem}", None, hint)
        return
    notices += [
        f"{'.'.join(map(str, where))} ({schedule.kind}), {steps} steps of phases.{path[-1]}: {text}" for text in remarks
    ]
    if complete:
        yield from _check_table_names(schedule, table, where, variants or {})
    yield from _check_derived(table, where, variants or {}, facts)


def _check_table_names(
    schedule: ScheduleSpec, table: StageTable, where: Path, variants: Mapping[str, Any]
) -> Iterator[Finding]:
    """Check that the names it uses beside those it lists, which are checked with the others, are variants."""
    used = dict.fromkeys([*(name for *_, name in table.actions), table.final])
    used |= dict.fromkeys(teaching.teacher for teaching in table.teachers.values())
    known = [*variants, FULL]
    for name in used:
        if name not in known and name not in table.derived and name not in schedule.variants():
            yield Finding(where, f"{schedule.kind} uses `{name}`: there is no such variant", ", ".join(known))


def _check_derived(
    table: StageTable, where: Path, variants: Mapping[str, Any], facts: ModelFacts | None
) -> Iterator[Finding]:
    """Return the first value that does not fit; those after it would say the same."""
    for name, (base, changes) in table.derived.items():
        if not changes:
            continue
        if base not in variants:
            return  # reported where names are checked
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
    """Check that a phase that trains compressors alone uses one that learns; note untrained ones that learn."""
    learns = [name for name in used_variants(phase, schedules) if any(point.learns for point in variants.get(name, ()))]
    if set(phase.train) == {"compressor"} and not learns:
        hint = "use a variant that learns, or train another part"
        yield Finding((*path, "train"), "nothing trains: no variant of the phase's schedule learns", None, hint)
    if learns and "compressor" not in phase.train:
        notices.append(
            f"phases.{path[-1]}.train: {', '.join(learns)} learns, but `compressor` does not train; it stays as it was "
            "drawn from the seed"
        )


def check_matched_cost(
    phase: PhaseSpec, path: Path, schedules: Mapping[str, Any], variants: Mapping[str, Any]
) -> Iterator[Finding]:
    """Check that neither side of `match_train_tflops` costs an amount that only the images tell."""
    if phase.match_train_tflops is None:
        return
    matched = phase.model_copy(update={"schedule": phase.match_train_tflops})
    for side in (phase, matched):
        for name in used_variants(side, schedules):
            if adapts(variants.get(name, ())):
                message = (
                    f"what `{name}` costs is known only as the most: how many tokens it leaves depends on the image; "
                    "equal costs cannot be promised"
                )
                hint = "give max_steps, or max_train_tflops, which it will not exceed"
                yield Finding((*path, "match_train_tflops"), message, None, hint)
                return


def check_tested_variants(
    evaluate: Mapping[str, Any],
    phases: PhasesSpec,
    schedules: Mapping[str, Any],
    variants: Mapping[str, Any],
    facts: ModelFacts | None,
) -> Iterator[Finding]:
    """Check that each learned method under test is used by some phase: else there are no weights to test."""
    used = phases.by_name.values()
    if facts is None or any(phase.start_from is not None for phase in used):
        return
    names = [name for phase in used for name in used_variants(phase, schedules)]
    known = {module for name in names for module in _modules(variants.get(name, ()), facts)}
    for key, evaluation in evaluate.items():
        for index, name in enumerate(evaluation.under):
            if isinstance(name, str) and not known.issuperset(_modules(variants.get(name, ()), facts)):
                message = f"`{name}` learns, but no phase uses it: there is nothing to test"
                yield Finding(("evaluate", key, "under", index), message, "variants that the schedules use")


def check_sweeps(
    evaluate: Mapping[str, Any],
    variants: Mapping[str, Any] | None,
    facts: ModelFacts | None,
    data: Mapping[str, Any] | None,
) -> Iterator[Finding]:
    """Check that the model can run under each combination of a sweep, and that none has another variant's name."""
    for name, evaluation in evaluate.items():
        found: dict[Finding, None] = {}
        for number, sweep in enumerate(evaluation.under):
            if isinstance(sweep, str):
                continue
            path: Path = ("evaluate", name, "under", number)
            for each in combinations(sweep):
                point = each.point()
                if (own := each.name(point)) in (variants or ()):
                    message = f"`{own}` of this sweep is also a variant under `compressors`; rename that one"
                    found[Finding(path, message)] = None
                for finding in check_variant((point,), (), facts, data):
                    found[replace(finding, path=(*path, *each.place(str(finding.path[-1]))))] = None
        yield from found


def _modules(points: Any, facts: ModelFacts) -> set[str]:
    names = (point.module_name(facts.num_layers, facts.vision_depth) for point in points)
    return {name for name in names if name is not None}


_NEEDS = {
    "cls": "a CLS token that attends to the tokens of an image, which {model} does not have",
    "pixels": "a vision tower that takes images of another size, which {model} does not have",
}


def check_variant(
    points: Any, path: Path, facts: ModelFacts | None, data: Mapping[str, Any] | None = None
) -> Iterator[Finding]:
    """Check that points are in order of depth, at layers the model has, with what they need and possible amounts.

    Where points act across frames, some set of `data` must have videos; None leaves that out.
    """
    grid: Grid | None = facts.visual_grid if facts is not None else None
    last, place, ordered = (-1, -1), "", True
    for index, point in enumerate(points):
        where: Path = (*path, index)
        yield from _check_place(point, where, facts)
        depth = _depth(point, facts)
        if depth is not None:
            if depth < last or (depth == last and point.place != "projector"):
                ordered = False
                message = f"acts at {_place(point, depth)}, not after the point before it at {place}"
                allowed = f"more than {last[1]}" if place.startswith("layer") else f"behind {place}"
                yield Finding((*where, "layer"), message, allowed, "order the points by depth")
            if depth >= last:
                last, place = depth, _place(point, depth)
        if point.across_frames and data is not None and all(one.has_videos() is False for one in data.values()):
            message = f"{point.kind} acts across the frames of a video, and no data here has videos"
            yield Finding((*where, "kind"), message, None, "give data with videos, or a method that acts on images")
        if index and adds_tokens(point) and not adds_for_good(point):
            message = f"{point.kind} adds tokens at the decoder's input, which the points before it would mix or drop"
            yield Finding((*where, "kind"), message, None, "let it be the first point of the variant")
        if index and any(map(adds_for_good, points[:index])):
            message = f"{point.kind} would mix or drop the tokens that a point before it adds for good"
            yield Finding((*where, "kind"), message, None, "let the point that adds tokens be the variant's last")
        if problem := cannot_follow(point, points[:index]):
            yield Finding((*where, problem[0]), problem[1])
        if facts is not None and _modules([point], facts) & _modules(points[:index], facts):
            message = f"{point.kind} and a point before it would share one learned module, called twice a forward"
            yield Finding((*where, "layer"), message, None, "let them act at different layers, or in different shapes")
        if point.layer_average_tokens is not None and any(one.takes_amount for one in points if one is not point):
            message = "is for a variant of one amount; give the other amounts instead"
            yield Finding((*where, "layer_average_tokens"), message)
            return
        if grid is not None and facts is not None:
            finding, grid = _amount(point, where, grid, facts, points)
            if finding is not None:
                yield finding
    known = [depth for point in points if (depth := _depth(point, facts)) is not None]
    if ordered and len(known) == len(points):
        layers = [depth[1] if point.place == "decoder" else 0 for point, depth in zip(points, known, strict=True)]
        if unseen := text_only_problem(points, layers):
            yield Finding((*path, unseen[0], "kind"), unseen[1])


def _check_place(point: CompressorSpec, where: Path, facts: ModelFacts | None) -> Iterator[Finding]:
    looks = sorted({"queries", "keys"} & set(point.needs))
    if point.place not in point.points:
        places = {"decoder": "a decoder layer", "projector": "projector", "tower": "tower:N"}
        allowed = " or ".join(text for place, text in places.items() if place in point.points)
        yield Finding((*where, "layer"), f"{point.kind} does not act at the {_NAMES[point.place]}", allowed)
    elif looks and (point.place == "projector" or point.layer == 0):
        message = f"{point.kind} looks at the {' and '.join(looks)} of the layer before it, and there is none"
        yield Finding((*where, "layer"), message, "a decoder layer from 1 on")
    elif point.place == "tower":
        yield from _check_tower(point, where, facts)
    if facts is None:
        return
    first, layer = facts.first_layer, point.layer_index(facts.num_layers)
    deep = f"{facts.model_type} adds visual features up to layer {first - 1} (DeepStack)"
    if point.place == "decoder" and "decoder" in point.points and layer >= facts.num_layers:
        message = f"the model has {facts.num_layers} decoder layers, 0 to {facts.num_layers - 1}"
        yield Finding((*where, "layer"), message, f"0 to {facts.num_layers - 1}, or a share of the depth such as 50%")
    elif layer < first and (point.place == "projector" or "decoder" in point.points):
        yield Finding((*where, "layer"), deep, f"a decoder layer from {first} on")
    if first and (adds_tokens(point) or point.enters_late):
        does = "adds tokens at the decoder's input" if adds_tokens(point) else "keeps images out of the first layers"
        yield Finding((*where, "kind"), f"{point.kind} {does}, but {deep}, which must find the tokens it knows")
    for need in point.needs:
        if need in _NEEDS and need not in facts.offers:
            reason = _NEEDS[need].format(model=f"this {facts.model_type}")
            yield Finding((*where, "kind"), f"{point.kind} needs {reason}")


_NAMES = {"tower": "vision tower", "projector": "projector", "decoder": "decoder"}


def _check_tower(point: CompressorSpec, where: Path, facts: ModelFacts | None) -> Iterator[Finding]:
    """Check a point inside the vision tower against the tower's layers, as far as these are known."""
    layer = point.tower_index(facts.vision_depth if facts is not None else 0)
    knows_layer = facts is not None or not str(point.layer).endswith("%")
    before = not getattr(point, "inside_layer", False)
    if layer == 0 and knows_layer and before and "tower_keys" in point.needs:
        message = f"{point.kind} looks at the keys of the tower layer before it, and there is none"
        yield Finding((*where, "layer"), message, "tower:1 or more")
    if point.adaptive:
        message = (
            f"{point.kind} leaves another number of tokens of each image, which run through the tower in one batch"
        )
        yield Finding((*where, "layer"), message, "the projector or a decoder layer")
    if facts is None or layer is None:
        return
    if not facts.tower_points:
        message = f"no compressor acts inside the vision tower of this {facts.model_type}: {facts.tower_refusal}"
        yield Finding((*where, "layer"), message, "the projector or a decoder layer")
    elif layer >= facts.tower_points:
        message = (
            f"{point.layer} is layer {layer} of {facts.vision_depth} of the vision tower, and the model takes what "
            f"layer {facts.tower_points - 1} gives"
        )
        yield Finding((*where, "layer"), message, f"tower:0 to tower:{facts.tower_points - 1}")


def _depth(point: CompressorSpec, facts: ModelFacts | None) -> tuple[int, int] | None:
    """Return what a point's place is sorted by; None where a share's layer is not known."""
    if facts is not None:
        return point.sort_key(facts.num_layers, facts.vision_depth)
    return None if str(point.layer).endswith("%") else point.sort_key(0, 0)


def _place(point: CompressorSpec, depth: tuple[int, int]) -> str:
    names = {"tower": f"tower layer {depth[1]}", "projector": "the projector", "decoder": f"layer {depth[1]}"}
    return names[point.place]


def _amount(
    point: CompressorSpec, where: Path, grid: Grid, facts: ModelFacts, points: Any
) -> tuple[Finding | None, Grid | None]:
    amount = next((name for name in AMOUNTS if getattr(point, name) is not None), "kind")
    if point.stride is not None and point.stride > grid.tokens:
        message = f"a stride of {point.stride} is more than the {grid.tokens} visual tokens there are"
        return Finding((*where, amount), message, f"1 to {grid.tokens}"), None
    try:
        if point.layer_average_tokens is not None:
            if any(one.layer_index(facts.num_layers) >= facts.num_layers for one in points):
                return None, None  # reported as a layer the model does not have
            assert facts.visual_grid is not None
            point = solve_layer_average(point, facts.num_layers, facts.visual_grid, points)
        return None, point.kept_grid(grid)
    except (ValueError, LlavoltaError) as error:
        return Finding((*where, amount), str(error)), None
    except Exception as error:  # a plug-in's own mistake
        failed = f"{type(error).__name__}: {error}"
        message = f"{point.kind} cannot say how many of {grid.height} x {grid.width} tokens it keeps: {failed}"
        return Finding((*where, "kind"), message), None

"""Trials of a search: recipes drawn from its space by an object with Optuna's `suggest_*`, their cells, and checks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import combinations, groupby, pairwise, product
from typing import Any, Protocol

from pydantic import ValidationError

from orchestrator import registry
from orchestrator.errors import ErrorDetail, SpecError
from orchestrator.spec.budgets import layer_average
from orchestrator.spec.checks.scheduler import check_scheduler
from orchestrator.spec.components import FINAL, FULL, CompressorSpec, EvaluationSpec, Grid, adapts
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.grid import SECTIONS, Assignment, Setting
from orchestrator.spec.loaded import LoadedExperiment, ResolvedCell
from orchestrator.spec.model_facts import model_facts
from orchestrator.spec.phase import PHASES
from orchestrator.spec.promotion import check_promote
from orchestrator.spec.search import (
    ChoiceSpec,
    IntUniformSpec,
    SearchSpec,
    SpaceEntrySpec,
    StagedSpaceSpec,
    UniformSpec,
    measured_by,
)
from orchestrator.spec.sweep import swept_names
from orchestrator.spec.yaml.node import Mark, Node, node_of
from orchestrator.spec.yaml.schema import find_path
from orchestrator.spec.yaml.validation_errors import check_path, error_at, explain, locate, name_error, unknown_name

_SIDES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
"""Sides of the squares of visual tokens for which an order of variants must be the same."""


def trial_name(number: int) -> str:
    """Return the name of a trial, and of its cell where it has one seed."""
    return f"trial-{number:03d}"


def reference_path(spec: ExperimentSpec) -> str:
    """Return the dotted path of the schedule that constraints set to what they compare with: the last phase's."""
    return f"phases.{list(spec.phases.by_name)[-1]}.schedule"


def trial_cells(
    loaded: LoadedExperiment, name: str, values: Mapping[str, Any], seeds: Sequence[int] | None = None
) -> tuple[ResolvedCell, ...]:
    """Return one cell a seed, or one.

    Args:
        loaded: The experiment; its own cells are the base with each seed.
        name: The cell's where there is one seed, else the beginning of its name.
        values: Dotted path to a value as the file would write it.
        seeds: Seeds; None takes those of the matrix.

    Raises:
        SpecError: a value cannot stand in its place.
    """
    mark = Mark(str(loaded.path))
    tree = node_of(loaded.tree, mark)
    for path, value in values.items():
        tree = tree.set_at(find_path(tree, path), node_of(value, mark))
    try:
        spec = ExperimentSpec.model_validate(tree.plain()).model_copy(update={"search": None})
    except ValidationError as error:
        raise SpecError(explain(error.errors(), tree)) from error
    axes = {path: summary(value) for path, value in values.items()}
    found = seeds or [cell.spec.seed for cell in loaded.cells if cell.axes]
    if not found:
        return (ResolvedCell(name, axes, spec),)
    return tuple(
        ResolvedCell(f"{name},seed={seed}", axes | {"seed": seed}, spec.model_copy(update={"seed": seed}))
        for seed in found
    )


class Draws(Protocol):
    """What draws: an Optuna trial, or a corner of the space for validation."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of some values."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Return a whole number, both ends included."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a number between two bounds."""


def draw(trial: Draws, search: SearchSpec, layer_tokens: Mapping[str, Fraction]) -> dict[str, Any]:
    """Return one recipe: dotted path to a value as a file would write it.

    Args:
        trial: Draws single values.
        search: The search.
        layer_tokens: What `variant_layer_tokens` found.
    """
    values: dict[str, Any] = {}
    for path, entry in search.space.items():
        if any(other not in values or values[other] not in _wanted(entry, other) for other in entry.when):
            continue
        if isinstance(entry, StagedSpaceSpec):
            values[path] = _schedule(trial, path, entry, layer_tokens)
        elif isinstance(entry, ChoiceSpec):
            values[path] = _choice(trial, path, entry)
        else:
            values[path] = _number(trial, path, entry)
    return values


def _wanted(entry: SpaceEntrySpec, path: str) -> tuple[Any, ...]:
    """Return the values of another path with which an entry is drawn."""
    wanted = entry.when[path]
    return wanted if isinstance(wanted, tuple) else (wanted,)


def _choice(trial: Draws, path: str, entry: ChoiceSpec) -> Any:
    if any(isinstance(value, list | dict) for value in entry.values):  # Optuna keeps plain values only
        return entry.values[trial.suggest_categorical(path, list(range(len(entry.values))))]
    return trial.suggest_categorical(path, entry.values)


def _number(trial: Draws, path: str, entry: UniformSpec | IntUniformSpec) -> float:
    is_log = entry.kind.startswith("log")
    if isinstance(entry, IntUniformSpec):
        return trial.suggest_int(path, entry.low, entry.high, step=entry.step or 1, log=is_log)
    if entry.step is None:
        return trial.suggest_float(path, entry.low, entry.high, log=is_log)
    # By the number of steps, in decimals: 0.1 three times is 0.3, as a file would write it.
    low, step = Fraction(str(entry.low)), Fraction(str(entry.step))
    return float(low + step * trial.suggest_int(path, 0, int((Fraction(str(entry.high)) - low) / step)))


class GridTooLargeError(ValueError):
    """The space has more recipes than a grid may have."""


def grid(
    search: SearchSpec, layer_tokens: Mapping[str, Fraction], most: int = 20_000
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each recipe of a space without continuous numbers once: what is drawn for it by parameter, and its values.

    Args:
        search: The search.
        layer_tokens: What `variant_layer_tokens` found.
        most: Draws at most, repeated recipes included.

    Raises:
        GridTooLargeError: there are more.
    """
    odometer, seen = _Odometer(), set[str]()
    for _ in range(most):
        values = draw(odometer, search, layer_tokens)
        if (recipe := repr(values)) not in seen:
            seen.add(recipe)
            yield odometer.drawn(), values
        if not odometer.advance():
            return
    raise GridTooLargeError


class _Odometer:
    """Draws all combinations, one after the other: the last parameter turns fastest."""

    def __init__(self) -> None:
        self._wheels: list[tuple[str, Sequence[Any], int]] = []
        self._at = 0

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        if self._at == len(self._wheels):
            self._wheels.append((name, choices, 0))
        _, values, turned = self._wheels[self._at]
        self._at += 1
        return values[turned]

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return int(self.suggest_categorical(name, range(low, high + 1, step)))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        raise AssertionError(f"{name} is continuous")  # refused by validation

    def drawn(self) -> dict[str, Any]:
        return {name: values[turned] for name, values, turned in self._wheels}

    def advance(self) -> bool:
        """Turn to the next combination; return False after the last."""
        self._at = 0
        while self._wheels:
            name, values, turned = self._wheels.pop()
            if turned + 1 < len(values):
                self._wheels.append((name, values, turned + 1))
                return True
        return False


def variant_layer_tokens(spec: ExperimentSpec) -> dict[str, Fraction]:
    """Return the visual tokens as the mean over layers, of each variant the staged spaces name.

    Where images vary in size they are sums over squares of several sizes, which only give the order.

    Raises:
        ValueError: an order from heavy to light is asked for, and the model's sizes are not known here, or the order
            depends on the size of an image.
    """
    assert spec.search is not None
    staged = [entry for entry in spec.search.space.values() if isinstance(entry, StagedSpaceSpec)]
    if not any(entry.heavy_to_light for entry in staged):
        return {}
    facts = model_facts(spec.model.model_name_or_path, spec.model.revision)
    if facts is None:
        raise ValueError(
            "which variant compresses more cannot be determined: the visual tokens of "
            f"{spec.model.model_name_or_path} are not known here; set heavy_to_light: false"
        )
    names = dict.fromkeys(name for entry in staged for name in (*entry.variants, entry.last) if name is not None)
    if unsure := [name for name in names if adapts(spec.compressors.get(name, ()))]:
        raise ValueError(
            f"which variant compresses more cannot be determined: how many tokens {', '.join(unsure)} leaves depends "
            "on the image; set heavy_to_light: false"
        )
    grid, layers = facts.visual_grid, facts.num_layers
    variants = {name: () if name == FULL else spec.compressors[name] for name in names}
    if grid is not None:
        return {name: layer_average(points, layers, grid) for name, points in variants.items()}
    return _order_at_any_size(variants, layers)


def _order_at_any_size(variants: Mapping[str, Sequence[CompressorSpec]], num_layers: int) -> dict[str, Fraction]:
    by_size = []
    for side in _SIDES:
        try:
            grid = Grid(side, side)
            by_size.append({name: layer_average(points, num_layers, grid) for name, points in variants.items()})
        except ValueError:
            continue  # an image too small for an amount
    for one, other in combinations(variants, 2):
        signs = {(found[one] > found[other]) - (found[one] < found[other]) for found in by_size}
        if not by_size or {1, -1} <= signs:
            raise ValueError(
                f"which of {one} and {other} compresses more depends on the size of an image; set heavy_to_light: false"
            )
    return {name: sum((found[name] for found in by_size), Fraction(0)) for name in variants}


def before_last(entry: StagedSpaceSpec, layer_tokens: Mapping[str, Fraction]) -> tuple[str, ...]:
    """Return the variants a stage before the last one may have, heaviest first where the order matters."""
    if not entry.heavy_to_light:
        return entry.variants
    found = sorted(entry.variants, key=layer_tokens.__getitem__)
    return tuple(name for name in found if entry.last is None or layer_tokens[name] <= layer_tokens[entry.last])


def inner_boundaries(entry: StagedSpaceSpec) -> int:
    """Return the number of places between a phase's ends where a stage may end."""
    return -int(-1 // entry.boundaries) - 1


def _schedule(trial: Draws, path: str, entry: StagedSpaceSpec, layer_tokens: Mapping[str, Fraction]) -> dict[str, Any]:
    """Return a schedule of `stages`.

    What is drawn is sorted into an order instead of being drawn again until it has one, so that every parameter has
    one fixed range, which multivariate TPE needs.
    """
    count: int = trial.suggest_categorical(f"{path}.num_stages", entry.num_stages)
    spare = inner_boundaries(entry) - (count - 1)
    drawn = sorted(trial.suggest_int(f"{path}.boundary_{i}_of_{count - 1}", 0, spare) for i in range(1, count))
    # Of sorted numbers that may be equal, adding 0, 1, 2, ... makes every choice of different ones.
    ends = [(number + i) * entry.boundaries for i, number in enumerate(drawn, 1)]
    names = before_last(entry, layer_tokens)
    free = count if entry.last is None else count - 1
    chosen = [names[trial.suggest_int(f"{path}.variant_{i}", 0, len(names) - 1)] for i in range(1, free + 1)]
    if entry.heavy_to_light:
        chosen.sort(key=layer_tokens.__getitem__)
    if entry.last is not None:
        chosen.append(entry.last)
    return stages(chosen, ends)


def stages(variants: Sequence[str], ends: Sequence[Fraction]) -> dict[str, Any]:
    """Return a schedule of `stages` as a file would write it; equal neighbours are one stage.

    Args:
        variants: One a stage.
        ends: Where each stage but the last one ends, as a share of the phase.
    """
    cuts = [Fraction(0), *ends, Fraction(1)]
    found = []
    lengths = zip(variants, (end - start for start, end in pairwise(cuts)), strict=True)
    for name, group in groupby(lengths, key=lambda stage: stage[0]):
        found.append({"share": str(sum(length for _, length in group)), "compressor": name})
    return {"kind": "stages", "stages": found}


def summary(value: Any) -> Any:
    """Return a drawn value for people: a schedule as `heavy 1/4, wide 1/4, full`."""
    if not isinstance(value, dict) or "stages" not in value:
        return value
    *before, last = value["stages"]
    return ", ".join([*(f"{stage['compressor']} {stage['share']}" for stage in before), last["compressor"]])


BY_FORMULA = ("train_tflops", "visual_layer_tokens", "compression_ratio")
COSTS = (
    *BY_FORMULA, "train_seconds", "samples_per_second",
    "peak_memory_gib", *(f"{phase}/train_seconds" for phase in PHASES),
)  # fmt: skip


def check_search(root: Node) -> list[ErrorDetail]:
    """Check that a search proposes values of known paths for measured objectives, beside a grid of seeds alone."""
    errors: list[ErrorDetail] = []
    search = root.get("search")
    if search is None or not search.is_mapping:
        return errors
    errors += _check_grid(root)
    for name in search.entries("space"):
        path = check_path(root, name, ("search", "space", name), errors)
        if path is not None and path[0] not in SECTIONS:
            text = f"`{name}` cannot be searched: it is no part of a cell"
            errors.append(error_at(root, ("search", "space", name), text, "paths under " + ", ".join(SECTIONS)))
    errors += [*_check_conditions(root), *_check_algorithm(root, search), *check_scheduler(root), *check_promote(root)]
    for section in ("objectives", "constraints"):
        found = (_check_metric(root, section, name) for name in search.entries(section))
        errors += [error for error in found if error is not None]
    return errors


def tuned_on_test(spec: ExperimentSpec) -> list[str]:
    """Return a sentence for each objective that is measured on a test split."""
    found = []
    for objective in spec.search.objectives if spec.search is not None else ():
        entry = spec.evaluate.get((measured_by(objective) or ("",))[0])
        data = spec.data.get(entry.data) if entry is not None and entry.data is not None else None
        if entry is not None and str(getattr(data, "split", "")).startswith("test"):
            found.append(
                f"search.objectives.{objective}: it is measured on data.{entry.data}, a test split, so the search "
                "tunes on it, and its best score flatters; search on a split of its own, and test the best ones on this"
            )
    return found


def _check_grid(root: Node) -> Iterator[ErrorDetail]:
    for name in root.entries("matrix"):
        if name != "seed":
            message = "beside a search the matrix may hold only `seed`; put this axis into search.space"
            yield name_error(root, ("matrix", name), message, "seed")
    for name in root.entries("evaluate"):
        if root.at(("evaluate", name, "cells")) is not None:
            message = "beside a search every cell is tested: a trial is the mean over all of its seeds"
            yield error_at(root, ("evaluate", name, "cells"), message, hint="take it out")
    for key in ("zip", "include", "exclude", "controls"):
        if (node := root.get(key)) is not None and node.value:
            message = f"beside a search there is no `{key}`: its trials are proposed one by one"
            yield error_at(root, (key,), message, hint="take it out, or run it as a grid in a file of its own")


def _check_conditions(root: Node) -> Iterator[ErrorDetail]:
    """Check that what an entry is drawn with is a choice above it that has such a value."""
    above: dict[str, list[Any]] = {}
    for name, entry in root.entries("search", "space").items():
        for other, wanted in root.entries("search", "space", name, "when").items():
            where = ("search", "space", name, "when", other)
            if other not in above:
                message = f"`{other}` is no choice of plain values above `{name}` in the space"
                yield name_error(root, where, message, *unknown_name(other, list(above)))
                continue
            for value in wanted.plain() if wanted.is_list else [wanted.plain()]:
                if value not in above[other]:
                    yield error_at(root, where, f"`{other}` is never {value}", ", ".join(map(str, above[other])))
        found = entry.plain() if entry.is_mapping else {}
        values = found.get("values") if found.get("kind") == "choice" else None
        if isinstance(values, list) and not any(isinstance(value, list | dict) for value in values):
            above[name] = values


def _check_algorithm(root: Node, search: Node) -> Iterator[ErrorDetail]:
    """Check that no key of `algorithm` is of no use, and that there is more than nsga2's first generation."""
    node = search.get("algorithm")
    found = {} if node is None else node.plain()
    if not isinstance(found, dict):
        return
    kind, sampler, size = found.get("kind", "optuna"), found.get("sampler"), found.get("population_size")
    path = ("search", "algorithm")
    if kind == "grid" and found.get("prefer_shared"):
        message = "a grid has every recipe, and shares what there is to share"
        yield error_at(root, (*path, "prefer_shared"), message, hint="take it out")
    if sampler is not None and kind != "optuna":
        yield error_at(root, (*path, "sampler"), f"`kind: {kind}` has no sampler", hint="take one of them out")
    if sampler == "nsga2" and kind == "optuna":
        given = search.get("num_trials")
        trials = SearchSpec.model_fields["num_trials"].default if given is None else given.plain()
        size = 50 if size is None else size
        if isinstance(size, int) and isinstance(trials, int) and size >= trials:
            message = f"all {trials} trials would be the random first generation, which has {size}"
            hint = "give a smaller population_size, or more num_trials"
            yield error_at(root, (*path, "population_size"), message, f"less than num_trials, {trials}", hint)
    elif size is not None:
        yield error_at(root, (*path, "population_size"), "only `sampler: nsga2` has generations", hint="take it out")


def _check_metric(root: Node, section: str, name: str) -> ErrorDetail | None:
    phases = root.entries("phases")
    known = [f"cost/{cost}" for cost in COSTS if "/" not in cost or cost.split("/")[0] in phases]
    for entry, node in root.entries("evaluate").items():
        metrics, headline = _metrics(node)
        for under in _under(node):
            place = f"eval/{entry}" if under == FINAL else f"eval/{entry}/under_{under}"
            if metrics is None and name.startswith(f"{place}/") and not name.startswith(f"{place}/under_"):
                return None  # known once a trial has measured it
            known += [f"{place}/{metric}" for metric in metrics or headline]
    if any(fnmatchcase(name, metric) for metric in known):
        return None
    path = ("search", section, name)
    return name_error(root, path, "no trial would have this metric", *unknown_name(name, known))


def _metrics(entry: Node) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Return what an evaluation's kind can report, None where it does not say so, and its headline."""
    try:
        kind = registry.spec_class(registry.EVALUATIONS, entry.plain().get("kind"))
        return kind.metric_names, kind.headline
    except (AttributeError, ImportError, KeyError, TypeError):  # reported at the evaluation
        return None, EvaluationSpec.headline


def _under(entry: Node) -> list[Any]:
    under = entry.get("under")
    if under is None:
        return [FINAL]
    names: list[Any] = []
    for item in under.value if under.is_list else [under]:
        names += swept_names(item.plain()) if item.is_mapping else [item.value]
    return names


def space_corners(root: Node, spec: ExperimentSpec, errors: list[ErrorDetail]) -> list[Assignment]:
    """Return the recipes at the ends of every range and with each choice, to be checked like cells of a grid.

    Args:
        root: The tree.
        spec: The base, without errors.
        errors: Takes what keeps anything from being drawn.
    """
    if spec.search is None:
        return []
    bounds = [name for name, points in spec.compressors.items() if adapts(points)]
    wanted = [(section, name) for section in ("objectives", "constraints") for name in getattr(spec.search, section)]
    for section, name in wanted:
        if bounds and name.removeprefix("cost/") in BY_FORMULA:
            text = f"it is known only as a bound: how many tokens {', '.join(bounds)} leaves depends on the image"
            hint = "take cost/train_seconds, which is measured, or take the variant out of compressors"
            errors.append(error_at(root, ("search", section, name), text, hint=hint))
    try:
        layer_tokens = variant_layer_tokens(spec)
    except ValueError as error:
        errors.append(error_at(root, ("search", "space"), str(error)))
        return []
    before = len(errors)
    for path, entry in spec.search.space.items():
        if isinstance(entry, StagedSpaceSpec):
            errors += [error_at(root, ("search", "space", path, key), text) for key, text in _room(entry, layer_tokens)]
        elif not isinstance(entry, ChoiceSpec):
            is_grid = spec.search.algorithm.kind == "grid"
            errors += [error_at(root, ("search", "space", path, key), text) for key, text in _range(entry, is_grid)]
    if len(errors) > before:
        return []
    if spec.search.algorithm.kind == "grid":
        try:
            deque(grid(spec.search, layer_tokens), maxlen=0)
        except GridTooLargeError:
            message = "the space has more recipes than a grid may have"
            hint = "make it coarser, or take kind: optuna or random"
            errors.append(error_at(root, ("search", "algorithm", "kind"), message, hint=hint))
            return []
    choices = (
        entry.num_stages if isinstance(entry, StagedSpaceSpec) else getattr(entry, "values", (None,))
        for entry in spec.search.space.values()
    )
    corners = {}
    picks = range(max(map(len, choices)))
    for given in _conditions(spec.search):
        for pick, end in product(picks, (0, 1)):
            values = draw(_Corner(pick, end, given), spec.search, layer_tokens)
            corner = tuple(_setting(root, path, value) for path, value in values.items())
            corners[tuple(setting.key for setting in corner)] = corner
    return [*corners.values(), *_promoted(root, list(corners.values())), *_references(root, spec, errors)]


def _promoted(root: Node, corners: Sequence[Assignment]) -> list[Assignment]:
    """Return the corners as they would be run again, to be checked like others."""
    changes = _changes(root)
    return [(*corner, *changes) for corner in corners] if changes else []


def _changes(root: Node) -> Assignment:
    found = root.entries("search", "promote", "set")
    return tuple(
        Setting(find_path(root, name), node, ("search", "promote", "set", name)) for name, node in found.items()
    )


def _references(root: Node, spec: ExperimentSpec, errors: list[ErrorDetail]) -> Iterator[Assignment]:
    """Return the cells that constraints and promoted trials are compared with, to be checked like others."""
    search = spec.search
    assert search is not None
    known = [*spec.schedules, *spec.compressors, FULL]
    wanted: list[tuple[tuple[str, ...], str | None, Assignment]] = [
        (("search", "constraints", metric), constraint.reference, ())
        for metric, constraint in search.constraints.items()
    ]
    if search.promote is not None:
        wanted.append((("search", "promote", "baseline"), search.promote.baseline, _changes(root)))
    for where, reference, changes in wanted:
        if reference is None:
            continue
        if reference not in known:
            message = f"there is no schedule and no variant `{reference}` to compare with"
            errors.append(error_at(root, where, message, *unknown_name(reference, known)))
        elif not spec.phases.by_name:
            errors.append(error_at(root, where, "nothing is trained, so there is no schedule to compare with"))
        else:
            path = find_path(root, reference_path(spec))
            yield (*changes, Setting(path, node_of(reference, locate(root, where)[0]), where))


def _conditions(search: SearchSpec) -> list[dict[str, Any]]:
    """Return nothing given, and for each conditional entry what has to be drawn above for it to be drawn."""
    found: list[dict[str, Any]] = [{}]
    for entry in search.space.values():
        given: dict[str, Any] = {}
        waiting = [entry]
        while waiting:
            one = waiting.pop()
            given |= {path: _wanted(one, path)[0] for path in one.when if path not in given}
            waiting += [search.space[path] for path in one.when]
        if given and given not in found:
            found.append(given)
    return found


def _range(entry: UniformSpec | IntUniformSpec, is_grid: bool) -> Iterator[tuple[str, str]]:
    is_log = entry.kind.startswith("log")
    if entry.low > entry.high:
        yield "low", "`low` is more than `high`"
    elif is_log and entry.low <= 0:
        yield "low", "a logarithm needs a `low` above 0"
    elif is_log and entry.step is not None:
        yield "step", f"`{entry.kind}` has no steps; take it out, or list the values as a `choice`"
    elif entry.step is not None:
        steps = (Fraction(str(entry.high)) - Fraction(str(entry.low))) / Fraction(str(entry.step))
        if steps.denominator != 1:
            yield "step", f"steps of {entry.step} from {entry.low} never reach {entry.high}"
    elif is_grid and isinstance(entry, UniformSpec):
        yield "kind", "a grid has no continuous numbers; give a `step`, or list the values as a `choice`"


def _room(entry: StagedSpaceSpec, layer_tokens: Any) -> Iterator[tuple[str, str]]:
    most = inner_boundaries(entry) + 1
    for count in entry.num_stages:
        if count > most:
            yield "num_stages", f"{count} stages do not fit: with boundaries of {entry.boundaries} there are {most}"
    if not before_last(entry, layer_tokens) and (max(entry.num_stages) > 1 or entry.last is None):
        yield "variants", f"none of them compresses at least as much as the last stage, {entry.last}"


def _setting(root: Node, name: str, value: Any) -> Setting:
    where = ("search", "space", name)
    return Setting(find_path(root, name), node_of(value, locate(root, where, key=True)[0]), where)


class _Corner:
    """Draws the lowest or the highest of every range, a given one of every choice, and variants in turn.

    In turn, because equal neighbours would be one stage, and that the shortest stage starts would not be seen.
    """

    def __init__(self, pick: int, end: int, given: Mapping[str, Any]) -> None:
        self._pick, self._end, self._given, self._variants = pick, end, given, 0

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._given[name] if name in self._given else choices[self._pick % len(choices)]

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        if ".variant_" not in name:
            return (low, high)[self._end]
        self._variants += 1
        return low + (self._variants - 1) % (high - low + 1)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return (low, high)[self._end]

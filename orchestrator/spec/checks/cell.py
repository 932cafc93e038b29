"""Checks across a cell's parts: the names they refer to, lengths, batches, rates, stages, layers and amounts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from orchestrator import registry
from orchestrator.errors import ErrorDetail
from orchestrator.spec.checks.compression import (
    check_learning,
    check_matched_cost,
    check_schedule,
    check_sweeps,
    check_tested_variants,
    check_variant,
)
from orchestrator.spec.checks.deepspeed import file_findings, zero3_findings
from orchestrator.spec.checks.places import (
    check_columns,
    check_data,
    check_implementations,
    check_model,
    check_possible,
)
from orchestrator.spec.checks.start_from import Starts
from orchestrator.spec.components import FINAL, FULL
from orchestrator.spec.infrastructure import ClusterSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.model_facts import ModelFacts, attention_dropout, model_facts, read_config
from orchestrator.spec.phase import PHASES, LoraSpec, PhaseSpec, PhasesSpec
from orchestrator.spec.yaml.node import Node, Path
from orchestrator.spec.yaml.schema import NAMED, names_at
from orchestrator.spec.yaml.validation_errors import Finding, error_at, locate, name_error, stray_keys, unknown_name

LENGTHS = ("max_steps", "num_train_epochs", "max_train_tflops", "match_train_tflops")


@dataclass
class Checks:
    """Checks cells of one experiment; a combination of parts that was seen is not checked again.

    Args:
        cluster: The machine, for the number of workers.
        notices: Takes what is deferred to `run`.
        starts: Other experiments that phases start from.
    """

    cluster: ClusterSpec | None
    notices: list[str]
    starts: Starts
    _seen: dict[tuple[Any, ...], list[Finding]] = field(default_factory=dict)
    _kept: list[Any] = field(default_factory=list)
    _sound: set[tuple[int, ...]] = field(default_factory=set)
    _bare_models: dict[str, ModelSpec] = field(default_factory=dict)
    _defined: dict[tuple[int, ...], tuple[Node | None, ...]] = field(default_factory=dict)

    def names(self, tree: Node) -> list[ErrorDetail]:
        """Return all names of a cell's tree that do not exist, are reserved, or mean two things."""
        shared = (tree.get("compressors"), tree.get("schedules"))
        new = self._defined.setdefault(tuple(map(id, shared)), shared) is shared  # kept, so that an id stays theirs
        return _TreeCheck(tree).check(definitions=new)

    def parts(self, parts: dict[str, Any], tree: Callable[[], Node], complete: bool) -> list[ErrorDetail]:
        """Return the errors of a cell.

        Args:
            parts: Its parts; of one that has errors itself the entries that have none, or None.
            tree: Makes the cell's tree.
            complete: No part has errors of its own.
        """
        sound = (complete, *(id(part) for name, part in parts.items() if name != "seed"))  # no check asks for the seed
        if sound in self._sound:
            return []
        findings = list(self._find(parts, tree, complete))
        if not findings:
            self._kept.append(parts)
            self._sound.add(sound)
            return []
        root = tree()
        return [error_at(root, _as_written(root, f.path), f.message, f.allowed, f.hint) for f in findings]

    def _find(self, parts: dict[str, Any], tree: Callable[[], Node], complete: bool) -> Iterator[Finding]:
        names = ("model", "data", "compressors", "schedules", "phases", "evaluate")
        model, data, variants, schedules, phases, evaluate = (parts[name] for name in names)
        own_or_bare = model or self._bare_model(tree())
        if variants and own_or_bare is not None:
            yield from self._once(self._find_variants, variants, own_or_bare, data)
        if evaluate and own_or_bare is not None:
            yield from self._once(check_sweeps, evaluate, variants, self._readable_facts(own_or_bare), data)
        if phases is not None:
            yield from self._once(self._find_phases, phases, data, schedules, variants, own_or_bare, complete)
            if model is not None and phases.by_name:
                yield from self._once(_check_dropout, model)
            # Pretrained weights may hold learned compressors already.
            if complete and model is not None and model.weights != "pretrained":
                facts = self._readable_facts(model)
                yield from self._once(check_tested_variants, evaluate, phases, schedules, variants, facts)
        if model is not None:
            yield from self._once(check_model, model, self.notices)
        if data:
            yield from self._once(check_data, data, self.notices)
        if data and evaluate:
            yield from self._once(check_columns, evaluate, data)
        if evaluate:
            yield from self._once(check_possible, evaluate)
        for name in ("data", "compressors", "evaluate"):
            if parts[name]:
                yield from self._once(check_implementations, name, parts[name])

    def _once(self, find: Callable[..., Iterator[Finding]], *parts: Any) -> list[Finding]:
        """Return what a check finds in parts of a cell; it is run once for the same ones."""
        key = (find.__name__, *(part if isinstance(part, str) else id(part) for part in parts))
        if key not in self._seen:
            self._kept.append(parts)  # keeps the parts alive, so that an id stays theirs
            self._seen[key] = list(find(*parts))
        return self._seen[key]

    def _bare_model(self, tree: Node) -> ModelSpec | None:
        """Return a model of the name alone: other errors of `model` do not hide those of the layers."""
        name = tree.at(("model", "model_name_or_path"))
        if name is None or not isinstance(name.value, str):
            return None
        return self._bare_models.setdefault(name.value, ModelSpec(model_name_or_path=name.value))

    def _find_variants(self, variants: dict[str, Any], model: ModelSpec, data: Any) -> Iterator[Finding]:
        try:
            facts = self._facts(model)
        except ValueError as error:
            yield Finding(("model", "model_name_or_path"), str(error))
            return
        for name, points in variants.items():
            yield from check_variant(points, ("compressors", name), facts, data)

    def _facts(self, model: ModelSpec) -> ModelFacts | None:
        facts = model_facts(model.model_name_or_path, model.revision)
        if facts is None:
            self.notices.append(
                f"model.model_name_or_path: the sizes of {model.model_name_or_path} are not known here; layers, "
                "amounts and costs are checked when it runs"
            )
        return facts

    def _readable_facts(self, model: ModelSpec) -> ModelFacts | None:
        try:
            return self._facts(model)
        except ValueError:
            return None  # reported beside the variants

    def _find_phases(
        self, phases: PhasesSpec, data: Any, schedules: Any, variants: Any, model: ModelSpec | None, complete: bool
    ) -> Iterator[Finding]:
        facts = self._readable_facts(model) if model is not None else None
        numbers = () if self.cluster is None else range(self.cluster.least_workers, self.cluster.most_workers + 1)
        workers = max(numbers, default=None)
        config = read_config(model.model_name_or_path, model.revision) if model is not None else None
        for name, phase in phases.by_name.items():
            path: Path = ("phases", name)
            yield from check_length(phase, path)
            yield from check_parts(phase, path)
            yield from check_lora(phase, path, facts)
            yield from check_batch(phase, path, numbers, model, facts)
            fixed = workers if len(numbers) == 1 else None
            for finding in file_findings(phase, model.dtype if model is not None else "auto", fixed):
                yield finding.inside(path)
            for finding in zero3_findings(phase, (config or {}).get("model_type"), workers):
                yield finding.inside(path)
            yield from self.starts.check(phases, name, facts)
            yield from check_schedule(phase, path, data, schedules, variants, facts, self.notices, complete)
            if complete:
                yield from check_learning(phase, path, schedules, variants, self.notices)
                yield from check_matched_cost(phase, path, schedules, variants)


def _check_dropout(model: ModelSpec) -> Iterator[Finding]:
    found = attention_dropout(model.model_name_or_path, model.revision)
    if found is not None:
        key, value = found
        message = f"{key} is {value} in its config.json: what attention drops cannot be drawn by sample"
        hint = "set it to 0 there; lora.dropout is drawn by sample"
        yield Finding(("model", "model_name_or_path"), message, f"{key}: 0.0", hint)


def _as_written(root: Node, path: Path) -> Path:
    """Return the path as written: an only point, sweep or value may stand without a list, and then has no index."""
    found: list[str | int] = []
    node: Node | None = root
    for step in path:
        if isinstance(step, int) and node is not None and not node.is_list:
            continue
        found.append(step)
        node = node.get(step) if node is not None else None
    return tuple(found)


def check_lora(phase: PhaseSpec, path: Path, facts: ModelFacts | None) -> Iterator[Finding]:
    """Check that its modules are linear layers of the language model; every family with known sizes has the same."""
    if phase.lora is None:
        return
    where, known = (*path, "lora", "target_modules"), LoraSpec().target_modules
    if not phase.lora.target_modules:
        yield Finding(where, "LoRA without modules trains nothing", ", ".join(known))
    for index, name in enumerate(phase.lora.target_modules):
        if facts is not None and not facts.other_names and name not in known:
            yield Finding((*where, index), f"the language model has no linear layers `{name}`", ", ".join(known))


def check_batch(
    phase: PhaseSpec, path: Path, numbers: Sequence[int], model: ModelSpec | None, facts: ModelFacts | None
) -> Iterator[Finding]:
    """Check that a global batch divides into micro-batches on all workers, and that `auto` can be computed.

    With a number of workers that may change (`numbers` has several) it must be possible to deal it out to any.
    """
    micro, total = phase.per_device_train_batch_size, phase.global_batch_size
    if micro == "auto" and model is not None and (facts is None or facts.decoder_layers):
        config = read_config(model.model_name_or_path, model.revision) or {}
        if config.get("model_type"):  # it is here, so that sizes which are not known now will not be known later
            why = "its sizes are not known" if facts is None else "its layers have experts, or do not all attend"
            message = f"nothing says what the micro-batches of {model.model_name_or_path} take: {why}"
            yield Finding((*path, "per_device_train_batch_size"), message, "a number")
    if not numbers:
        return
    workers = max(numbers)
    if not isinstance(micro, int):  # `auto` deals out what does not divide, but each worker needs a sample
        if workers > total:
            message = f"a global batch of {total} is less than a sample for each of {workers} workers"
            yield Finding((*path, "global_batch_size"), message, f"at least {workers}")
        return
    if len(numbers) > 1:
        wrong = [number for number in numbers if -(-total // (micro * number)) * number > total]
        if wrong:
            message = f"a global batch of {total} cannot be dealt to {wrong[0]} workers in micro-batches of {micro}"
            yield Finding((*path, "per_device_train_batch_size"), message, None, "`auto`, or a larger number")
        return
    if total % (micro * workers):
        fitting = [size for size in range(1, total // workers + 1) if total % (size * workers) == 0]
        message = (
            f"a global batch of {total} does not divide into micro-batches of {micro} on {workers} "
            f"worker{'s' if workers != 1 else ''}"
        )
        allowed = "per_device_train_batch_size " + ", ".join(map(str, fitting[-8:])) if fitting else None
        near = min(fitting, key=lambda size: abs(size - micro)) if fitting else None
        hint = f"per_device_train_batch_size: {near} fits" if near else f"{workers} workers do not divide {total}"
        yield Finding((*path, "global_batch_size"), message, allowed, hint)


def check_length(phase: PhaseSpec, path: Path) -> Iterator[Finding]:
    """Check that a phase has exactly one length; `match_train_tflops` may stand beside the length of its schedule."""
    given = [name for name in LENGTHS if getattr(phase, name) is not None]
    if "match_train_tflops" in given and len(given) == 2 and "max_train_tflops" not in given:
        return
    if not given:
        yield Finding(path, "the phase has no length", "exactly one of " + ", ".join(LENGTHS))
    elif len(given) > 1:
        hint = f"take one out; one that comes from a file below is taken out with `{given[0]}: null`"
        message = f"{' and '.join(given)} are given; a phase has one length"
        yield Finding((*path, given[-1]), message, "exactly one of " + ", ".join(LENGTHS), hint)


def check_parts(phase: PhaseSpec, path: Path) -> Iterator[Finding]:
    """Check that parts train once each, and that every part that trains has a rate, and no other."""
    if not phase.train:
        yield Finding((*path, "train"), "nothing trains", "at least one part")
    for index, part in enumerate(phase.train):
        if part in phase.train[:index]:
            yield Finding((*path, "train", index), f"{part} is named twice")
    if phase.lora is not None and "language_model" not in phase.train:
        hint = "add language_model to train: with LoRA, its adapters are what trains"
        yield Finding((*path, "lora"), "LoRA sits in the language model, which does not train", None, hint)
    if isinstance(phase.learning_rate, dict):
        allowed = ", ".join(phase.train)
        for part in phase.learning_rate:
            if part not in phase.train:
                message = f"{part} has a learning rate but does not train"
                yield Finding(
                    (*path, "learning_rate", part), message, allowed, f"add {part} to train, or drop its rate"
                )
        without = [part for part in phase.train if part not in phase.learning_rate]
        if without:
            yield Finding((*path, "learning_rate"), f"{', '.join(without)} trains without a learning rate", allowed)


class _TreeCheck:
    """Checks the names of one cell's tree."""

    def __init__(self, root: Node) -> None:
        self.root = root
        self.errors: list[ErrorDetail] = []
        # Where a section cannot be read, the names it holds are unknown: that is the error, and it is reported there.
        self._unsure = {section for section in NAMED if self._is_unsure(section)}
        self.data, self.variants, self.schedules = map(root.entries, ("data", "compressors", "schedules"))

    def check(self, definitions: bool) -> list[ErrorDetail]:
        """Return all errors; those of variants and schedules themselves only with `definitions`."""
        if definitions:
            self._check_definitions()
            for name, node in self.root.entries("schedules").items():
                self._check_schedule(("schedules", name), node)
        for name in PHASES:
            phase = self.root.at(("phases", name))
            if phase is not None and phase.is_mapping:
                self._check_phase(("phases", name), phase)
        for name, node in self.root.entries("evaluate").items():
            self._check_evaluation(("evaluate", name), node)
        self._check_search()
        return self.errors

    def _check_definitions(self) -> None:
        for section in ("compressors", "schedules"):
            for name in self.root.entries(section):
                if name in (FULL, FINAL):
                    meaning = "no compressor" if name == FULL else "the last stage's variant"
                    message = f"`{name}` is a reserved name ({meaning}); choose another"
                    self._error((section, name), message, key=True)
        for name in self.schedules:
            if name in self.variants:
                line = locate(self.root, ("compressors", name), key=True)[0].line
                message = f"`{name}` is both a schedule and a variant (line {line}); a phase could mean either"
                self._error(("schedules", name), message, hint="rename one of them", key=True)

    def _check_schedule(self, path: Path, node: Node) -> None:
        for name in _variants_of(node):
            if name != FULL and name not in self.variants and "compressors" not in self._unsure:
                where = next((p for p, leaf in node.leaves(path) if leaf.value == name and p[-1] != "kind"), path)
                self._error(where, f"there is no variant `{name}`", *unknown_name(name, [*self.variants, FULL]))

    def _check_phase(self, path: Path, phase: Node) -> None:
        self._check_names(phase, (*path, "data"), "there is no data set `{}`", self.data, "data", keys=True)
        schedule = phase.get("schedule")
        known = [*self.schedules, *self.variants, FULL]
        if schedule is not None and schedule.is_mapping:
            self._check_schedule((*path, "schedule"), schedule)
        for key in ("schedule", "match_train_tflops"):
            message = "there is no schedule or variant `{}`"
            self._check_names(phase, (*path, key), message, known, "schedules", "compressors")

    def _check_evaluation(self, path: Path, node: Node) -> None:
        self._check_names(node, (*path, "data"), "there is no data set `{}`", self.data, "data")
        known = [FINAL, FULL, *self.variants]
        self._check_names(node, (*path, "under"), "there is no variant `{}` to test under", known, "compressors")

    def _check_search(self) -> None:
        known = [*self.variants, FULL]
        for key, node in self.root.entries("search", "space").items():
            path: Path = ("search", "space", key)
            for part in ("variants", "last"):
                self._check_names(node, (*path, part), "there is no variant `{}`", known, "compressors")

    def _is_unsure(self, section: str) -> bool:
        node = self.root.get(section)
        if node is None:
            unknown = [key for key in self.root.value if key not in names_at(self.root, ())]
            return any(registry.nearest(key, (section,)) for key in unknown)
        return not (node.is_mapping or node.value is None) or bool(stray_keys(self.root, section))

    def _check_names(
        self, block: Node, path: Path, message: str, known: Collection[str], *sections: str, keys: bool = False
    ) -> None:
        """Report names under a block's last key of `path` that are not known, unless a section of names is unsure."""
        for where, name in _texts(block.get(path[-1]), path, keys) if self._unsure.isdisjoint(sections) else ():
            if name not in known:
                self._error(where, message.format(name), *unknown_name(name, list(known)), key=keys and where != path)

    def _error(
        self, path: Path, message: str, allowed: str | None = None, hint: str | None = None, key: bool = False
    ) -> None:
        self.errors.append((name_error if key else error_at)(self.root, path, message, allowed, hint))


def _variants_of(node: Node) -> tuple[str, ...]:
    """Return the variants a schedule uses; where it has other errors, what stands under `compressor` in it."""
    value: Any = node.plain()
    try:
        schedule = registry.spec_class(registry.SCHEDULES, value["kind"]).model_validate(value)
        return tuple(schedule.variants())
    except (ValidationError, KeyError, TypeError, ImportError, AttributeError):
        found = (leaf.value for path, leaf in node.leaves() if path[-1:] == ("compressor",))
        return tuple(dict.fromkeys(name for name in found if isinstance(name, str)))


def _texts(node: Node | None, path: Path, keys: bool = False) -> Iterator[tuple[Path, str]]:
    """Return the texts at a path: one, a list's, or with `keys` a mapping's keys."""
    if node is None:
        return
    if isinstance(node.value, str):
        yield path, node.value
    elif node.is_list:
        for index, item in enumerate(node.value):
            if isinstance(item.value, str):
                yield (*path, index), item.value
    elif node.is_mapping and keys:
        for key in node.value:
            yield (*path, key), key

"""`start_from` another experiment: its file is loaded beside this one, its cell and phase are found and compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

from orchestrator.errors import ErrorDetail, SpecError
from orchestrator.spec.cell_reference import by_axis, by_name, may_be_id, misfit
from orchestrator.spec.loaded import LoadedExperiment, ResolvedCell
from orchestrator.spec.model_facts import ModelFacts, model_facts
from orchestrator.spec.phase import PhasesSpec, StartFromSpec
from orchestrator.spec.yaml.node import Path
from orchestrator.spec.yaml.validation_errors import Finding

_LANGUAGE = (
    "num_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "gated_mlp",
)  # fmt: skip
_SIZES = {
    "vision_tower": ("vision_hidden_size", "vision_intermediate_size"),
    "projector": ("projector_in", "projector_hidden", "projector_layers", "hidden_size"),
    "language_model": _LANGUAGE,
}


@dataclass
class Starts:
    """The experiments that phases start from; each file is read once.

    Args:
        load: Loads a file; takes the files that wait for it, and what is known already.
        chain: Files that are being loaded, the first one first.
        known: File to the experiment, or to its errors.
    """

    load: Callable[[FilePath, Starts], LoadedExperiment]
    chain: tuple[str, ...] = ()
    known: dict[str, LoadedExperiment | tuple[ErrorDetail, ...]] = field(default_factory=dict)
    _found: dict[tuple[str, str], ResolvedCell | Finding | None] = field(default_factory=dict)

    def inside(self, file: FilePath) -> Starts:
        """For what `file` starts from."""
        return Starts(self.load, (*self.chain, os.path.realpath(file)), self.known)

    @property
    def experiments(self) -> dict[str, LoadedExperiment]:
        """The experiments without errors, by file."""
        return {file: found for file, found in self.known.items() if not isinstance(found, tuple)}

    def check(self, phases: PhasesSpec, name: str, facts: ModelFacts | None) -> Iterator[Finding]:
        """Return what keeps a phase from starting where it says.

        Args:
            phases: The cell's phases.
            name: Which of them.
            facts: Sizes of the cell's model, None where they are not known.
        """
        start, path = phases.by_name[name].start, ("phases", name, "start_from")
        if start is None:
            return
        if start.parts is None and name == "finetune" and phases.pretrain is not None:
            message = "all weights come from here, so that nothing of `pretrain` would be used"
            yield Finding(path, message, None, "name the `parts` that come from here, or write `pretrain: null`")
        if start.spec is not None:
            yield from self._check_spec(start, path, facts)

    def _check_spec(self, start: StartFromSpec, path: Path, facts: ModelFacts | None) -> Iterator[Finding]:
        assert start.spec is not None and start.cell is not None
        file = start.spec
        if not os.path.isfile(file):
            return  # reported where paths are made absolute
        if (real := os.path.realpath(file)) in self.chain:
            ring = " -> ".join([*self.chain[self.chain.index(real) :], real])
            yield Finding((*path, "spec"), f"start_from forms a cycle: {ring}")
            return
        other = self._experiment(file)
        if isinstance(other, tuple):
            for error in other:
                where = f"{error.file}:{error.line}" if error.line is not None else str(error.file or file)
                message = f"that file has an error at {where}: {error.path}: {error.message}"
                yield Finding((*path, "spec"), message, error.allowed, error.hint)
            return
        if (file, start.cell) not in self._found:
            self._found[file, start.cell] = _pick(other.cells, start.cell, path)
        cell = self._found[file, start.cell]
        if isinstance(cell, Finding):
            yield replace(cell, path=(*path, "cell"))
        elif cell is not None:
            yield from _check_cell(cell, start, path, facts)

    def _experiment(self, file: str) -> LoadedExperiment | tuple[ErrorDetail, ...]:
        if file not in self.known:
            try:
                self.known[file] = self.load(FilePath(file), self)
            except SpecError as error:
                self.known[file] = error.errors
        return self.known[file]


def _pick(cells: Sequence[ResolvedCell], wanted: str, path: Path) -> ResolvedCell | Finding | None:
    """Return the cell, or why there is none; None where the text may begin an id, which only planning knows."""
    fits = by_name(cells, wanted) or by_axis(cells, wanted)
    if len(fits) == 1:
        return fits[0]
    if not fits and may_be_id(wanted):
        return None
    return Finding(path, misfit(cells, fits, wanted))


def _check_cell(cell: ResolvedCell, start: StartFromSpec, path: Path, facts: ModelFacts | None) -> Iterator[Finding]:
    has = cell.spec.phases.by_name
    if start.phase not in has:
        message = f"the cell {cell.name} of {start.spec} has no phase `{start.phase}`"
        yield Finding((*path, "phase"), message, ", ".join(has) or "it trains nothing")
    try:
        theirs = model_facts(cell.spec.model.model_name_or_path, cell.spec.model.revision)
    except ValueError:
        return
    if facts is None or theirs is None:
        return  # compared when it runs
    wanted: Sequence[Any] = start.parts or tuple(_SIZES)
    for name in dict.fromkeys(size for part in wanted for size in _SIZES.get(part, ())):
        if getattr(theirs, name) != getattr(facts, name):
            message = (
                f"the model of the cell {cell.name} of {start.spec} has another shape: {name} "
                f"{getattr(theirs, name)} instead of {getattr(facts, name)}"
            )
            yield Finding(path, message, None, "start from a cell of this model, or name the `parts` that fit")

"""The check before anything starts: every row of the data, and what the model's processor makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.data.row_index import open_rows
from orchestrator.data.row_trial import TrialOf, Tried, found_faults, try_rows
from orchestrator.data.rows import FAULTS_SHOWN, open_data_set, raise_for_faults
from orchestrator.errors import DataError
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.identity import digest
from orchestrator.plan.jobs import EvaluationJob, Job, StageJob
from orchestrator.spec.components import DataSpec
from orchestrator.spec.model import ModelSpec

_OF_IMAGES = ("vision_tower", "projector", "compressor")


@dataclass(frozen=True)
class Use:
    """Data sets that one phase trains on, or one evaluation tests on.

    Attributes:
        where: The phase's or evaluation's key path.
        entries: `{"name", "spec"}` and, where rows are left out, `left_out`, of each set.
        train: Parts that train; empty for a test.
    """

    where: str
    entries: tuple[dict[str, Any], ...]
    model: dict[str, Any]
    model_max_length: int
    train: tuple[str, ...] = ()

    @property
    def prompts(self) -> bool:
        """Whether rows are test prompts."""
        return not self.train


@dataclass
class Findings:
    """What a check found.

    Attributes:
        remarks: What users should know.
        replan: Whether rows are left out that the plan did not leave out.
    """

    remarks: dict[str, None] = field(default_factory=dict)
    replan: bool = False


def uses_of_jobs(work: Iterable[Job]) -> Iterator[Use]:
    """Return what some work uses."""
    for job in work:
        if isinstance(job, StageJob):
            recipe = job.recipe
            train = tuple(recipe["train"])
            yield Use(f"phases.{job.phase}", job.data, job.model, recipe["model_max_length"], train)
        elif isinstance(job, EvaluationJob):
            yield _of_test(job)


def uses_of_cells(cells: Iterable[Cell]) -> Iterator[Use]:
    """Return what some cells use, done or not."""
    for cell in cells:
        for plan in cell.phases:
            length, train = plan.recipe.model_max_length, tuple(plan.recipe.train)
            yield Use(f"phases.{plan.name}", plan.data, cell.root.model, length, train)
        yield from map(_of_test, cell.evaluations)


def _of_test(job: EvaluationJob) -> Use:
    entry = {"name": "", "spec": job.data, "content": job.content, "left_out": list(job.left_out)}
    return Use(f"evaluate.{job.name}", (entry,), job.model, job.model_max_length)


def check_uses(uses: Iterable[Use]) -> Findings:
    """Read every row and image, and try each with the model's processor, as far as that was not done before.

    Raises:
        DataError: rows cannot be used, or a part that trains is reached by no row.
    """
    distinct = {digest([use.entries, use.model, use.model_max_length, sorted(use.train)]): use for use in uses}
    specs: dict[str, DataSpec] = {}
    for use in distinct.values():
        for entry in use.entries:
            specs.setdefault(digest(entry["spec"]), _spec_of(entry))
    findings = Findings()
    for spec in specs.values():
        raise_for_faults(_called(spec), open_data_set(spec).check())
        open_rows(spec)
        findings.remarks |= dict.fromkeys(f"{_called(spec)}: {text}" for text in spec.remarks())
    for use in distinct.values():
        _try(use, findings)
    return findings


def _try(use: Use, findings: Findings) -> None:
    model = ModelSpec.model_validate(use.model)
    found: list[Tried] = []
    for entry in use.entries:
        one = try_rows(TrialOf(_spec_of(entry), model, use.model_max_length, use.prompts))
        name = f".data.{entry['name']}" if entry["name"] else ""
        if faults := found_faults(one):
            more = [f"... and {len(faults) - FAULTS_SHOWN} more"] if len(faults) > FAULTS_SHOWN else []
            raise DataError("\n    ".join([f"{use.where}{name}: {faults[0]}", *faults[1:FAULTS_SHOWN], *more]))
        findings.replan |= list(one.bad) != list(entry.get("left_out", ()))
        if one.bad:
            some = [f"row {number}: {reason}" for number, reason in list(one.bad.items())[:3]]
            more = ["..."] if len(one.bad) > len(some) else []
            text = f"{len(one.bad):,} of {len(one):,} rows dropped, which this model cannot use: "
            findings.remarks[f"{use.where}{name}: {text}{'; '.join(some + more)}"] = None
        findings.remarks |= dict.fromkeys(f"{use.where}{name}: {text}" for text in one.remarks())
        found.append(one)
    unreached = [part for part in use.train if part in _OF_IMAGES]
    if unreached and not any(one.with_images for one in found):
        raise DataError(_no_image_seen(use, unreached, found))


def _no_image_seen(use: Use, unreached: Sequence[str], found: Sequence[Tried]) -> str:
    rows = sum(map(len, found))
    rest = ", ".join(part for part in use.train if part not in unreached)
    advice = f"train: [{rest}]" if rest else "data with images"
    return (
        f"{use.where}.train: {', '.join(unreached)} would be trained, but none of the {rows:,} rows has an image that "
        f"the model sees within model_max_length {use.model_max_length}; give {advice}"
    )


def _spec_of(entry: dict[str, Any]) -> DataSpec:
    from orchestrator import registry

    spec: DataSpec = registry.spec_class(registry.DATA, entry["spec"]["kind"]).model_validate(entry["spec"])
    return spec


def _called(spec: DataSpec) -> str:
    return " ".join([f"data of kind {spec.kind}", *(str(getattr(spec, name)) for name in spec.path_fields[:1])])

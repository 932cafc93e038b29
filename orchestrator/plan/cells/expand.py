"""From a loaded experiment to its cells: every name resolved, every phase a table of steps, every cell an identity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import product
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator import registry
from orchestrator.errors import UsageError
from orchestrator.plan.cells import identity_fields
from orchestrator.plan.cells.cell import Along, Cell, PhasePlan, cell_id
from orchestrator.plan.cells.compiled_schedule import (
    CHAINED,
    FULL_TOKENS,
    CompiledSchedule,
    Variant,
    next_state,
    resolve_schedule,
)
from orchestrator.plan.cells.image_amounts import SizedImages, images_by_size, unfit_images
from orchestrator.plan.cells.rungs import rung_steps, stretches
from orchestrator.plan.cells.sample_lengths import Samples
from orchestrator.plan.cells.start_from import Start, pick, resolve_start
from orchestrator.plan.cost import MeasuredRows, stage_train_tflops, unpriced
from orchestrator.plan.identity import SEMANTICS_VERSION, digest
from orchestrator.plan.jobs import FULL, EvaluationJob, RootJob
from orchestrator.spec.base import Spec
from orchestrator.spec.components import FINAL, CompressorSpec, EvaluationSpec, ScheduleSpec, StageTable, derive
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.model_facts import ModelFacts, model_facts
from orchestrator.spec.phase import PhaseSpec, StartFromSpec, epoch_steps, rows_per_epoch
from orchestrator.spec.search import SearchSpec, measured_by

if TYPE_CHECKING:
    from orchestrator.spec.loaded import LoadedExperiment, ResolvedCell


Made = TypeVar("Made")
Points = tuple[dict[str, Any], ...]
_ROWS_SHOWN = 20
_NOT_HASHED = set(identity_fields.RESOLVED)


def expand_cells(loaded: LoadedExperiment) -> tuple[Cell, ...]:
    """Return the cells of an experiment, in the grid's order; of a search with the evaluations at its rungs.

    Raises:
        UsageError: a phase's number of steps is not known, or a name is not defined.
    """
    resolver = _Resolver(loaded.starts)
    return tuple(resolver.cell(cell, loaded.spec.search) for cell in loaded.cells)


class _Undivided(UsageError):
    """A phase's steps cannot be divided as its schedule wants."""


class _Resolver:
    """Resolves cells; what cells have in common (digests, dumps, tables) is made once."""

    def __init__(self, others: Mapping[str, LoadedExperiment]) -> None:
        self._others = others
        self._made: dict[Any, Any] = {}
        self._alive: list[Any] = []
        self._samples = Samples()

    def _once(self, make: Callable[..., Made], spec: Spec, *rest: Any, leave: set[str] | None = None) -> Made:
        # Cells often hold the very same object; only then is its text not needed.
        near = (make, id(spec), *rest)
        if near not in self._made:
            far = (make, type(spec), spec.model_dump_json(exclude=leave), *rest)
            if far not in self._made:
                self._made[far] = make(spec, *rest)
            self._made[near] = self._made[far]
            self._alive.append(spec)
        return self._made[near]

    def cell(self, cell: ResolvedCell, search: SearchSpec | None = None) -> Cell:
        spec = cell.spec
        facts = self._once(_facts, spec.model)
        root = self._root(spec)
        phases: list[PhasePlan] = []
        starts: list[Start] = []
        state = root.id
        notices: list[str] = []
        for name, recipe in spec.phases.by_name.items():
            starts.append(resolve_start(spec, name, state, self._settings, self._other_cell))
            phases.append(self._phase(spec, name, recipe, starts[-1], facts, notices))
            state = phases[-1].end
        final = phases[-1].schedule.final if phases else FULL_TOKENS
        evaluations = [
            self._evaluation(spec, (name, *part), under, state, final, facts, notices)
            for name, entry in spec.evaluate.items()
            for under, part in product(entry.tested_variants, self._parts(spec, name, entry))
        ]
        return Cell(
            cell_id(phases, root), cell.name, dict(cell.axes), spec, root, tuple(phases), tuple(evaluations), state,
            facts, tuple(dict.fromkeys(notices)), tuple(start.job for start in starts if start.job is not None),
            tuple(start.source for start in starts if start.source is not None),
            self._along(spec, search, phases, final, facts, notices),
        )  # fmt: skip

    def _root(self, spec: ExperimentSpec) -> RootJob:
        # Drawn weights differ by seed, files are read once.
        model, seed = self._once(_model, spec.model), _weights_seed(spec)
        key = ("root", id(model), seed, spec.plugins)
        if key not in self._made:
            self._made[key] = _root(*model, identity_fields.draws_weights(spec.model), seed, spec.plugins)
        return self._made[key]

    def _settings(self, spec: ExperimentSpec) -> str:
        return self._once(_settings, spec.model)

    def _other_cell(self, start: StartFromSpec) -> Cell:
        assert start.spec is not None
        key = ("cell", start.spec, start.cell)
        if key not in self._made:
            self._made[key] = self.cell(pick(self._others[start.spec], start, self.cell))
        return self._made[key]

    def _phase(
        self, spec: ExperimentSpec, name: str, recipe: PhaseSpec, start: Start, facts: ModelFacts | None,
        notices: list[str],
    ) -> PhasePlan:  # fmt: skip
        sets = {recipe.data: 1.0} if isinstance(recipe.data, str) else recipe.data
        found = []
        for set_name, share in sets.items():
            identity, entry, notes = self._data(
                spec, set_name, f"phases.{name}.data", recipe.model_max_length, prompts=False
            )
            notices += notes
            found.append((identity, share, {"name": set_name, "share": share, **entry}))
        found.sort(key=lambda entry: entry[:2])
        total_steps = self._total_steps(spec, name, recipe, sets, facts)
        schedule = self._compiled(spec, name, recipe, total_steps, facts)
        if facts is not None and facts.visual_grid is None:
            for *_, entry in found:
                self._check_amounts(spec, f"phases.{name}.schedule", _variants_of(schedule), entry, facts)
        seed = spec.seed if recipe.seed is None else recipe.seed
        lineage = digest(
            {
                "start": start.state,
                "phase": self._once(_recipe_digest, recipe, leave=_NOT_HASHED),
                "data": [entry[:2] for entry in found],
                "total_steps": total_steps,
                "seed": seed,
                **({} if start.settings is None else {"settings": start.settings}),
            }
        )
        data = tuple(entry[2] for entry in found)
        before = [lineage]
        for action, does in zip(schedule.actions[:CHAINED], schedule.ids, strict=False):
            before.append(next_state(before[-1], action.first_step, action.last_step, does))
        end = before[-1]
        if schedule.tails:
            end = next_state(end, schedule.actions[CHAINED].first_step, total_steps, schedule.tails[-1])
        return PhasePlan(name, total_steps, schedule, recipe, data, seed, start.state, lineage, tuple(before), end)

    def _total_steps(
        self, spec: ExperimentSpec, name: str, recipe: PhaseSpec, sets: dict[str, float], facts: ModelFacts | None
    ) -> int:
        """Return the optimizer steps of a phase: `max_steps`, the full batches of its epochs, or what a cost allows.

        `max_train_tflops`: the most steps that cost no more. `match_train_tflops`: as many as cost what the schedule it
        names costs over the phase's `max_steps` or `num_train_epochs` (one epoch where neither is given).

        Raises:
            UsageError: it has no length, its data's rows cannot be counted, or costs are not known or allow no step.
        """
        matched, target = recipe.match_train_tflops, recipe.max_train_tflops
        at_most = target is not None
        if matched is None and target is None:
            return self._stated_steps(spec, name, recipe, sets)
        where = f"phases.{name}.{'max' if matched is None else 'match'}_train_tflops"
        reason = "its model's sizes are not known" if facts is None else unpriced(facts, recipe)
        sample = self._samples.mean(spec, name, recipe, sets, facts) if facts is not None and reason is None else None
        if facts is None or sample is None:
            reason = reason or next((why for (_, phase), why in self._samples.missing.items() if phase == name), "")
            because = f" ({reason})" if reason else ""
            raise UsageError(f"{where}: the cost of a step is not known here{because}; give max_steps")

        def price(schedule: str | ScheduleSpec, steps: int) -> float | None:
            try:
                compiled = self._compiled(spec, name, recipe.model_copy(update={"schedule": schedule}), steps, facts)
            except _Undivided:
                return None  # so few steps cannot be divided into its stages
            try:
                return stage_train_tflops(facts, compiled.actions, sample, recipe.model_dump())
            except ValueError as error:  # images of the data are too small for an amount
                raise UsageError(f"{where}: the cost of a step is not known here: {error}; give max_steps") from error

        if target is None:
            assert matched is not None
            one_epoch = {} if recipe.max_steps or recipe.num_train_epochs else {"num_train_epochs": 1.0}
            reference = self._stated_steps(spec, name, recipe.model_copy(update=one_epoch), sets)
            target = price(matched, reference)
            if target is None:
                raise UsageError(f"{where}: {matched} cannot be divided into {reference} steps")
        try:
            return steps_of_cost(target, lambda steps: price(recipe.schedule, steps), at_most)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from error

    def _stated_steps(self, spec: ExperimentSpec, name: str, recipe: PhaseSpec, sets: dict[str, float]) -> int:
        if recipe.max_steps is not None:
            return recipe.max_steps
        if recipe.num_train_epochs is None:
            raise UsageError(f"phases.{name} has no length: give max_steps or num_train_epochs")
        rows: list[tuple[int, float]] = []
        for each, share in sets.items():
            data = spec.data[each]
            count = self._once(type(data).num_rows, data)
            if count is None:
                raise UsageError(
                    f"data.{each}: its file is not here, so the steps of phases.{name} (num_train_epochs) cannot be "
                    "counted; give num_samples on the data set, or max_steps on the phase"
                )
            unused = self._left_out(spec, data, recipe.model_max_length, prompts=False) if count else ()
            rows.append((count - len(unused), share))
        return epoch_steps(rows_per_epoch(rows), recipe.num_train_epochs, recipe.global_batch_size)

    def _left_out(self, spec: ExperimentSpec, data: Any, model_max_length: int, prompts: bool) -> list[int]:
        """Return the rows that the check before training found this model unable to use, where bad rows are dropped."""
        if getattr(data, "on_bad_row", "fail") != "drop" or self._once(_data, data)[1]["content"] is None:
            return []
        model = self._once(_dump, spec.model)
        key = ("left out", digest([self._once(_data, data)[0], model, model_max_length, prompts]))
        if key not in self._made:
            # Found by name: the data layer lies above this one, and needs no torch for this.
            find = registry.load_object("orchestrator.data.check:left_out")
            self._made[key] = find(data, spec.model, model_max_length, prompts)
        return self._made[key]

    def _data(
        self, spec: ExperimentSpec, name: str, where: str, model_max_length: int, *, prompts: bool
    ) -> tuple[str, dict[str, Any], list[str]]:
        key = ("data", id(spec.data), id(spec.model), name, model_max_length, prompts)
        if key not in self._made:
            self._made[key] = self._data_of(spec, name, where, model_max_length, prompts=prompts)
            self._alive += [spec.data, spec.model]
        return self._made[key]

    def _data_of(
        self, spec: ExperimentSpec, name: str, where: str, model_max_length: int, *, prompts: bool
    ) -> tuple[str, dict[str, Any], list[str]]:
        if name not in spec.data:
            raise UsageError(f"{where}: no data set is called {name!r}; there are: {', '.join(spec.data) or 'none'}")
        identity, entry, notes = self._once(_data, spec.data[name])
        notes = [f"data.{name}: {text}" for text in notes]
        if left_out := self._left_out(spec, spec.data[name], model_max_length, prompts):
            some = ", ".join(map(str, left_out[:_ROWS_SHOWN])) + (", ..." if len(left_out) > _ROWS_SHOWN else "")
            limit = f"at model_max_length {model_max_length}"
            notes.append(
                f"data.{name}: rows dropped that this model cannot use {limit}: {len(left_out):,} (row {some})"
            )
            identity, entry = digest([identity, left_out]), {**entry, "left_out": left_out}
        return identity, entry, notes

    def _check_amounts(
        self, spec: ExperimentSpec, where: str, variants: Mapping[str, Points], entry: Mapping[str, Any],
        facts: ModelFacts,
    ) -> None:  # fmt: skip
        """Refuse a variant that asks some image of a data set, whose sizes vary, for more tokens than it has.

        Raises:
            UsageError: with the variant, the amount, how many images are too small, and the smallest.
        """
        if entry["content"] is None:
            return  # the data is not here
        for name, points in variants.items():
            if not any(point.get("keep_tokens") for point in points):
                continue
            images = self._sized_images(spec, entry)
            key = ("amounts", id(points), id(images))
            if key not in self._made:
                self._made[key] = unfit_images(points, facts.num_layers, images)
                self._alive += [points, images]
            if (reason := self._made[key]) is not None:
                raise UsageError(f"{where}: {name} does not fit the images of data.{entry['name']}: {reason}")

    def _sized_images(self, spec: ExperimentSpec, entry: Mapping[str, Any]) -> tuple[SizedImages, ...]:
        data, left_out = spec.data[entry["name"]], entry.get("left_out", ())
        key = ("sized", self._once(_data, data)[0], digest(list(left_out)), id(self._once(_dump, spec.model)))
        if key not in self._made:
            self._made[key] = images_by_size(data, left_out, spec.model)
        found: tuple[SizedImages, ...] = self._made[key]
        return found

    def _compiled(
        self, spec: ExperimentSpec, phase: str, recipe: PhaseSpec, total_steps: int, facts: ModelFacts | None
    ) -> CompiledSchedule:
        """Return what a phase's schedule does at every step; one object for equal schedules, lengths and variants."""
        chosen: Any = recipe.schedule
        if isinstance(chosen, str):
            chosen = spec.schedules.get(chosen, chosen)
        try:
            if isinstance(chosen, str):  # a variant's name: constant
                kind, key = "constant", ("constant", total_steps, chosen)
                table = self._made.setdefault(key, StageTable(((0, total_steps, chosen),), chosen))
            else:
                kind, table = (
                    chosen.kind,
                    self._once(type(chosen).compile, chosen, total_steps, recipe.global_batch_size),
                )
            return self._resolved(spec, kind, table, total_steps, facts)
        except ValueError as error:
            raise _Undivided(f"phases.{phase}.schedule: {error}") from error

    def _resolved(
        self, spec: ExperimentSpec, kind: str, table: StageTable, total_steps: int, facts: ModelFacts | None
    ) -> CompiledSchedule:
        def variant_of(name: str) -> Variant:
            base, changes = table.derived.get(name, (name, None))
            return self._variant(spec, base, facts, changes)

        near = (id(table), id(facts), id(spec.compressors))
        if near not in self._made:
            names = dict.fromkeys([table.final, *(name for _, _, name in table.actions)])
            names |= dict.fromkeys(teaching.teacher for teaching in table.teachers.values())
            names |= dict.fromkeys(name for students in table.students.values() for name in students.variants)
            far = (id(table), *((name, variant_of(name).id) for name in names))
            if far not in self._made:
                self._made[far] = resolve_schedule(kind, table, total_steps, variant_of)
            self._made[near] = self._made[far]
            self._alive += [table, spec.compressors]
        return self._made[near]

    def _variant(
        self, spec: ExperimentSpec, name: str, facts: ModelFacts | None, changes: Mapping[str, Any] | None = None
    ) -> Variant:
        if name == FULL:
            return FULL_TOKENS
        if name not in spec.compressors:
            known = ", ".join((FULL, *spec.compressors))
            raise UsageError(f"compressors: no variant is called {name!r}; there are: {known}")
        points = spec.compressors[name]
        if changes is not None:
            points = derive(points, changes)
        return self._resolved_variant(spec, f"compressors.{name}", points, facts)

    def _resolved_variant(
        self, spec: ExperimentSpec, where: str, points: tuple[CompressorSpec, ...], facts: ModelFacts | None
    ) -> Variant:
        images: MeasuredRows | str = ""
        if facts is not None and facts.visual_grid is None and any(point.layer_average_tokens for point in points):
            images = self._images(spec)
        near = (*map(id, points), id(facts), id(images) if images else "")
        if near not in self._made:
            far = (*((type(point), point.model_dump_json()) for point in points), *near[-2:])
            if far not in self._made:
                self._made[far] = _variant_of(where, points, facts, images)
            self._made[near] = self._made[far]
            self._alive.append((points, images))
        return self._made[near]

    def _images(self, spec: ExperimentSpec) -> MeasuredRows | str:
        """Return the measured rows of the phase that is compared, `finetune` where there is one; else why there are
        none.
        """
        name, recipe = next(reversed(spec.phases.by_name.items()), (None, None))
        if name is None or recipe is None:
            return "there is no phase"
        key = ("images", id(spec.phases), id(spec.data), id(spec.model))
        if key not in self._made:
            sets = {recipe.data: 1.0} if isinstance(recipe.data, str) else recipe.data
            unknown = next((each for each in sets if each not in spec.data), None)
            if unknown is not None:
                return f"there is no data set {unknown}"
            self._made[key] = self._samples.measured(spec, recipe, sets)
            self._alive += [spec.phases, spec.data, spec.model]
        return self._made[key]

    def _along(
        self, spec: ExperimentSpec, search: SearchSpec | None, phases: list[PhasePlan], final: Variant,
        facts: ModelFacts | None, notices: list[str],
    ) -> tuple[Along, ...]:  # fmt: skip
        """Return the evaluations of states before the final one, by step.

        Raises:
            UsageError: a learned compressor would be tested before any stage used it, or rungs have no room.
        """
        wanted = [*_asked_for(spec, phases), *_at_rungs(search, phases)]
        if not wanted:
            return ()
        found: list[Along] = []
        before, modules = 0, _Modules(spec, facts)
        for plan in phases:
            for of, name, unders, step, rung in wanted:
                if of is not plan:
                    continue
                entry, state = spec.evaluate[name], plan.state_at(step)
                for under, part in product(unders, self._parts(spec, name, entry)):
                    job = self._evaluation(spec, (name, *part), under, state, final, facts, notices)
                    modules.check(job, plan, step, f"evaluate.{name}.at" if rung is None else "search.scheduler")
                    found.append(Along(step, before + step - 1, job, rung))
            modules.pass_through(plan)
            before += plan.total_steps
        return tuple(sorted(found, key=lambda each: each.last_step))

    def _parts(self, spec: ExperimentSpec, name: str, entry: EvaluationSpec) -> list[tuple[str, EvaluationSpec]]:
        """Return what is tested of an entry on its own: (name of the part, the entry cut to it).

        Raises:
            UsageError: a part needs to know more than the last phase's data says.
        """
        if entry.needs_baseline and not spec.report.baseline:
            raise UsageError(
                f"evaluate.{name}: it needs the scores of a baseline, and `report.baseline` names none; add for "
                "instance report: {baseline: {phases.finetune.schedule: full}}"
            )
        if type(entry).parts is EvaluationSpec.parts:
            return [("", entry)]
        last = spec.phases.finetune or spec.phases.pretrain
        names = () if last is None else (last.data,) if isinstance(last.data, str) else tuple(last.data)
        sets = [spec.data[each] for each in names if each in spec.data]
        key = ("parts", id(entry), *map(id, sets))
        if key not in self._made:
            try:
                self._made[key] = list(entry.parts(sets).items())
            except ValueError as error:
                raise UsageError(f"evaluate.{name}: {error}") from error
            self._alive += [entry, *sets]
        return self._made[key]

    def _evaluation(
        self, spec: ExperimentSpec, which: tuple[str, str, EvaluationSpec], under: str, state: str, final: Variant,
        facts: ModelFacts | None, notices: list[str],
    ) -> EvaluationJob:  # fmt: skip
        name, part, entry = which
        point = entry.tested_variants.get(under)  # at a rung `under` may be none of the entry's own
        if point is not None:
            variant = self._resolved_variant(spec, f"evaluate.{name}.under: {under}", (point,), facts)
        else:
            variant = final if under == FINAL else self._variant(spec, under, facts)
        recipe = spec.phases.finetune or spec.phases.pretrain
        length = entry.model_max_length or (2048 if recipe is None else recipe.model_max_length)
        entry_id, dump = self._once(_evaluation, entry)
        about = {"state": state, "evaluation": entry_id, "points": variant.id, "length": length}
        model, plugins = self._once(_dump, spec.model), tuple(spec.plugins)
        if entry.data is None:  # it brings its own
            return EvaluationJob(
                digest(about), state, name, under, variant.points, dump, {}, model, length, plugins, part=part
            )
        data_id, data, notes = self._data(spec, entry.data, f"evaluate.{name}.data", length, prompts=True)
        notices += notes
        if facts is not None and facts.visual_grid is None:
            tested = {"name": entry.data, **data}
            self._check_amounts(spec, f"evaluate.{name}.under", {under: variant.points}, tested, facts)
        about["data"] = data_id
        columns = spec.data[entry.data].column_sources()
        renamed = any(name != source for name, source in columns.items())
        identity = digest({**about, "columns": columns if renamed else sorted(columns)} if columns else about)
        return EvaluationJob(
            identity, state, name, under, variant.points, dump, data["spec"], model, length, plugins,
            data["content"], tuple(data.get("left_out", ())), part,
        )  # fmt: skip


def _variants_of(schedule: CompiledSchedule) -> dict[str, Points]:
    """Return the points of every pass of a schedule's steps, teachers' and students' too, and of its end, by name."""
    found: dict[str, Points] = {}
    for action in schedule.actions:
        found[action.variant] = action.points
        if action.distill is not None:
            found[action.distill.teacher] = action.distill.points
        if action.students is not None:
            found |= zip(action.students.variants, action.students.points, strict=True)
    return found


# A phase, an entry under `evaluate`, what is tested under, steps of the phase before it, and the rung if it is for one.
_Wanted = tuple[PhasePlan, str, Sequence[str], int, Fraction | None]


def _asked_for(spec: ExperimentSpec, phases: Sequence[PhasePlan]) -> Iterator[_Wanted]:
    """Yield what `evaluate` tests along the way."""
    for plan, (name, entry) in product(phases, spec.evaluate.items()):
        if entry.at == "end":
            continue
        every = None if entry.at == "stage_ends" else entry.at.every_steps
        for step in range(every, plan.total_steps + 1, every) if every else plan.schedule.stage_ends:
            if plan is not phases[-1] or step < plan.total_steps:  # the final state is tested anyway
                yield plan, name, tuple(entry.tested_variants), step, None


def _at_rungs(search: SearchSpec | None, phases: Sequence[PhasePlan]) -> Iterator[_Wanted]:
    """Yield what a search compares its trials by."""
    if search is None or search.scheduler is None:
        return
    for rung, steps in rung_steps(phases, search.scheduler.rungs).items():
        *_, (plan, step) = stretches(phases, steps)
        for name, _ in filter(None, map(measured_by, search.objectives)):
            yield plan, name, (search.scheduler.under,), step, rung


class _Modules:
    """Learned modules that have weights, phase after phase; where weights may bring their own, nothing is known."""

    def __init__(self, spec: ExperimentSpec, facts: ModelFacts | None) -> None:
        brings = spec.model.weights == "pretrained" or any(
            p.start_from is not None for p in spec.phases.by_name.values()
        )
        self._known: set[str] | None = None if brings else set()
        self._layers = (0, 0) if facts is None else (facts.num_layers, facts.vision_depth)
        # By the point itself, which the actions of a policy share: there may be thousands.
        self._names: dict[int, tuple[Mapping[str, Any], str | None]] = {}

    def check(self, job: EvaluationJob, plan: PhasePlan, step: int, where: str) -> None:
        """Check that a state has weights for what an evaluation attaches.

        Raises:
            UsageError: no stage has used a learned compressor of its points yet.
        """
        if self._known is None or not (wanted := self._of(job.points)):
            return
        used = (action for action in plan.table if action.first_step < step)
        if not wanted <= self._known.union(*(self._of(action.all_points) for action in used)):
            raise UsageError(
                f"{where}: after step {step} of phases.{plan.name} no stage has used the learned "
                f"compressor that `{job.under}` attaches, which has no weights yet; test under `full` or another "
                "variant along the way, and under this one in an evaluation of its own `at: end`"
            )

    def pass_through(self, plan: PhasePlan) -> None:
        """Take in what a phase uses."""
        if self._known is not None:
            self._known.update(*(self._of(action.all_points) for action in plan.table))

    def _of(self, points: Iterable[Mapping[str, Any]]) -> set[str]:
        return {name for point in points if (name := self._name(point)) is not None}

    def _name(self, point: Mapping[str, Any]) -> str | None:
        if id(point) not in self._names:
            spec = registry.spec_class(registry.COMPRESSORS, point["kind"]).model_validate(point)
            self._names[id(point)] = point, spec.module_name(*self._layers)
        return self._names[id(point)][1]


def _weights_seed(spec: ExperimentSpec) -> int:
    """Return the seed of drawn weights: the first phase's, so that a fixed seed is shared along a seed axis."""
    if not identity_fields.draws_weights(spec.model):
        return 0
    first = spec.phases.pretrain or spec.phases.finetune
    return spec.seed if first is None or first.seed is None else first.seed


def _settings(model: ModelSpec) -> str:
    return digest(identity_fields.settings_identity(model))


def _facts(model: ModelSpec) -> ModelFacts | None:
    return model_facts(model.model_name_or_path, model.revision)


def _dump(spec: Spec) -> dict[str, Any]:
    return spec.model_dump(mode="json")


def _variant_of(where: str, points: tuple[Any, ...], facts: ModelFacts | None, images: MeasuredRows | str) -> Variant:
    try:
        measured = images if isinstance(images, str) else images.units
        resolved = (
            identity_fields.resolve_points(points, None, None)
            if facts is None
            else identity_fields.resolve_points(
                points, facts.num_layers, facts.visual_grid, facts.vision_depth, measured
            )
        )
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error
    return Variant(resolved, identity_fields.points_identity(points, resolved))


def _model(model: ModelSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    return identity_fields.model_identity(model), _dump(model)


def _root(model: dict[str, Any], dump: dict[str, Any], drawn: bool, seed: int, plugins: tuple[str, ...]) -> RootJob:
    identity = digest({"semantics": SEMANTICS_VERSION, "model": model, **({"seed": seed} if drawn else {})})
    return RootJob(identity, dump, seed, tuple(plugins))


def _recipe_digest(recipe: PhaseSpec) -> str:
    return digest(identity_fields.recipe_identity(recipe))


def _data(data: Any) -> tuple[str, dict[str, Any], list[str]]:
    """Return the identity; the spec as a mapping and its content's digest; what users should know."""
    identity, notice = identity_fields.data_identity(data)
    notes = [notice] if notice else data.remarks()
    return digest(identity), {"spec": _dump(data), "content": identity["content"]}, notes


def _evaluation(entry: EvaluationSpec) -> tuple[str, dict[str, Any]]:
    # When it tests, and which cells, is nothing that a worker asks for.
    return digest(identity_fields.evaluation_identity(entry)), entry.model_dump(mode="json", exclude={"at", "cells"})


def steps_of_cost(target: float, price: Callable[[int], float | None], at_most: bool) -> int:
    """Return the optimizer steps whose cost is nearest to a target, or the most that stay within it.

    Args:
        target: TFLOPs.
        price: TFLOPs of a number of steps, rising with it; None where so few steps cannot be divided into stages.
        at_most: The cost may not exceed the target.

    Raises:
        ValueError: not even the fewest steps the schedule can have stay within the target.
    """

    def cost(steps: int) -> float:
        found = price(steps) if steps else None
        return 0.0 if found is None else found

    low, high = 0, 1
    while cost(high) < target:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) < target else (low, middle)
    nearer = cost(high) == target if at_most else cost(high) - target <= target - cost(low)
    steps = high if nearer else low
    if not steps or price(steps) is None:
        steps_cost = f"{high} step{'s' if high > 1 else ''} cost {cost(high):,.3g}"
        raise ValueError(f"{target:,.3g} TFLOPs are too few for its schedule: {steps_cost}")
    return steps

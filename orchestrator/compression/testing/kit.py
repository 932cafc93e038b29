"""`check_compressor`: what every compressor must hold on every model family, for authors inside and outside."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from orchestrator import registry
from orchestrator.compression import Attachment
from orchestrator.compression.families import Family
from orchestrator.compression.testing.families import TINY
from orchestrator.compression.testing.method import (
    always_alike,
    global_random_state,
    method_errors,
    same_random_state,
)
from orchestrator.compression.testing.reference import Reference, draws, gradients
from orchestrator.compression.testing.tiny import Batch, Bench, TinyFamily
from orchestrator.errors import UsageError
from orchestrator.spec.base import validation_text
from orchestrator.spec.checks.places import implementation_error
from orchestrator.spec.components import CompressorSpec, Grid

PROVEN = "proven"
PointLike = CompressorSpec | type[CompressorSpec] | Mapping[str, Any] | Path
_AMOUNTS: tuple[dict[str, Any], ...] = (
    {"stride": 2},
    {"keep_ratio": "1/2"},
    {"keep_tokens": 2},
    {"keep_tokens": 1},
    {"stride": 9},
)
_AMOUNTS_AT_MOST = ({"keep_ratio": "3/4"}, *_AMOUNTS)  # room for numbers that differ
_AMOUNT_NAMES = ("stride", "keep_tokens", "keep_ratio")


@dataclass(frozen=True)
class Report:
    """What the contract kit found.

    Attributes:
        families: For each family `proven`, or `refused: ` and why it cannot be served.
    """

    families: Mapping[str, str]

    @property
    def proven(self) -> tuple[str, ...]:
        """Families on which every check held."""
        return tuple(name for name, result in self.families.items() if result == PROVEN)

    @property
    def refused(self) -> dict[str, str]:
        """The reason of each family that the points cannot run on."""
        return {name: result.removeprefix("refused: ") for name, result in self.families.items() if result != PROVEN}

    @property
    def lines(self) -> tuple[str, ...]:
        """A line a family."""
        return tuple(f"{name}: {result}" for name, result in self.families.items())

    def __str__(self) -> str:
        return "\n".join(self.lines)


def check_compressor(points: PointLike | str | Sequence[PointLike], families: Iterable[str] | None = None) -> Report:
    """Prove a compressor on tiny random models: one line in a plug-in's tests.

    On each family: with all tokens kept the loss is the plain model's to 1e-6 and so are the gradients; loss and
    gradients equal a plain computation, row by row without padding, in mixed batches (text only, one, two and three
    images of unequal size, a video), padded left and right, eager and sdpa, with and without activation checkpointing;
    `generate` with a KV cache equals recomputing everything; without an attention mask the answer sees the image;
    switch and detach leave no trace. The method itself must keep what its spec says (an adaptive one at most, and not
    of every image as much), let every image be as it is alone, remember nothing, and draw from the context's seed only.

    Args:
        points: A compressor as a mapping with a `kind`, a spec, a spec class or a plug-in file that defines one; or
            several of them. Without `layer` the kit tries those a family allows (and the projector, where the method
            acts there); without an amount it chooses one.
        families: Names in `orchestrator.compression.testing.families.TINY`; by default all.

    Raises:
        AssertionError: something does not hold; the message lists the checks with family, setting and numbers. Also
            where every family refuses the points, since nothing is proven then.
        UsageError: the points are no compressor, or a family is not known.

    Example:
        >>> check_compressor({"kind": "average_pool", "stride": 2}, ["llava"])
    """
    chosen = _choose(families)
    points = Path(points) if isinstance(points, str) else points
    results: dict[str, str] = {}
    errors: list[str] = []
    cause: Exception | None = None
    for name in chosen:
        try:
            errors += [f"{name}: {message}" for message in check_cell(points, name)]
            results[name] = PROVEN
        except Refused as error:
            results[name] = f"refused: {error}"
        except Stopped as error:
            cause = cause or error
            errors.append(f"{name}: {error}")
    if errors:
        text = f"{len(errors)} checks of the contract kit failed:\n  " + "\n  ".join(errors)
        raise AssertionError(text) from cause
    report = Report(results)
    if not report.proven:
        raise AssertionError(f"no family can run it, so nothing is proven:\n  {report}".replace("\n", "\n  "))
    return report


class Refused(Exception):
    """A family cannot run the points; the message says why."""


class Stopped(Exception):
    """Something raised an error before all checks were done."""


def check_cell(points: PointLike | Sequence[PointLike], family: str) -> list[str]:
    """Return the errors of points on one family, in words.

    Raises:
        Refused: the family cannot run them.
        Stopped: the method, or the model with it, raised an error.
    """
    bench = bench_of(family)
    several = [_candidate(point) for point in (points if isinstance(points, Sequence) else [points])]
    places = _places(several, bench)
    keep_all = _all_kept(several, bench)
    found: list[str] = []
    try:
        for message in Cell(bench, places, keep_all).errors():
            found.append(message)
    except Exception as error:
        messages = [*found, f"an error stopped the checks: {type(error).__name__}: {error}"]
        raise Stopped(f"\n  {family}: ".join(messages)) from error
    return found


def first_place(points: PointLike | Sequence[PointLike], family: str) -> list[CompressorSpec]:
    """Return the points with layer and amount as the kit tries them first on a family.

    Raises:
        Refused: the family cannot run them.
    """
    several = [_candidate(point) for point in (points if isinstance(points, Sequence) else [points])]
    return _places(several, bench_of(family))[0]


@functools.cache
def bench_of(family: str) -> Bench:
    """Return the models of a family; built once in a process."""
    return Bench(TINY[family])


def _choose(families: Iterable[str] | None) -> tuple[str, ...]:
    chosen = tuple(TINY) if families is None else tuple(families)
    unknown = sorted(set(chosen) - set(TINY))
    if unknown:
        raise UsageError(f"check_compressor: no family {', '.join(unknown)}; known: {', '.join(TINY)}")
    return chosen


@dataclass(frozen=True)
class Candidate:
    """A compressor with some of its parameters; layer and amount may be missing."""

    cls: type[CompressorSpec]
    given: Mapping[str, Any]

    @property
    def has_amount(self) -> bool:
        """It says how many tokens it keeps, or has nothing to say."""
        return not self.cls.takes_amount or any(name in self.given for name in _AMOUNT_NAMES)

    def spec(self, **more: Any) -> CompressorSpec:
        """Return the spec with these parameters, too.

        Raises:
            UsageError: it does not validate.
        """
        value = {"kind": self.cls.kind_name(), **self.given, **more}
        try:
            return self.cls.model_validate(value)
        except ValidationError as error:
            raise UsageError(f"check_compressor: {value!r} is no compressor: {validation_text(error)}") from error

    def all_kept(self) -> Candidate:
        """Return the candidate with every token kept."""
        rest = {name: value for name, value in self.given.items() if name not in _AMOUNT_NAMES}
        return Candidate(self.cls, {**rest, "keep_ratio": 1})


def _candidate(point: PointLike) -> Candidate:
    if isinstance(point, CompressorSpec):
        return Candidate(type(point), point.model_dump(exclude_none=True))
    cls = registry.class_of(point, registry.COMPRESSORS, "check_compressor")
    if wrong := implementation_error(cls):
        raise UsageError(f"check_compressor: {cls.kind_name()}: {wrong}")
    return Candidate(cls, point if isinstance(point, Mapping) else {})


def _places(points: Sequence[Candidate], bench: Bench) -> list[list[CompressorSpec]]:
    """Return the points at every place worth trying that the family allows.

    Raises:
        Refused: there is none.
    """
    found, reasons = [], []
    for layers in _layers(points, bench.tiny):
        try:
            several = _complete(points, layers, bench.grids)
            with bench.attached("plain", several):  # so that a refusal is seen before any check
                found.append(several)
        except (UsageError, ValueError) as error:
            reasons.append(str(error))
    if not found:
        raise Refused(reasons[0].removeprefix("attach: "))
    return found


def _layers(points: Sequence[Candidate], tiny: TinyFamily) -> list[list[Any]]:
    """Return the layers to try for the points that name none; several points go down the depth."""
    if all("layer" in point.given for point in points):
        return [[None] * len(points)]
    cls = points[0].cls
    implementation = registry.load_object(cls.implementation)
    enters = hasattr(implementation, "enter") and hasattr(implementation, "compress")
    above = {"queries", "keys"} & set(cls.needs) or enters or cls.enters_late or cls.keeps_none
    first = max(tiny.first_layer, 1 if above else 0)
    if not hasattr(implementation, "compress"):  # what it adds stays
        return [[0] * len(points)]
    if len(points) > 1:
        return [[min(first + number, tiny.layers - 1) for number in range(len(points))]]
    inside = dict.fromkeys([first, max(first, tiny.layers - 2)]) if "decoder" in cls.points else {}
    early = [layer for place, layer in _EARLY.items() if place in cls.points]
    return [[layer] for layer in [*inside, *early]]


_EARLY = {"projector": "projector", "tower": "tower:1"}
"""Where a point before the decoder acts; the kit's vision towers have two layers or more, one of them behind it."""


def _complete(points: Sequence[Candidate], layers: Sequence[Any], grids: Sequence[Grid]) -> list[CompressorSpec]:
    """Return the specs with a layer and an amount.

    Raises:
        ValueError: no amount fits the family's images.
    """
    specs = []
    for point, layer in zip(points, layers, strict=True):
        more = {} if layer is None or "layer" in point.given else {"layer": layer}
        spec = _with_amount(point, more, grids)
        specs.append(spec)
        grids = tuple(spec.kept_grid(grid) for grid in grids)
    return specs


def _with_amount(point: Candidate, more: Mapping[str, Any], grids: Sequence[Grid]) -> CompressorSpec:
    reason: Exception | None = None
    amounts = _AMOUNTS_AT_MOST if point.cls.adaptive else _AMOUNTS
    for amount in ({},) if point.has_amount else amounts:
        try:
            spec = point.spec(**more, **amount)
            for grid in grids:
                spec.kept_tokens(grid)
        except (UsageError, ValueError) as error:
            # What the images' grids forbid says more than that an amount is none of the method's.
            reason = error if reason is None or isinstance(reason, UsageError) else reason
            continue
        return spec
    assert reason is not None
    raise reason


def _all_kept(points: Sequence[Candidate], bench: Bench) -> list[list[CompressorSpec]]:
    """Return the points where they keep every token, if the method then keeps them as they are."""
    if not all(point.cls.keeps_all for point in points):
        return []
    return _places([point.all_kept() for point in points], bench)


EXACT, CLOSE, GRADIENTS, LOGITS = 1e-6, 1e-5, 3e-5, 1e-4
_SEEDS = range(8)
_STEPS = 4
_LAST_BIT = 6e-8  # of float32


@dataclass(frozen=True)
class Setting:
    """One way of running a batch that may not change the numbers."""

    place: int
    other: bool
    padding: str
    runs: tuple[tuple[str, bool], ...]


@dataclass
class Cell:
    """A method on a family.

    Attributes:
        bench: The family's models.
        places: The points to try, each a list of specs.
        keep_all: The points with all tokens kept; empty where the method never keeps them as they are.
    """

    bench: Bench
    places: Sequence[Sequence[CompressorSpec]]
    keep_all: Sequence[Sequence[CompressorSpec]] = ()

    def errors(self) -> Iterator[str]:
        """Yield the errors, in words and numbers.

        Raises:
            UsageError: the family refuses the points.
        """
        alone = list(self._method_alone(self.places[0]))
        yield from alone
        if alone:
            return  # all else would only repeat it
        for setting in self._settings():
            yield from self._against_reference(setting)
        for number, points in enumerate(self.keep_all):
            yield from self._keep_all(points, number)
        yield from self._generation(self.places[-1])
        yield from self._gap(self.places[0])
        yield from self._life(self.places[0], self.places[-1])

    def _settings(self) -> list[Setting]:
        """Return every padding, batch and place, and in both kinds of attention with and without checkpointing."""
        found = []
        for place in range(len(self.places)):
            other = place % 2 == 1
            one, two = self.bench.tiny.attentions[0], self.bench.tiny.attentions[-1]
            runs = ((one, False), (two, True)) if other else ((two, False), (one, True))
            found.append(Setting(place, other, "left" if other else "right", runs if place < 2 else runs[:1]))
        if len(found) == 1:
            found.append(Setting(0, True, "left", ((one, False), (two, True))))
        return found

    def _method_alone(self, points: Sequence[CompressorSpec]) -> Iterator[str]:
        """Return the first call that is not what a method must be, in the plain computation of the first batch."""
        batch = self.bench.batch(self.bench.rows(False), "right")
        with self.bench.attached(self.bench.tiny.attentions[0], points) as (_, attachment):
            reference = self.bench.reference(attachment)
            reference.rows(batch.inputs, batch.units, attachment.points)
        for call in reference.calls:
            errors = [f"{call.spec.kind}, {place_of([call.spec])}: {message}" for message in method_errors(call)]
            if errors:
                yield from errors
                return
        for point in attachment.points:
            calls = [call for call in reference.calls if call.spec is point.spec and not call.enters]
            if point.spec.adaptive and always_alike(calls):
                yield (
                    f"{point.spec.kind}, {place_of([point.spec])}: its spec says `adaptive`, and it left as many "
                    "tokens of every image; if its number does not depend on the image, do not say so"
                )

    def _against_reference(self, setting: Setting) -> Iterator[str]:
        points = self.places[setting.place]
        where = f"{place_of(points)}, {setting.padding} padding, {'second' if setting.other else 'first'} batch"
        with self.bench.attached(setting.runs[0][0], points) as (_, attachment):
            reference = self.bench.reference(attachment)
            resolved = attachment.points
        rows = self.bench.rows(setting.other)
        for seed in _SEEDS:
            found = steady_batch(self.bench, reference, resolved, rows, setting.padding, seeds=(seed,))
            if found is None:
                continue
            batch, expected = found
            wanted = reference.gradients(expected)
            errors = list(self._compared(setting, where, batch, expected, wanted))
            if errors and seed != _SEEDS[-1] and hangs_on_rounding(reference, batch, resolved, wanted):
                continue
            yield from errors
            return
        yield f"{where}: {_NEVER_STEADY}"

    def _compared(
        self, setting: Setting, where: str, batch: Batch, expected: Tensor, wanted: dict[str, Tensor]
    ) -> Iterator[str]:
        points = self.places[setting.place]
        for attention, checkpointing in setting.runs:
            how = f"{where}, {attention}, checkpointing {'on' if checkpointing else 'off'}"
            with self.bench.attached(attention, points) as (model, attachment), checkpointed(model, checkpointing):
                before = global_random_state()
                loss = run(model, attachment, batch).loss
                if not same_random_state(before, global_random_state()):
                    yield f"{how}: the forward moved a global random state (torch, numpy or random)"
                yield from differs(f"{how}: loss against the plain computation", loss, expected, CLOSE)
                yield from gradient_errors(how, gradients(model, loss), wanted, GRADIENTS)

    def _keep_all(self, points: Sequence[CompressorSpec], number: int) -> Iterator[str]:
        how = f"all tokens kept, {place_of(points)}"
        batch = self.bench.batch(self.bench.rows(bool(number % 2)), "left" if number % 2 else "right")
        attention = self.bench.tiny.attentions[-1]
        plain = self.bench.model(attention)
        expected = run(plain, None, batch).loss
        wanted = gradients(plain, expected)
        with self.bench.attached(attention, points) as (model, attachment):
            loss = run(model, attachment, batch).loss
            yield from differs(f"{how}: loss against the plain model", loss, expected, EXACT)
            yield from gradient_errors(how, gradients(model, loss), wanted, GRADIENTS)

    def _generation(self, points: Sequence[CompressorSpec]) -> Iterator[str]:
        """Compare cached steps with recomputing everything, and the first with the plain computation."""
        how = f"generate, {place_of(points)}"
        attention = self.bench.tiny.attentions[-1]
        rows = self.bench.rows(False)[:3]
        with self.bench.attached(attention, points) as (model, attachment), torch.no_grad():
            model.eval()
            reference = self.bench.reference(attachment)
            reference.family.model.eval()
            try:
                found = steady_batch(self.bench, reference, attachment.points, rows, "left", answer=0)
            finally:
                reference.family.model.train()
            if found is None:
                yield f"{how}: {_NEVER_STEADY}"
                return
            batch, first_BV = found
            cached, recomputed = (
                generate(model, attachment, batch, reference.family, use_cache=choice) for choice in (True, False)
            )
            yield from differs(f"{how}: first logits against the plain computation", cached.logits[0], first_BV, LOGITS)
            same_B = torch.ones(batch.rows, dtype=torch.bool)
            start = batch.inputs["input_ids"].shape[1]
            for step, (one_BV, other_BV) in enumerate(zip(cached.logits, recomputed.logits, strict=True)):
                what = f"{how}: logits of step {step + 1} with a KV cache against recomputing everything"
                yield from differs(what, one_BV[same_B], other_BV[same_B], LOGITS)
                # After two tokens that differ (a tie of logits) rows go their own ways.
                same_B &= cached.sequences[:, start + step] == recomputed.sequences[:, start + step]

    def _gap(self, points: Sequence[CompressorSpec]) -> Iterator[str]:
        """Check that without a mask a gap in position ids does not cut image from text (the packed-sequence trap)."""
        how = f"without attention_mask, {place_of(points)}"
        batch = self.bench.batch([[3, next(iter(self.bench.tiny.units)), 7]], "right")
        bare = Batch({name: value for name, value in batch.inputs.items() if name != "attention_mask"}, batch.units)
        plain = self.bench.model(self.bench.tiny.attentions[-1])
        with torch.no_grad():
            loss, masked = (run(plain, None, one).loss for one in (bare, batch))
            mask_matters = list(differs("the plain model", loss, masked, CLOSE))
        with self.bench.attached(self.bench.tiny.attentions[-1], points) as (model, attachment), torch.no_grad():
            loss, masked = (run(model, attachment, one).loss for one in (bare, batch))
            if not mask_matters:  # some models number positions of images only where there is a mask
                yield from differs(f"{how}: loss against the same with a mask of ones", loss, masked, CLOSE)
            other = {
                name: value + 1.0 if isinstance(value, Tensor) and value.is_floating_point() else value
                for name, value in bare.inputs.items()
            }
            moved = float((run(model, attachment, Batch(other, batch.units)).loss - loss).abs())
            if not moved > 1e-5:
                yield f"{how}: other pixels move the loss by {moved:.1e} only; the answer does not see the image"

    def _life(self, points: Sequence[CompressorSpec], others: Sequence[CompressorSpec]) -> Iterator[str]:
        """Check that switch equals a fresh attachment, nothing is remembered, and detach restores the model."""
        attention = self.bench.tiny.attentions[-1]
        plain = self.bench.model(attention)
        batch, other_batch = (self.bench.batch(self.bench.rows(other), "left") for other in (False, True))
        expected = run(plain, None, batch).loss
        before = trace(plain)
        learned = [point for point in [*points, *others] if point.learns]
        with self.bench.attached(attention, points, learned) as (model, attachment):
            first = run(model, attachment, batch).loss
            run(model, attachment, other_batch).loss.backward()
            model.zero_grad()
            yield from differs(
                "a forward, another batch, the same forward again", run(model, attachment, batch).loss, first, 0.0
            )
            attachment.switch(others)
            run(model, attachment, batch)
            attachment.switch([])
            yield from differs("switch to full tokens", run(model, attachment, batch).loss, expected, EXACT)
            attachment.switch(points)
            yield from differs("switch back", run(model, attachment, batch).loss, first, 0.0)
        left = list(left_behind(before, trace(plain)))
        if left:
            yield f"detach leaves something behind: {'; '.join(left[:3])}"
        yield from differs("the plain model after detach", run(plain, None, batch).loss, expected, 0.0)


def run(model: nn.Module, attachment: Attachment | None, batch: Batch, **options: Any) -> Any:
    """Return a forward of a batch, drawing what the reference draws."""
    if attachment is not None:
        attachment.set_step(**draws(batch.rows))
    return model(**batch.inputs, **options)


_NEVER_STEADY = (
    "in every one of several batches the method chooses otherwise when its input moves by 1e-5, so that its choice "
    "hangs on the last bits; of tokens that are equal, take the first"
)


def steady_batch(
    bench: Bench,
    reference: Reference,
    points: Sequence[Any],
    rows: Any,
    padding: str,
    answer: int = 3,
    seeds: Sequence[int] = _SEEDS,
) -> tuple[Batch, Tensor] | None:
    """Return the first batch on which no method's choice is a near-tie, with the plain computation's loss.

    Without labels (`answer` 0) the last token's logits of each row take the loss's place. None where every batch is
    a near-tie.
    """
    for seed in seeds:
        batch = bench.batch(rows, padding, seed, answer)
        if answer:
            expected = reference.loss(batch.inputs, batch.units, points)
        else:
            found = reference.rows(batch.inputs, batch.units, points)
            expected = torch.stack([logits_NV[-1] for _, logits_NV in found])
        if not reference.unstable:
            return batch, expected
    return None


def hangs_on_rounding(reference: Reference, batch: Batch, points: Sequence[Any], wanted: Mapping[str, Tensor]) -> bool:
    """Return whether the plain computation's gradients move by more than half of what is allowed between two exact
    computations when its parameters move by half a unit in their last place: then they hang on the last bits.
    """
    parameters = list(reference.family.model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1 + _LAST_BIT * torch.sign(torch.sin(1e5 * parameter)))
    try:
        moved = reference.gradients(reference.loss(batch.inputs, batch.units, points))
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
    scale = max([1.0, *(float(one.abs().max()) for one in wanted.values())])
    gap = max((float((one - wanted[name]).abs().max()) for name, one in moved.items() if name in wanted), default=0.0)
    return gap > GRADIENTS * scale / 2


def place_of(points: Sequence[CompressorSpec]) -> str:
    """Return where points act, in words."""
    layers = [str(point.layer) for point in points]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"


def generate(model: Any, attachment: Attachment, batch: Batch, family: Family, use_cache: bool) -> Any:
    """Return a few greedy steps with their logits."""
    attachment.set_step(**draws(batch.rows))
    # Placeholders and their brackets must not be generated: they would announce images that are not there.
    special = set(special_tokens(model.config.to_dict()))
    special |= set(batch.inputs["input_ids"][family.visual_BN(batch.inputs["input_ids"])].tolist())
    return model.generate(
        **batch.inputs,
        max_new_tokens=_STEPS,
        min_new_tokens=_STEPS,
        do_sample=False,
        suppress_tokens=sorted(token for token in special if token >= 0),
        return_dict_in_generate=True,
        output_logits=True,
        use_cache=use_cache,
    )


def special_tokens(config: dict[Any, Any]) -> Iterator[int]:
    """Return all token ids that a config names."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from special_tokens(value)
        elif str(name).endswith(("token_id", "token_index")) and isinstance(value, int):
            yield value


def differs(what: str, got: Tensor, expected: Tensor, tolerance: float) -> Iterator[str]:
    """Return the message of a difference beyond `tolerance`, relative where values are larger than 1."""
    one, other = got.detach().float(), expected.detach().float()
    if one.shape != other.shape:
        yield f"{what}: the shape {tuple(one.shape)} instead of {tuple(other.shape)}"
        return
    if not one.numel():
        return
    allowed = tolerance * max(1.0, float(other.abs().max()))
    gap = float((one - other).abs().max())
    if not gap <= allowed:
        values = f": {float(one):.7g} instead of {float(other):.7g}" if one.numel() == 1 else ""
        yield f"{what}{values}: differs by {gap:.1e}, allowed {allowed:.1e}"


def gradient_errors(how: str, got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> Iterator[str]:
    """Return the gradient that differs most, where it differs by more than `tolerance` of the largest one."""
    scale = max((float(one.abs().max()) for one in wanted.values()), default=0.0)
    gaps = {}
    for name in {*got, *wanted}:
        one, other = got.get(name), wanted.get(name)
        if one is None or other is None:
            gaps[name] = max(float(each.abs().max()) for each in (one, other) if each is not None)
        else:
            gaps[name] = float((one - other).abs().max())
    allowed = tolerance * max(1.0, scale)
    worst = max(gaps, key=lambda name: gaps[name], default=None)
    if worst is None or scale < 1e-4:
        yield f"{how}: the gradients are all below {scale:.1e}; the comparison proves nothing"
    elif not gaps[worst] <= allowed:
        count = sum(gap > allowed for gap in gaps.values())
        yield f"{how}: {count} gradients differ, most {worst}, by {gaps[worst]:.1e}, allowed {allowed:.1e}"


@contextmanager
def checkpointed(model: Any, on: bool) -> Iterator[None]:
    """Activation checkpointing of a model within a block."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # transformers < 5.23
    if on:
        getattr(model, f"{name}_checkpointing_enable")()
    try:
        yield
    finally:
        if on:
            getattr(model, f"{name}_checkpointing_disable")()


def trace(model: nn.Module) -> dict[str, Any]:
    """Return a model's state: its modules' attributes, hooks, modes, parameters' values, and its configs."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name}: attributes"] = {key: _value(value) for key, value in module.__dict__.items()}
        found[f"{name}: submodules"] = {key: id(child) for key, child in module._modules.items()}
        found[f"{name}: hooks"] = {
            key: len(value) for key, value in module.__dict__.items() if key.endswith("_hooks") and value is not None
        }
        config = module.__dict__.get("config")
        if config is not None and hasattr(config, "to_json_string"):
            found[f"{name}: config"] = (id(config), config.to_json_string(use_diff=False))
    found["parameters"] = {name: (id(one), one.requires_grad) for name, one in model.named_parameters()}
    found["values"] = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return found


def _value(value: Any) -> Any:
    plain = isinstance(value, bool | int | float | str | type(None))
    return value if plain else type(value).__name__


def left_behind(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """Return the differences between two traces, in words."""
    for name in sorted({*before, *after} - {"values"}):
        one, other = before.get(name), after.get(name)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            keys = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
            yield f"{name or 'model'}: {', '.join(map(str, keys))}"
        else:
            yield f"{name or 'model'}"
    changed = [
        name
        for name, value in before["values"].items()
        if name in after["values"] and not torch.equal(value, after["values"][name])
    ]
    if changed:
        yield f"values of {', '.join(changed[:3])}"

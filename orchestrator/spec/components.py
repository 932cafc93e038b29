"""The four families of components, how a mapping with a `kind` becomes one, and what a schedule compiles to."""

from __future__ import annotations

import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from orchestrator import registry
from orchestrator.errors import shorten
from orchestrator.spec.base import Component, Count, Flag, Positive, Share, Spec, parse_share
from orchestrator.spec.sweep import Sweep, check_sweeps, swept

FULL, FINAL = "full", "final"  # reserved names of variants: no compressor, and the last stage's
# Fields of points that count only where they are not their default: what was written before them stays the same.
ADDED_LATER = ("keys_only", "inside_layer")
AMOUNTS = ("stride", "keep_tokens", "keep_ratio", "layer_average_tokens")


class DistillSpec(Spec):
    """Self-distillation: every step that is not under the fuller variant also learns from a pass under it.

    The loss is `(1 - weight) CE + weight T^2 KL(teacher || student)`, or with `added` `CE + weight T^2 KL`, both means
    over the label tokens of the global batch, `T` the temperature of both softmaxes; the teacher's pass is the same
    model's, without gradient. `T^2` keeps the size of the gradient (Hinton et al., arXiv 1503.02531, section 2); the
    default weight is EPIC's (0.3 SFT + 0.7 KL, arXiv 2510.00515). DualSpeed (arXiv 2602.03815) adds the divergence with
    weight 1 to the labels' loss.

    """

    added: Flag = False
    """Whether the distillation is added to the labels' loss, which keeps its own weight of 1."""
    weight: Positive = 0.7
    """Weight of the distillation: its share in the loss, at most 1, or with `added` its factor."""
    temperature: Positive = 1.0
    """Temperature that divides the logits of teacher and student."""
    teacher: str | None = Field(default=None, examples=["full"])
    """Variant of the teacher's pass; null takes the schedule's own fuller one."""

    @field_validator("weight")
    @classmethod
    def _share_of_one(cls, weight: float, info: ValidationInfo) -> float:
        if weight > 1 and not info.data.get("added"):
            text = "a share of the loss is at most 1; with `added: true` the weight is a factor"
            raise PydanticCustomError("distill_weight", text)
        return weight

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What it was before there was `added`, so that experiments without it keep their digests.
        return {name: value for name, value in dump(self).items() if name != "added" or value}


@dataclass(frozen=True)
class Teaching:
    """From whom the steps under some variant learn beside their labels (see `DistillSpec` for the loss)."""

    teacher: str
    weight: float
    temperature: float
    added: bool = False


@dataclass(frozen=True)
class Students:
    """Variants that further passes of a step run under, each learning from the step's own pass alone (`sandwich`).

    The step's loss is `CE(own) + weight sum_k T^2 KL(own || k)`, means over the label tokens of the global batch; no
    gradient flows into the own pass from what it teaches.
    """

    variants: tuple[str, ...]
    weight: float
    temperature: float


@dataclass(frozen=True)
class StageTable:
    """A compiled schedule: what every optimizer step of a phase does.

    Attributes:
        actions: `(first_step, last_step, variant name)`, 0-based, half open, gapless, equal neighbours merged.
        final: Variant the finished model is tested under.
        stage_ends: Where stage runs end, ascending, the phase's end last; empty means where an action ends. A policy
            that mixes variants step by step is one stage run: `(total_steps,)`.
        derived: Variants that the schedule makes itself: name -> (named variant, fields changed in its one point; with
            none it is that variant under another name).
        teachers: Variants whose steps also learn from a teacher's pass.
        students: Variants whose steps have further passes, which learn from them.
    """

    actions: tuple[tuple[int, int, str], ...]
    final: str
    stage_ends: tuple[int, ...] = ()
    derived: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    teachers: Mapping[str, Teaching] = field(default_factory=dict)
    students: Mapping[str, Students] = field(default_factory=dict)

    def problem(self, total_steps: int) -> str | None:
        """Return what keeps it from being the table of a phase of `total_steps` steps; None where nothing does."""
        done = 0
        for action in self.actions:
            first, last, _ = action
            if type(first) is not int or type(last) is not int or first >= last:
                return (
                    f"of {total_steps} steps the action {action} is no stretch (first, last, variant) of whole steps, "
                    "0-based, half open"
                )
            if first != done:
                how = "no action" if first > done else "two actions"
                return f"of {total_steps} steps step {min(first, done)} has {how}: {action}"
            done = last
        if done != total_steps:
            return f"the actions end at step {done} of {total_steps}; the last action ends with the phase"
        ends = self.stage_ends
        if ends and (ends[-1] != total_steps or not all(one < other for one, other in pairwise((0, *ends)))):
            return (
                f"of {total_steps} steps stage_ends is {shorten(str(ends))}; give rising steps up to {total_steps}, or "
                "() for where actions end"
            )
        return None


def merge_actions(steps: list[tuple[int, int, str]]) -> tuple[tuple[int, int, str], ...]:
    """Return a schedule's actions with equal neighbours merged into one."""
    actions: list[tuple[int, int, str]] = []
    for first, last, name in steps:
        if actions and actions[-1][2] == name:
            actions[-1] = (actions[-1][0], last, name)
        else:
            actions.append((first, last, name))
    return tuple(actions)


def teachers_of(distill: DistillSpec | None, variants: tuple[str, ...] | list[str], fuller: str) -> dict[str, Teaching]:
    """Return what each variant learns from: the fuller one teaches all but itself."""
    if distill is None:
        return {}
    teacher = distill.teacher or fuller
    teaching = Teaching(teacher, distill.weight, distill.temperature, distill.added)
    return {name: teaching for name in variants if name != teacher}


@lru_cache(maxsize=4096)
def nearest_block(height: int, width: int, wanted: int) -> tuple[int, int]:
    """Return the rows and columns, at most `height` and `width`, whose product is nearest to `wanted`.

    Of equally near products the smaller is taken; of a product's blocks the one whose shape is nearest to the grid's,
    of two equally near shapes the flatter one.

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        wanted: Tokens wanted.
    """

    def rank(block: tuple[int, int]) -> tuple[int, int, Fraction, int]:
        rows, columns = block
        stretch = Fraction(rows * width, columns * height)
        return abs(rows * columns - wanted), rows * columns, max(stretch, 1 / stretch), rows

    # For each number of rows only the two numbers of columns around the wanted product can be nearest.
    blocks = (
        (rows, columns)
        for rows in range(1, height + 1)
        for columns in {min(max(wanted // rows + more, 1), width) for more in (0, 1)}
    )
    return min(blocks, key=rank)


def amounts_around(height: int, width: int, wanted: int) -> tuple[int, ...]:
    """Return the nearest products of a block below and above `wanted`, rising; one at the ends of the range."""
    amounts = {rows * columns for rows in range(1, height + 1) for columns in range(1, width + 1)}
    below = [amount for amount in amounts if amount <= wanted]
    above = [amount for amount in amounts if amount >= wanted]
    return tuple(sorted({*([max(below)] if below else []), *([min(above)] if above else [])}))


@dataclass(frozen=True)
class Grid:
    """Shape of one image's (or frame's) visual tokens: rows x columns, in raster order.

    Attributes:
        height: Rows; of a video its frames' rows one below the other.
        width: Columns.
        frames: Frames of a video, for a method that acts across them; else 1.
        frame: Number of a frame in its video, 0 for a first one or an image of its own. It is no part of the shape.
    """

    height: int
    width: int
    frames: int = field(default=1, repr=False)
    frame: int = field(default=0, compare=False, repr=False)

    @property
    def tokens(self) -> int:
        """Number of visual tokens."""
        return self.height * self.width


def _parse_layer(value: Any) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError("a layer is counted from 0")
        return value
    if value == "projector":
        return "projector"
    if isinstance(value, str) and (value.endswith("%") or TOWER_LAYER.fullmatch(value)):
        if value.endswith("%") and not 0 <= parse_share(value.removeprefix("tower:")) < 1:
            raise ValueError("a share of the depth is at least 0% and less than 100%")
        return value
    raise ValueError(
        "a layer is a whole number, a share of the depth such as 50%, projector, or in the vision tower tower:12 or "
        "tower:50%"
    )


TOWER_LAYER = re.compile(r"tower:(0|[1-9][0-9]*)")


Layer = Annotated[int | str, BeforeValidator(_parse_layer)]


PLACES = ("tower", "projector", "decoder")
"""Where a compressor may act, in order of depth."""


class CompressorSpec(Component):
    """A point where a compressor acts, and how many tokens it leaves.

    A subclass declares in class variables where it can act, what it looks at, and whether it learns.
    """

    registry_group: ClassVar[str] = registry.COMPRESSORS
    points: ClassVar[tuple[str, ...]] = ("decoder",)
    """Where it can act: `decoder` (before any layer), `projector` (features between vision tower and projector),
    `tower` (patches before a layer of the vision tower).
    """
    needs: ClassVar[tuple[str, ...]] = ()
    """What it looks at beside the visual tokens, recorded for it only: `queries` (attention of the prompt's last token
    in layer K-1, `Context.attention_BN`), `keys` (keys of layer K-1, `row_keys_RND`), `cls` (the vision tower's CLS
    token, `cls_attention_BN` and `cls_keys_BND`), `text` (where the prompt's text is, `text_RN`), `pixels` (it resizes
    images), `tower_keys` (inside the vision tower, and nowhere else: keys of the attention before it,
    `tower_keys_BND`). A model that cannot give it refuses the point with the reason.
    """
    learns: ClassVar[bool] = False
    """It has a module that trains: the implementation has `create_module`, and `train: [compressor]` trains it.
    Override `module_operations`, so that its cost is counted, and `module_shape`, where an amount shapes the module.
    """
    keeps_all: ClassVar[bool] = True
    """Where every token is kept, they are left as they are, so that the plain model is computed. False for a method
    that makes new tokens in any case, as most that learn do.
    """
    across_frames: ClassVar[bool] = False
    """It gets all frames of a video as one image, whose grid says how many frames it has; an image is one frame."""
    enters_late: ClassVar[bool] = False
    """Visual tokens wait outside of the decoder until its layer, which then gets what layer 0 would have: the layers
    below see text only."""
    keeps_none: ClassVar[bool] = False
    """No visual token is left, units of one token (newlines) included: from its layer on the decoder sees text only. It
    overrides `kept_tokens`."""
    takes_amount: ClassVar[bool] = True
    """It leaves as many tokens as its amount says. False for a method that has none; it overrides `kept_tokens`."""
    adaptive: ClassVar[bool] = False
    """How many tokens it leaves depends on the image: the amount is the most (`kept_tokens`), and the implementation
    says how many each image has (`Kept.counts_B`). Costs and memory count the most.
    """

    layer: Layer = Field(examples=[2, "50%", "projector", "tower:12"])
    """Decoder layer before which it acts, `projector`, or `tower:N`: before layer N of the vision tower. Layers count
    from 0, the decoder's (the tower's) input; a share of the depth such as `50%` or `tower:50%` is rounded down.
    """
    stride: Count | None = Field(default=None, examples=[8])
    """Amount as windows: every `stride` visual tokens become one, the number rounded up. The amount is exactly one of
    `stride`, `keep_tokens`, `keep_ratio` and `layer_average_tokens`.
    """
    keep_tokens: Count | None = Field(default=None, examples=[72])
    """Amount as visual tokens kept of each image, frame or tile."""
    keep_ratio: Share | None = Field(default=None, examples=["1/4"])
    """Amount as the share of visual tokens kept: 1/4, 25% or 0.25."""
    layer_average_tokens: Count | None = Field(default=None, examples=[128])
    """Amount as the mean number of visual tokens over all decoder layers; the planner solves it for `keep_tokens`, or
    for `keep_ratio` over the data's images where these vary in size.
    """
    keys_only: Flag = False
    """Whether the tokens that are dropped stay as keys and values: as they are at the point, every later layer makes
    its keys and values of them, but no queries, attention output or MLP.
    """

    @model_validator(mode="after")
    def _one_amount(self) -> CompressorSpec:
        given = [name for name in AMOUNTS if getattr(self, name) is not None]
        if not self.takes_amount:
            if given:
                raise PydanticCustomError("no_amount", f"it takes no amount; drop {', '.join(given)}")
        elif len(given) != 1:
            raise PydanticCustomError("amount", f"the amount is exactly one of {', '.join(AMOUNTS)}")
        elif self.adaptive and self.layer_average_tokens is not None:
            raise PydanticCustomError(
                "amount", "its mean over layers depends on the images; give the most it leaves of one, keep_tokens"
            )
        return self

    @model_validator(mode="after")
    def _held_as_keys(self) -> CompressorSpec:
        if not self.keys_only:
            return self
        reasons = {
            "it acts before the decoder, where there are no keys": self.place != "decoder",
            "it makes new tokens": self.learns or not self.takes_amount,
            "it acts across the frames of a video": self.across_frames,
            "how many tokens it leaves depends on the image": self.adaptive,
            "size_bias counts what is still there twice": getattr(self, "size_bias", False),
            "tokens that stay keep their numbers": getattr(self, "positions", None) == "renumber",
        }
        for reason, holds in reasons.items():
            if holds:
                raise PydanticCustomError("keys_only", f"keys_only is not possible here: {reason}; drop it")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        defaults = {name: fields[name].default for name in ADDED_LATER if name in fields}
        return {name: value for name, value in dump(self).items() if name not in defaults or value != defaults[name]}

    def kept_tokens(self, grid: Grid) -> int:
        """Return the visual tokens left of an image: ceil(tokens / stride), or the number or share asked for; of an
        adaptive method the most.

        Raises:
            ValueError: the method cannot take this amount on this grid.
        """
        return amount_to_keep(self, grid.tokens)

    def kept_grid(self, grid: Grid) -> Grid:
        """Return the grid that what is left forms: one row, unless the method keeps rows and columns.

        Raises:
            ValueError: the method cannot take this amount on this grid.
        """
        kept = self.kept_tokens(grid)
        return grid if kept == grid.tokens and not self.adaptive else Grid(1, kept)

    def tokens_before(self, grid: Grid) -> int:
        """Return the visual tokens of an image in the layers before the point: more where a method adds some, none
        where it keeps the image out of them.
        """
        return 0 if self.enters_late else grid.tokens

    def nearest_amount(self, keep: int, grid: Grid) -> int:
        """Return the `keep_tokens` nearest to `keep` that the method can take on this grid."""
        return min(max(keep, 1), grid.tokens)

    def module_operations(self, grid: Grid, width: int) -> int:
        """Return the operations (two a multiply-add) of its learned module for one image, forward; 0 without one.

        The cost formula adds backward and recomputation itself; count matrix products, convolutions and attention.

        Args:
            grid: The image's tokens before the point.
            width: Width of the tokens where it acts.
        """
        return 0

    @property
    def place(self) -> Literal["tower", "projector", "decoder"]:
        """Where it acts, one of `points`."""
        if isinstance(self.layer, str) and self.layer.startswith("tower:"):
            return "tower"
        return "projector" if self.layer == "projector" else "decoder"

    def layer_index(self, num_layers: int) -> int:
        """Return the 0-based decoder layer it acts before: a share of the depth is rounded down; what acts before the
        decoder is 0.
        """
        if isinstance(self.layer, int):
            return self.layer
        return int(parse_share(self.layer) * num_layers) if self.place == "decoder" else 0

    def tower_index(self, tower_layers: int) -> int | None:
        """Return the 0-based layer of a vision tower of `tower_layers` it acts before; None outside of the tower."""
        if self.place != "tower":
            return None
        value = str(self.layer).removeprefix("tower:")
        return int(parse_share(value) * tower_layers) if value.endswith("%") else int(value)

    def sort_key(self, num_layers: int, tower_layers: int | None = None) -> tuple[int, int]:
        """Return what points are sorted by: place, then layer. Without `tower_layers`, those in the tower are equal."""
        inside = self.tower_index(tower_layers) if tower_layers is not None else None
        return PLACES.index(self.place), inside or self.layer_index(num_layers)

    def resolved_layer(self, num_layers: int, tower_layers: int = 0) -> int | str:
        """Return `layer` without shares: a number, `projector`, or `tower:N`."""
        index = self.tower_index(tower_layers)
        if index is not None:
            return f"tower:{index}"
        return self.layer if self.place == "projector" else self.layer_index(num_layers)

    def module_shape(self) -> dict[str, Any]:
        """Return what shapes the learned module; by default the method's own parameters, not its layer and amount."""
        return self.model_dump(mode="json", include=set(type(self).model_fields) - set(CompressorSpec.model_fields))

    def module_name(self, num_layers: int, tower_layers: int = 0) -> str | None:
        """Return the name of its learned module in a model of `num_layers` decoder layers, and `tower_layers` in its
        vision tower; None where it does not learn.

        Variants whose points are of one method at one place share a module if nothing that shapes it differs.
        """
        if not self.learns:
            return None
        layer = self.resolved_layer(num_layers, tower_layers)
        place = f"layer{layer}" if isinstance(layer, int) else layer.replace(":", "")
        digest = hashlib.sha256(json.dumps(self.module_shape(), sort_keys=True).encode()).hexdigest()
        return f"{self.kind.replace('.', '_')}_{place}_{digest[:8]}"


class BlockCompressorSpec(CompressorSpec):
    """A method that leaves h' x w' tokens of a grid of h x w: `block_to_keep` says which block an amount stands for."""

    def kept_tokens(self, grid: Grid) -> int:
        """Return the tokens of the block."""
        return self.kept_grid(grid).tokens

    def kept_grid(self, grid: Grid) -> Grid:
        """Return the block."""
        return Grid(*block_to_keep(self, grid))

    def nearest_amount(self, keep: int, grid: Grid) -> int:
        """Return the product of a block that is nearest to `keep`."""
        rows, columns = nearest_block(grid.height, grid.width, keep)
        return rows * columns


def adds_tokens(point: CompressorSpec) -> bool:
    """Return whether a method adds tokens at the decoder's input."""
    return type(point).tokens_before is not CompressorSpec.tokens_before


def adds_for_good(point: CompressorSpec) -> bool:
    """Return whether the tokens it adds stay to the last layer: then it has `enter` and no `compress`."""
    return adds_tokens(point) and not point.takes_amount


def adapts(points: Iterable[CompressorSpec]) -> bool:
    """Return whether how many tokens a variant leaves depends on the image: its costs are then upper bounds."""
    return any(point.adaptive for point in points)


def cannot_follow(point: CompressorSpec, before: Sequence[CompressorSpec]) -> tuple[str, str] | None:
    """Return the key of a point that does not go with the points before it, and why; None where it can act on theirs.

    An adaptive method may leave fewer tokens than any fixed number, and frames of one video that differ. Tokens that
    attention weighs by size do not stay as keys: a key has no token left whose size it could go by.
    """
    adaptive = next((one.kind for one in before if one.adaptive), None)
    if adaptive and point.across_frames:
        return "kind", f"{point.kind} acts across frames, and {adaptive} before it leaves another number of each"
    if adaptive and point.keep_tokens is not None and not point.adaptive:
        fewer = f"{adaptive} before it may leave fewer than keep_tokens {point.keep_tokens}"
        return "keep_tokens", f"{fewer}; give keep_ratio or stride"
    weighed = next((one.kind for one in before if getattr(one, "size_bias", False)), None)
    if weighed and point.keys_only:
        text = f"{weighed} before it has attention weigh tokens by size (size_bias), and a token that stays as a key"
        return "keys_only", f"{text} has none; give {weighed} size_bias: false, or drop keys_only"
    does = _in_the_tower(point)
    for one in before:
        did = _in_the_tower(one)
        if does and did and (does != did or does == _RESIZES):
            return "kind", f"{one.kind} {did}, and {point.kind} {does}: one point of a variant may; drop the other"
    return None


_RESIZES = "resizes the image"


def _in_the_tower(point: CompressorSpec) -> str:
    """Return what a point has to do with the vision tower; empty if nothing. Points of a variant only have it alike."""
    if point.place == "tower":
        return "acts inside the vision tower"
    if "pixels" in point.needs:
        return _RESIZES
    return "needs the CLS attention of a tower that sees the whole image" if "cls" in point.needs else ""


def text_only_problem(points: Sequence[CompressorSpec], layers: Sequence[int]) -> tuple[int, str] | None:
    """Return the number of the first point that layers without visual tokens forbid, and why; None where none is.

    Args:
        points: The points of one variant in the order in which they act.
        layers: The decoder layer of each; 0 for the projector.
    """
    enters = next((number for number, point in enumerate(points) if point.enters_late), None)
    ends = next((number for number, point in enumerate(points) if point.keeps_none), None)
    for number, (point, layer) in enumerate(zip(points, layers, strict=True)):
        if ends is not None and number > ends:
            where = f"{points[ends].kind} takes all visual tokens out at layer {layers[ends]}"
            return number, f"{where}, so {point.kind} after it has none; let {points[ends].kind} be the last point"
        first = 0
        if enters is not None and number != enters:
            first, where = layers[enters], f"{points[enters].kind} lets visual tokens in at layer {layers[enters]}"
            if point.enters_late:
                return number, f"{where}, and {point.kind} cannot a second time; let one point do it"
            if adds_tokens(point):
                return number, f"{where}, and {point.kind} adds tokens beside them at the decoder's input; drop one"
            if number < enters and layer > 0:
                return number, f"{where}, and {point.kind} acts before it; give it layer 0, or let it act after"
            if number > enters and layer <= first and {"queries", "keys"} & set(point.needs):
                return (
                    number,
                    f"{where}, and {point.kind} looks at the layer before its own; give it {first + 1}",
                )
        if point.keys_only and (ends is not None or (enters is not None and number <= enters)):
            seen = points[ends if ends is not None else enters or 0].kind
            return number, f"{seen} has layers that see text alone, and keys_only keeps keys of the image; drop one"
        if point.keeps_none and layer <= first:
            return number, f"{point.kind} at layer {layer}: no layer would see the image; give it {first + 1} or more"
    return None


class ScheduleSpec(Component):
    """How a phase is divided into stages. `compile` turns it into a table of optimizer steps."""

    registry_group: ClassVar[str] = registry.SCHEDULES

    @abstractmethod
    def variants(self) -> tuple[str, ...]:
        """Named variants it uses (teachers too, derived ones not), `full` included, in order of use."""

    @abstractmethod
    def compile(self, total_steps: int, global_batch_size: int) -> StageTable:
        """Return the table for a phase of `total_steps` optimizer steps.

        Raises:
            ValueError: a stage would be empty, or the stages leave a gap or exceed the phase.
        """

    def remarks(self, total_steps: int) -> list[str]:
        """Return what the table of a phase of `total_steps` does not hold of what was asked for; `validate` says it."""
        return []


class DataSpec(Component):
    """A named data set. Counting and reading rows needs no torch; pixels and tokens are the worker's business."""

    registry_group: ClassVar[str] = registry.DATA

    max_samples: Count | None = Field(default=None, examples=[2000])
    """Most rows used, spread evenly over the set; null uses all."""

    @abstractmethod
    def num_rows(self) -> int | None:
        """Return the number of usable rows, or None where the file does not exist and no `num_samples` is given."""

    def first_rows(self, count: int, folder: Path) -> DataSpec:
        """Return the set cut to `count` rows for a trial run; what files that takes go to `folder`."""
        return self.model_copy(update={"max_samples": min(count, self.max_samples or count)})

    @abstractmethod
    def content_digest(self) -> str:
        """Return the SHA-256 of the data's content, images included, not of its path.

        Raises:
            FileNotFoundError: the data does not exist.
            OSError: the storage fails, which says nothing about the data.
        """

    def has_videos(self) -> bool | None:
        """Return whether a row has a video; None where that is not known before the data is read."""
        return False

    def remarks(self) -> list[str]:
        """Return what a reader of results should know of the rows, such as how many were left out, and why."""
        return []

    def column_names(self) -> tuple[str, ...] | None:
        """Return the columns that every row has beside its conversation; None where that is not known before reading.

        An evaluation that needs another one is then an error at once.
        """
        return None

    def column_sources(self) -> Mapping[str, str]:
        """Return by column what it is called in the data; an evaluation is another one where that is another."""
        return {name: name for name in self.column_names() or ()}


def _as_entries(value: Any) -> Any:
    return (value,) if isinstance(value, str | dict) else value


class EveryStepsSpec(Spec):
    """Tests along the way: after every so many optimizer steps of each phase."""

    every_steps: Count = Field(examples=[500])
    """Optimizer steps from one test to the next; a test is also a full checkpoint."""


class EvaluationSpec(Component):
    """A named evaluation of finished cells."""

    registry_group: ClassVar[str] = registry.EVALUATIONS
    headline: ClassVar[tuple[str, ...]] = ("accuracy",)
    """The metrics that the table shows, for every `under`; those it lacks are left out, `--all` shows the rest."""
    metric_names: ClassVar[tuple[str, ...] | None] = None
    """All metrics it can report, so that an unknown one in `search.objectives` is an error before anything is trained;
    `*` stands for what only the data says (`accuracy_*`). None: not known before it has run."""

    columns: ClassVar[tuple[str, ...]] = ()
    """Columns that it needs of every row, such as `answers`: `validate` refuses data that does not have them."""
    is_measurement: ClassVar[bool] = False
    """Whether it measures the machine: run again it finds other numbers. It gets the state's weights alone, without the
    optimizer that training may have left in memory, and need not test every row."""

    data: str = Field(examples=["test"])
    """Data set to test on, by its name under `data`."""
    under: Annotated[
        tuple[str | Sweep, ...], BeforeValidator(_as_entries), Field(min_length=1), AfterValidator(check_sweeps)
    ] = Field(
        default=("final",),
        examples=[["final", "full"], {"kind": ["average_pool", "fastv"], "layer": [2, 8, 16], "stride": [2, 4, 8]}],
    )
    """What the model is tested under: `final` (the last stage's variant), `full` (no compression), or variants. A
    mapping is a sweep: a compressor's keys with a value or a list of values each, every combination a variant.
    """
    model_max_length: Count | None = None
    """Longest test prompt in tokens, counted before compression; null takes the last phase's."""
    at: Literal["end", "stage_ends"] | EveryStepsSpec = Field(default="end", examples=[{"every_steps": 500}])
    """When it tests: at the `end` alone, or along the way too: at `stage_ends`, or after every so many steps."""
    cells: Annotated[dict[str, Any], Field(min_length=1)] | None = Field(
        default=None, examples=[{"phases.finetune.schedule": "full"}]
    )
    """Axes of the grid and their values: only the cells that have them are tested; null tests all."""

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What it was before there were these, so that experiments without them keep their digests.
        defaults = {"at": "end", "cells": None}
        return {name: value for name, value in dump(self).items() if name not in defaults or value != defaults[name]}

    @cached_property
    def tested_variants(self) -> dict[str, CompressorSpec | None]:
        """What the model is tested under by name: a sweep's variants with their point, others with None."""
        found: dict[str, CompressorSpec | None] = {}
        for entry in self.under:
            found |= {entry: None} if isinstance(entry, str) else swept(entry)
        return found

    @property
    def shown(self) -> tuple[str, ...]:
        """What the table shows of it: names of metrics, `*` in them stands for any part; the headline by default."""
        return self.headline

    @property
    def needs_baseline(self) -> bool:
        """Whether `summary` needs the baseline's scores, so that `report.baseline` must name one."""
        return False

    def faults(self) -> Iterable[tuple[str, str, str | None]]:
        """Return what forbids it here, as field, message and hint: a package that is not installed, an unknown task."""
        return ()

    def parts(self, trained_on: Sequence[DataSpec]) -> Mapping[str, EvaluationSpec]:
        """Return what is tested, kept and resumed on its own, by the name that stands before its metrics.

        By default it is one piece, without a name.

        Args:
            trained_on: The data sets of the last phase.

        Raises:
            ValueError: they do not say what a part needs of them.
        """
        return {"": self}

    def source_digest(self) -> str | None:
        """Return the SHA-256 of code that the user names for it; None where there is none."""
        return None

    def summary(self, scores: Mapping[str, float], baseline: Mapping[str, float] | None) -> dict[str, float]:
        """Return further metrics, of the scores of all its parts under one variant.

        Args:
            scores: `PART/METRIC` to value; parts that are not done yet are missing.
            baseline: The same of the baseline's cell under `final`; None where there is none.
        """
        return {}


class GenerationSpec(EvaluationSpec):
    """An evaluation of generated answers: greedy, one an answer, prompts of like length together."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    batch_size: Count = 256
    """Prompts generated for at once on each worker; it changes no score."""
    max_new_tokens: Count = 16
    """Longest answer in tokens; generation ends earlier where every answer has ended."""


def _component(group: str) -> Callable[[Any], Any]:
    def build(value: Any) -> Any:
        if isinstance(value, Component):
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError("component_type", "expected a mapping with a `kind`")
        known = registry.kinds(group)
        kind = value.get("kind")
        if kind is None:
            raise PydanticCustomError("component_kind_missing", "the key `kind` is missing", {"known": list(known)})
        if not isinstance(kind, str) or kind not in known:
            raise PydanticCustomError("component_kind", "unknown kind", {"known": list(known), "kind": str(kind)})
        try:
            cls = registry.spec_class(group, kind)
        except (ImportError, AttributeError) as error:
            text = "the component {kind} cannot be imported: {reason}"
            raise PydanticCustomError("component_import", text, {"kind": kind, "reason": str(error)}) from error
        if missing := sorted(getattr(cls, "__abstractmethods__", ())):
            text = "the component {kind} lacks {missing}; its base class says what it is"
            raise PydanticCustomError("component_abstract", text, {"kind": kind, "missing": ", ".join(missing)})
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            # The loader unfolds these with the outer location in front.
            raise PydanticCustomError("component", "errors inside", {"errors": error.errors()}) from error

    return build


Compressor = Annotated[SerializeAsAny[CompressorSpec], BeforeValidator(_component(registry.COMPRESSORS))]
Schedule = Annotated[SerializeAsAny[ScheduleSpec], BeforeValidator(_component(registry.SCHEDULES))]
Data = Annotated[SerializeAsAny[DataSpec], BeforeValidator(_component(registry.DATA))]
Evaluation = Annotated[SerializeAsAny[EvaluationSpec], BeforeValidator(_component(registry.EVALUATIONS))]
Points = tuple[Compressor, ...]


def amount_to_keep(spec: CompressorSpec, tokens: int) -> int:
    """Return the tokens kept of `tokens`: one a window of `stride`, `keep_tokens`, or `keep_ratio`, rounded.

    Raises:
        ValueError: more tokens are asked for than there are, and not as the most (`adaptive`).
    """
    if spec.stride is not None:
        return -(-tokens // spec.stride)
    if spec.keep_tokens is not None:
        if spec.keep_tokens > tokens and not spec.adaptive:
            raise ValueError(f"keep_tokens {spec.keep_tokens} is more than the image's {tokens} tokens")
        return min(spec.keep_tokens, tokens)
    if spec.keep_ratio is not None:
        return max(1, round(Fraction(spec.keep_ratio) * tokens))
    raise ValueError("layer_average_tokens is solved by the planner before a method sees it")


def block_to_keep(spec: CompressorSpec, grid: Grid) -> tuple[int, int]:
    """Return the rows and columns that a two-dimensional method leaves: h' <= h and w' <= w, nearest in shape.

    `keep_tokens` is met exactly; `stride` (ceil(tokens / stride)) and `keep_ratio` by the nearest product there is.

    Raises:
        ValueError: more tokens are asked for than there are, or no block has exactly `keep_tokens` tokens.
    """
    wanted = amount_to_keep(spec, grid.tokens)
    rows, columns = nearest_block(grid.height, grid.width, wanted)
    if spec.keep_tokens is not None and rows * columns != wanted:
        near = " or ".join(str(amount) for amount in amounts_around(grid.height, grid.width, wanted))
        raise ValueError(
            f"keep_tokens {wanted} is no product of at most {grid.height} rows and {grid.width} columns; "
            f"the nearest possible is {near}"
        )
    return rows, columns


def derive(points: tuple[CompressorSpec, ...], changes: Mapping[str, Any]) -> tuple[CompressorSpec, ...]:
    """Return a variant of one point with some fields changed; a new amount takes the place of the old one.

    Raises:
        ValueError: the variant has several points, the method refuses a value, or its module would be another
            with them.
    """
    if not changes:
        return points
    if len(points) != 1:
        raise ValueError(f"only a variant of one point can be changed step by step; this one has {len(points)}")
    point = points[0]
    if point.learns and "layer" in changes:
        raise ValueError(f"{point.kind} learns for its layer; moving the layer would begin a new module at each move")
    fields = point.model_dump(exclude_unset=True) | {"kind": point.kind}
    if set(changes) & set(AMOUNTS):
        fields = {name: value for name, value in fields.items() if name not in AMOUNTS}
    shown = ", ".join(f"{name} {value}" for name, value in changes.items())
    try:
        changed = type(point).model_validate(fields | dict(changes))
    except ValidationError as error:
        raise ValueError(f"{point.kind} cannot take {shown}: {error.errors()[0]['msg']}") from error
    if point.learns and changed.module_shape() != point.module_shape():
        raise ValueError(f"{shown} shapes what {point.kind} learns; moving it would begin a new module at each move")
    return (changed,)

"""The cost formulas: floating-point operations and visual tokens of forward passes and stage runs.

One multiply-add is 2 operations. Figures are per sample; `n` is visual plus text tokens of a layer, `d` the hidden
size, `f` the MLP's inner size, `V` the vocabulary, `h` heads of size `a`, `h_kv` key-value heads (GQA), `m` = 3 for a
gated MLP, else 2.

| part            | forward operations                                                                        |
|-----------------|-------------------------------------------------------------------------------------------|
| decoder linear  | `2 n W` a layer, `W = d (h + 2 h_kv) a + h a d + m d f` |
| attention       | `2 n^2 h a` a layer: scores and weighted sum, each `2 n^2 h a`, of which a causal mask needs half |
| keys alone      | `4 k d h_kv a + 4 n k h a` a layer, `k` tokens that a `keys_only` point dropped               |
| LM head         | `2 d V` a label token: logits are computed only where a label needs them                     |
| projector       | `2 (p_in p_hidden + p_hidden d)` a token it takes (a point at the projector leaves it fewer) |
| vision tower    | `n_v (8 D^2 + 4 D F) + 4 n_v^2 D` a layer that is used, `n_v` with the class token; full attention |
| compressor      | a learned method's own count (`module_operations`); choosing and merging are left out |
| last layer, unread | `2 u (W - 2 d h_kv a) + 2 u^2 h a`, `u` its tokens without a label: counted above, but not done |

A point inside the vision tower (`tower:N`) leaves fewer `n_v` from layer N on (with `inside_layer` from its MLP on),
the projector and the decoder fewer too.
Left out: embeddings, the patch convolution, norms, softmax (together under 0.5 % at 7B), padding.

An adaptive method (`divt`) is counted at the most tokens it may leave of an image, so operations and memory are upper
bounds, a compression ratio a lower one: `at_most`. What really ran is measured (`train/visual_tokens`).

Where images vary in size (`Sample.rows`), every figure of a sample is the mean over measured rows, so that attention
takes the mean of squares. Towers and decoders of other shapes (gated MLPs, windows, mergers, experts, linear attention)
are in `docs/concepts/cost.md`; `ModelFacts` says which a model has.

Training: forward 1x; backward 2x for a part that trains (gradients of inputs and of weights), 1x for a frozen part
that gradients must pass, 0 for a frozen part before the first trained one; recompute 1x of the decoder, and of a
trained vision tower, under `gradient_checkpointing`. Behind a compressor that trains inside a frozen vision tower, the
tower's layers count 2x (and recompute), and a frozen projector too. Frozen attention is counted 1x backward like the
frozen weights beside it, though its scores cost 2x (under 1.5 % of the decoder at 7B). LoRA: the base counts as frozen,
`2 r (in + out)` a token and matrix is added for the adapters, which train. A teacher's pass (self-distillation) is one
more forward pass of all parts, tower and LM head included, under the teacher's points; each student's pass (`sandwich`)
is one more pass that trains. `gradient_checkpointing` is a fingerprint and does not decide what a cell is, but it is
work the machine does, so `train_tflops` counts it; compare cells of one setting.

In a pass with labels the last decoder layer computes keys and values of all tokens, the rest only for tokens whose
logits a label needs (`compression/forward/queries.py`), where its class is shown to give the same numbers.
`train_tflops` counts the model's operations all the same, every token in every layer: what a budget buys, which
schedules cost the same, and with them a cell's identity do not hang on which layers a release can shorten.
`unread_tflops_per_sample` is the difference, of which `bench` predicts. The other way round, the layers of a vision
tower behind the last one whose output is used (one where `vision_feature_layer` is -2) are no work of the model, but
transformers runs them: `unused_tower_tflops_per_sample`, which `bench` adds.

Worked numbers, LLaVA-1.5-7B: N = 32 layers, d = 4096, f = 11008, W = 4 * 4096^2 + 3 * 4096 * 11008 = 202.4e6, 576
visual tokens, 62 text tokens. `forward_decoder_linear_tflops` = (visual layer-tokens + 62 * 32) * 2 * W / 1e12:

    none      18432 visual layer-tokens   (18432 + 1984) * 404.8e6 = 8.26
    K16 S4    16 * 576 + 16 * 144 = 11520                            5.47
    K2 S8     2 * 576 + 30 * 72 = 3312                               2.14, compression ratio 18432 / 3312 = 5.565

With 64 text tokens a forward pass is 8.40 (decoder) + 0.365 (vision tower, 23 layers of 577 tokens) + 0.024
(projector); one sample of finetuning projector and language model, all 640 tokens labelled, costs 26.1 and with
checkpointing 34.5; of pretraining the projector, checkpointed, 26.0.

Sources: LLaVolta (arXiv 2406.20092) section 4.1 for the decoder's linear figure; Kaplan et al. 2020, section 2.1, for
2 a weight forward and twice that backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import isqrt
from typing import Any

from orchestrator import registry
from orchestrator.plan.jobs import Action
from orchestrator.spec.budgets import (
    Images,
    kept_grid,
    keys_by_layer,
    mean_layer_average,
    tokens_by_layer,
    units_for,
)
from orchestrator.spec.components import CompressorSpec, Grid
from orchestrator.spec.decoder_layers import DecoderLayer
from orchestrator.spec.image_units import ImageUnits
from orchestrator.spec.model_facts import ModelFacts
from orchestrator.spec.phase import PhaseSpec

_TERA = 1e12
_BEFORE_PROJECTOR = ("vision_tower", "compressor", "projector", "language_model")
_IN_DECODER = ("vision_tower", "projector", "language_model", "compressor")


@dataclass(frozen=True)
class MeasuredRow:
    """Rows of a data set that are alike.

    Attributes:
        share: Their share of all rows.
        text_tokens: Text tokens, template and markers of images included.
        label_tokens: Tokens that carry the loss.
        images: What each image becomes.
    """

    share: float
    text_tokens: float
    label_tokens: float
    images: tuple[ImageUnits, ...]


@dataclass(frozen=True, eq=False)
class MeasuredRows:
    """The rows of a data set, or of several as they are mixed; one object is equal to itself alone."""

    rows: tuple[MeasuredRow, ...]

    @cached_property
    def images(self) -> tuple[tuple[float, ImageUnits], ...]:
        """What images become, each kind with its share of all images; empty where no row has one."""
        found: dict[ImageUnits, float] = {}
        for row in self.rows:
            for image in row.images:
                found[image] = found.get(image, 0.0) + row.share
        total = sum(found.values())
        return tuple((share / total, image) for image, share in found.items())

    @property
    def units(self) -> Images:
        """The units of images, each kind with its share."""
        return [(share, image.grids) for share, image in self.images]

    @property
    def image_tokens(self) -> float:
        """Mean visual tokens of an image."""
        return sum(share * image.tokens for share, image in self.images)


@dataclass(frozen=True)
class Sample:
    """What one training sample holds on average.

    Attributes:
        text_tokens: Text tokens, template included.
        label_tokens: Tokens that carry the loss.
        images: Images (or frames, tiles) a sample.
        rows: The rows it is the mean of, where images vary in size: attention is quadratic, so costs are means over
            rows, not of a mean row. None where every image is the same number of tokens.
    """

    text_tokens: float
    label_tokens: float
    images: float = 1.0
    rows: MeasuredRows | None = None


def with_text(sample: Sample, text_tokens: float) -> Sample:
    """Return a sample with other text, all of it labelled, in each of its rows."""
    rows = sample.rows
    if rows is not None:
        other = (replace(row, text_tokens=text_tokens, label_tokens=text_tokens) for row in rows.rows)
        rows = MeasuredRows(tuple(other))
    return replace(sample, text_tokens=text_tokens, label_tokens=text_tokens, rows=rows)


def unpriced(facts: ModelFacts, recipe: PhaseSpec) -> str | None:
    """Return why the formula does not hold for a phase of this model; None where it does."""
    if facts.other_names and recipe.lora is not None:
        return f"the adapters that LoRA puts into the layers of {facts.model_type} are not counted"
    return None


def visual_tokens_by_layer(grid: Grid, points: Sequence[Mapping[str, Any]], num_layers: int) -> list[int]:
    """Return the visual tokens of one image in each decoder layer; each point acts on what the one before left.

    A method that adds tokens (registers) has them counted from layer 0 on.

    Args:
        grid: The image's visual tokens.
        points: Resolved points; `projector` acts before layer 0.
        num_layers: Decoder layers.

    Raises:
        ValueError: a method cannot take its amount, or a point lies beyond the last layer.
    """
    return tokens_by_layer(specs_of(points), num_layers, grid)


def image_tokens_by_layer(
    grids: Sequence[Grid], points: Sequence[Mapping[str, Any]], num_layers: int
) -> tuple[int, ...]:
    """Return the visual tokens of an image of several units, or of a video, in each decoder layer.

    Args:
        grids: Its units.
        points: Resolved points.
        num_layers: Decoder layers.

    Raises:
        ValueError: as `visual_tokens_by_layer`.
    """
    specs = specs_of(points)
    units = [tokens_by_layer(specs, num_layers, grid) for grid in units_for(specs, grids)]
    return tuple(map(sum, zip(*units, strict=True)))


def at_most(actions: Iterable[Action]) -> bool:
    """Return whether costs of some actions are bounds: an adaptive method is counted at the most it may leave."""
    passes = (
        points
        for action in actions
        for points in (*action.trained_passes, *([action.distill.points] if action.distill is not None else []))
    )
    return any(registry.spec_class(registry.COMPRESSORS, point["kind"]).adaptive for one in passes for point in one)


def specs_of(points: Sequence[Mapping[str, Any]]) -> list[CompressorSpec]:
    """Return points as specs."""
    return [registry.spec_class(registry.COMPRESSORS, point["kind"]).model_validate(dict(point)) for point in points]


def visual_layer_tokens(grid: Grid, points: Sequence[Mapping[str, Any]], num_layers: int) -> int:
    """Return the visual tokens of one image summed over decoder layers (`sum_l n_l`; LLaVolta section 4.1)."""
    return sum(visual_tokens_by_layer(grid, points, num_layers))


def compression_ratio(grid: Grid, layer_tokens: float, num_layers: int) -> float:
    """Return `num_layers * visual tokens / visual layer-tokens`; 1.0 on full tokens (LLaVolta section 4.1)."""
    return ratio_of(grid.tokens, layer_tokens, num_layers)


def ratio_of(visual_tokens: float, layer_tokens: float, num_layers: int) -> float:
    """Return the compression ratio of an image of so many visual tokens."""
    return num_layers * visual_tokens / layer_tokens


def linear_weights_per_layer(facts: ModelFacts) -> int:
    """Return the weights of one decoder layer's linear maps a token passes: q, k, v, o and the MLP; of unequal layers
    the mean.
    """
    if facts.decoder_layers:
        return sum(layer.weights for layer in facts.decoder_layers) // len(facts.decoder_layers)
    d, heads = facts.hidden_size, facts.num_attention_heads * facts.head_dim
    keys = facts.num_key_value_heads * facts.head_dim
    return 2 * d * heads + 2 * d * keys + (3 if facts.gated_mlp else 2) * d * facts.intermediate_size


def _key_weights(facts: ModelFacts, layer: DecoderLayer | None = None) -> int:
    """Return the weights of one decoder layer that make keys and values."""
    if layer is not None and layer.heads:
        return layer.keys
    return 2 * facts.hidden_size * facts.num_key_value_heads * facts.head_dim


def forward_decoder_linear_tflops(facts: ModelFacts, layer_tokens: float, text_tokens: float) -> float:
    """Return the paper's figure: linear layers of the decoder over visual and text tokens, one sample, forward."""
    return (layer_tokens + text_tokens * facts.num_layers) * 2 * linear_weights_per_layer(facts) / _TERA


def forward_tflops(facts: ModelFacts, points: Sequence[Mapping[str, Any]], sample: Sample) -> dict[str, float]:
    """Forward operations of one sample by part: vision_tower, projector, compressor (learned), decoder, lm_head."""
    specs = tuple(specs_of(points))
    if sample.rows is not None:
        return dict(_mean_tflops(facts, specs, sample.rows))
    return _row_tflops(facts, specs, [(sample.images, _one_image(facts))], sample.text_tokens, sample.label_tokens, {})


@lru_cache(maxsize=512)
def _mean_tflops(facts: ModelFacts, specs: tuple[CompressorSpec, ...], rows: MeasuredRows) -> dict[str, float]:
    known: dict[Grid, OfGrid] = {}
    total: dict[str, float] = {}
    for row in rows.rows:
        images = [(1.0, image) for image in row.images]
        for part, value in _row_tflops(facts, specs, images, row.text_tokens, row.label_tokens, known).items():
            total[part] = total.get(part, 0.0) + row.share * value
    return total


@dataclass(frozen=True)
class OfGrid:
    """What points make of a unit.

    Attributes:
        by_layer: Tokens in each decoder layer.
        keys: Tokens that are keys and values alone in each.
        fewer: By how many tokens the attention of each layer of the vision tower that is used runs less.
        fewer_mlp: By how many its MLP does: more where a point acts between the two.
        features: Tokens that enter the projector.
        learned: Operations of learned modules.
        first_learned: The tower's layer before which the first module inside it stands; None without one.
    """

    by_layer: list[int]
    keys: list[int]
    fewer: list[int]
    fewer_mlp: list[int]
    features: int
    learned: int
    first_learned: int | None


def _row_tflops(
    facts: ModelFacts, specs: Sequence[CompressorSpec], images: Sequence[tuple[float, ImageUnits]], text_tokens: float,
    label_tokens: float, known: dict[Grid, OfGrid],
) -> dict[str, float]:  # fmt: skip
    """Return the forward operations of a row by part; `known` keeps what points make of each grid."""
    tokens, keys = [text_tokens] * facts.num_layers, [0.0] * facts.num_layers
    vision = features = learned = 0.0
    for count, image in images:
        fewer, entering = [(0, 0)] * facts.vision_layers, image.features
        for grid in units_for(specs, image.grids):
            if grid not in known:
                known[grid] = of_grid(facts, specs, grid)
            left = known[grid]
            tokens = [before + count * n for before, n in zip(tokens, left.by_layer, strict=True)]
            keys = [before + count * k for before, k in zip(keys, left.keys, strict=True)]
            entering += left.features - grid.tokens
            learned += count * left.learned
            both = zip(fewer, left.fewer, left.fewer_mlp, strict=True)
            fewer = [(before + one, after + other) for (before, after), one, other in both]
        features += count * entering
        vision += count * (sum(_tower_flops(facts, image, fewer)) + image.features * 2 * facts.tower_adapter)
    flops = {
        "vision_tower": vision,
        "projector": features * 2 * facts.projector_weights,
        "compressor": learned,
        "decoder": _decoder_flops(facts, tokens, keys),
        "lm_head": 2 * facts.hidden_size * facts.vocab_size * label_tokens,
    }
    return {part: value / _TERA for part, value in flops.items()}


def _decoder_flops(facts: ModelFacts, tokens: Sequence[float], keys: Sequence[float]) -> float:
    """Return the operations of the decoder's layers, from the tokens in each and those that are keys alone."""
    layers = facts.decoder_layers
    pairs = [n * (n + 2 * k) for n, k in zip(tokens, keys, strict=True)]
    if not layers:
        linear = linear_weights_per_layer(facts) * sum(tokens) + _key_weights(facts) * sum(keys)
        return 2 * linear + 2 * facts.num_attention_heads * facts.head_dim * sum(pairs)
    linear = sum((layer.weights + layer.recurrent / 2) * n for layer, n in zip(layers, tokens, strict=True))
    linear += sum(_key_weights(facts, layer) * k for layer, k in zip(layers, keys, strict=True))
    attended = (_heads(facts, layer) * each for layer, each in zip(layers, pairs, strict=True) if layer.attends)
    return 2 * linear + 2 * sum(attended)


def _heads(facts: ModelFacts, layer: DecoderLayer | None) -> int:
    """Return the width of a layer's query heads together."""
    return (layer.heads if layer else 0) or facts.num_attention_heads * facts.head_dim


def _tower_flops(facts: ModelFacts, image: ImageUnits, fewer: Sequence[tuple[int, int]]) -> list[int]:
    """Return the operations of each used layer of the vision tower over an image, of whose tokens its attention and its
    MLP run `fewer`.
    """
    size, inner = facts.vision_hidden_size, facts.vision_intermediate_size
    maps, mlp = 8 * size**2, (6 if facts.gated_tower else 4) * size * inner

    kinds = [(less, number < facts.windowed_layers) for number, less in enumerate(fewer)]
    found = {}
    for less, windowed in dict.fromkeys(kinds):
        # A method that leaves the tower fewer tokens is for an image that it sees once, and whole.
        lengths, seen = [n - less[0] for n in image.tower], sum(n - less[1] for n in image.tower)
        attended = image.windows if windowed else lengths
        # Windows that are padded are attended with their padding; the MLP sees the tokens alone.
        found[less, windowed] = sum(attended) * maps + seen * mlp + 4 * size * sum(n * n for n in attended)
        if facts.relative_positions:  # a query and the places of its row and of its column
            found[less, windowed] += 4 * size * sum(n * isqrt(n) for n in attended)
    return [found[kind] for kind in kinds]


def of_grid(facts: ModelFacts, specs: Sequence[CompressorSpec], grid: Grid) -> OfGrid:
    """Return what points make of a unit of a grid."""
    left, features, first, learned = grid, grid.tokens, None, 0
    fewer, fewer_mlp = [0] * facts.vision_layers, [0] * facts.vision_layers
    for spec in sorted(specs, key=lambda spec: spec.sort_key(facts.num_layers, facts.vision_depth)):
        inside = spec.tower_index(facts.vision_depth)
        if inside is not None and inside >= facts.tower_points:
            raise ValueError(
                f"{spec.kind} cannot act at {spec.layer}: {facts.tower_refusal or 'no such layer is used'}"
            )
        before = spec.place == "projector" and facts.tokenwise_projector
        width = facts.projector_in if before else facts.hidden_size if inside is None else facts.vision_hidden_size
        learned += left.frames * spec.module_operations(Grid(left.height // left.frames, left.width), width)
        left = kept_grid(spec, left)
        features = left.tokens if before or inside is not None else features
        begins = 0 if "pixels" in spec.needs else inside
        if begins is not None:
            first = inside if spec.learns and first is None else first
            attends = begins + getattr(spec, "inside_layer", False)
            fewer[attends:] = [grid.tokens - left.tokens] * (facts.vision_layers - attends)
            fewer_mlp[begins:] = [grid.tokens - left.tokens] * (facts.vision_layers - begins)
    by_layer = tokens_by_layer(specs, facts.num_layers, grid)
    keys = keys_by_layer(specs, facts.num_layers, grid)
    return OfGrid(by_layer, keys, fewer, fewer_mlp, features, learned, first)


def _one_image(facts: ModelFacts) -> ImageUnits:
    """Return what an image becomes where all are of one size."""
    return ImageUnits((facts.image_grid,), (facts.vision_tokens,), facts.image_grid.tokens)


def tower_tokens_by_layer(facts: ModelFacts, points: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the tokens of one image that enter each layer of the vision tower that is used, the class token included.

    Raises:
        ValueError: a point acts where the tower has no place for it, or a method cannot take its amount.
    """
    return [facts.vision_tokens - less for less in of_grid(facts, specs_of(points), facts.image_grid).fewer]


def kv_cache_bytes(facts: ModelFacts, points: Sequence[Mapping[str, Any]], number_bytes: int) -> int | None:
    """Return the bytes that the visual tokens of one image hold in the KV cache: `2 h_kv a` numbers a token and layer.

    What a `keys_only` point dropped is held too. None where layers are not all alike: they hold no keys, or others.
    Text tokens hold as much each, in every layer.

    Args:
        facts: The model.
        points: Resolved points.
        number_bytes: 4 in float32, else 2.
    """
    if facts.decoder_layers:
        return None
    specs = specs_of(points)
    tokens = sum(tokens_by_layer(specs, facts.num_layers, facts.image_grid))
    held = sum(keys_by_layer(specs, facts.num_layers, facts.image_grid))
    return (tokens + held) * 2 * facts.num_key_value_heads * facts.head_dim * number_bytes


def train_tflops_per_sample(
    facts: ModelFacts, points: Sequence[Mapping[str, Any]], sample: Sample, recipe: Mapping[str, Any]
) -> float:
    """Forward, backward and recompute of one sample under a phase's recipe (`PhaseSpec` as a mapping)."""
    forward = forward_tflops(facts, points, sample)
    passes = _passes(recipe, _learns_before_projector(facts, specs_of(points)))
    checkpointed = 1 if recipe.get("gradient_checkpointing") else 0
    vision = passes["vision_tower"] + (checkpointed if "vision_tower" in recipe["train"] else 0)
    total = (
        forward["vision_tower"] * vision
        + forward["projector"] * passes["projector"]
        + forward["compressor"] * passes["compressor"]
        + forward["decoder"] * (passes["language_model"] + checkpointed)
        + forward["lm_head"] * passes["language_model"]
    )
    total += _behind_module_in_tower_tflops(facts, points, sample, recipe)
    if recipe.get("lora"):
        total += (3 + checkpointed) * _lora_forward_tflops(facts, points, sample, recipe["lora"])
    return total


def _behind_module_in_tower_tflops(
    facts: ModelFacts, points: Sequence[Mapping[str, Any]], sample: Sample, recipe: Mapping[str, Any]
) -> float:
    """Return what gradients cost in the layers of a frozen vision tower behind a module inside it that trains, and
    their recomputation under checkpointing.
    """
    specs, trained = specs_of(points), set(recipe["train"])
    inside = any(spec.place == "tower" and spec.learns for spec in specs)
    if not inside or "compressor" not in trained or "vision_tower" in trained:
        return 0.0
    image = of_grid(facts, specs, facts.image_grid)
    fewer = list(zip(image.fewer, image.fewer_mlp, strict=True))
    behind = sum(_tower_flops(facts, _one_image(facts), fewer)[image.first_learned :])
    return sample.images * behind * (2 if recipe.get("gradient_checkpointing") else 1) / _TERA


def unread_tflops_per_sample(
    facts: ModelFacts, points: Sequence[Mapping[str, Any]], sample: Sample, recipe: Mapping[str, Any]
) -> float:
    """Return the operations that `train_tflops_per_sample` counts and training does not do, where the last decoder
    layer runs for the tokens alone whose logits a label needs, and the one before `early_exit` for the text.

    A row of `n` tokens of which the last `L` are labelled has `L n - L^2 / 2` pairs of query and key under a causal
    mask, so that `(n - L)^2 / 2` of the `n^2 / 2` are left out.
    """
    found = _unread_tokens(facts, points, sample)
    unread = sum(share * n for share, n, _ in found)
    pairs = sum(share * n * (n + 2 * held) for share, n, held in found)
    last = facts.decoder_layers[-1] if facts.decoder_layers else None
    weights = linear_weights_per_layer(facts) if last is None else last.weights
    linear = 2 * unread * (weights - _key_weights(facts, last))
    attended = 2 * _heads(facts, last) * pairs
    checkpointed = 1 if recipe.get("gradient_checkpointing") else 0
    total = (linear + attended) * (_passes(recipe)["language_model"] + checkpointed)
    if lora := recipe.get("lora"):
        adapted = {**lora, "target_modules": sorted(set(lora["target_modules"]) - {"k_proj", "v_proj"})}
        total += (3 + checkpointed) * 2 * unread * lora_weights_per_layer(facts, adapted)
    return total / _TERA


def _unread_tokens(
    facts: ModelFacts, points: Sequence[Mapping[str, Any]], sample: Sample
) -> list[tuple[float, float, float]]:
    """Return the tokens of the last decoder layer that no label needs, and those that are keys alone there, of each
    measured row with its share; then the visual tokens of the layer after which all leave.
    """
    specs, depth = specs_of(points), facts.num_layers
    end = next((spec.layer_index(depth) for spec in specs if spec.keeps_none), 0)

    def counts(grids: Iterable[Grid]) -> dict[Grid, tuple[int, int, int]]:
        by_layer = {grid: tokens_by_layer(specs, depth, grid) for grid in grids}
        return {
            grid: (each[-1], keys_by_layer(specs, depth, grid)[-1], each[end - 1] if end else 0)
            for grid, each in by_layer.items()
        }

    if sample.rows is None:
        ((visual, held, leaving),) = counts([facts.image_grid]).values()
        unread = sample.images * visual + sample.text_tokens - sample.label_tokens
        return [(1.0, max(0.0, unread), sample.images * held), (1.0, sample.images * leaving, 0.0)]
    shown = [[grid for image in row.images for grid in units_for(specs, image.grids)] for row in sample.rows.rows]
    known = counts({grid for grids in shown for grid in grids})
    found = []
    for row, grids in zip(sample.rows.rows, shown, strict=True):
        of_row = [known[grid] for grid in grids]
        visual, held, leaving = (sum(each) for each in zip(*of_row, strict=True)) if of_row else (0, 0, 0)
        found.append((row.share, max(0.0, visual + row.text_tokens - row.label_tokens), float(held)))
        found.append((row.share, float(leaving), 0.0))
    return found


def unused_tower_tflops_per_sample(facts: ModelFacts, points: Sequence[Mapping[str, Any]], sample: Sample) -> float:
    """Return the operations of the vision tower's layers behind the last one whose output is used.

    `train_tflops_per_sample` leaves them out; transformers runs them, forward alone: nothing reads what they give.
    """
    behind = facts.vision_depth - facts.vision_layers
    if behind < 1:
        return 0.0
    specs, total = specs_of(points), 0.0
    if sample.rows is None:
        images = [(sample.images, _one_image(facts))]
    else:
        images = [(row.share, image) for row in sample.rows.rows for image in row.images]
    for count, image in images:
        fewer = [of_grid(facts, specs, grid).fewer_mlp for grid in units_for(specs, image.grids)]
        less = sum(each[-1] for each in fewer if each)
        total += count * sum(_tower_flops(facts, image, [(less, less)] * behind))
    return total / _TERA


def action_tflops_per_sample(facts: ModelFacts, action: Action, sample: Sample, recipe: Mapping[str, Any]) -> float:
    """Return one sample of an action's steps: training under its points and its students', and a teacher's forward pass
    where there is one.
    """
    total = sum(train_tflops_per_sample(facts, points, sample, recipe) for points in action.trained_passes)
    if action.distill is None:
        return total
    points = action.distill.points
    total += sum(forward_tflops(facts, points, sample).values())
    if recipe.get("lora"):
        total += _lora_forward_tflops(facts, points, sample, recipe["lora"])
    return total


def _lora_forward_tflops(
    facts: ModelFacts, points: Sequence[Mapping[str, Any]], sample: Sample, lora: Mapping[str, Any]
) -> float:
    visual = sample.images * image_layer_tokens(facts, points, sample.rows)
    tokens = visual + sample.text_tokens * facts.num_layers
    images: Images = [(1.0, (facts.image_grid,))] if sample.rows is None else sample.rows.units
    specs = specs_of(points)
    each = (
        share * sum(keys_by_layer(specs, facts.num_layers, grid))
        for share, grids in images
        for grid in units_for(specs, grids)
    )
    held = sample.images * sum(each)
    of_keys = {**lora, "target_modules": sorted({"k_proj", "v_proj"} & set(lora["target_modules"]))}
    weights = tokens * lora_weights_per_layer(facts, lora) + held * lora_weights_per_layer(facts, of_keys)
    return 2 * weights / _TERA


def image_layer_tokens(facts: ModelFacts, points: Sequence[Mapping[str, Any]], rows: MeasuredRows | None) -> float:
    """Return the visual tokens of an image summed over decoder layers; of measured rows the mean over their images."""
    if rows is None:
        return visual_layer_tokens(facts.image_grid, points, facts.num_layers)
    return _mean_layer_tokens(facts.num_layers, tuple(specs_of(points)), rows)


@lru_cache(maxsize=512)
def _mean_layer_tokens(num_layers: int, specs: tuple[CompressorSpec, ...], rows: MeasuredRows) -> float:
    return num_layers * mean_layer_average(specs, num_layers, rows.units)


def _learns_before_projector(facts: ModelFacts, specs: Sequence[CompressorSpec]) -> bool:
    places = {spec.place for spec in specs if spec.learns}
    return "tower" in places or ("projector" in places and facts.tokenwise_projector)


def _passes(recipe: Mapping[str, Any], learns_before_projector: bool = False) -> dict[str, int]:
    """Return forward plus backward of each part, in units of its forward.

    Args:
        recipe: The phase's recipe.
        learns_before_projector: The compressor's module stands before the projector; else in the decoder, where
            gradients pass it if anything trains.
    """
    trained = set(recipe["train"])
    lora = bool(recipe.get("lora"))
    upstream, passes = False, {}
    for part in _BEFORE_PROJECTOR if learns_before_projector else _IN_DECODER:
        own = part in trained and not (part == "language_model" and lora)
        upstream = upstream or part in trained or (part == "language_model" and (lora or "compressor" in trained))
        passes[part] = 3 if own else 2 if upstream else 1
    return passes


def lora_weights_per_layer(facts: ModelFacts, lora: Mapping[str, Any]) -> int:
    """Return the weights of one layer's LoRA adapters, `r (in + out)` a matrix (Hu et al. 2021, section 4.1)."""
    d, f = facts.hidden_size, facts.intermediate_size
    heads, keys = facts.num_attention_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim
    ends = {
        "q_proj": d + heads, "k_proj": d + keys, "v_proj": d + keys, "o_proj": heads + d,
        "gate_proj": d + f if facts.gated_mlp else 0, "up_proj": d + f, "down_proj": f + d,
    }  # fmt: skip
    return int(lora["r"] * sum(ends.get(name, 0) for name in set(lora["target_modules"])))


def stage_train_tflops(
    facts: ModelFacts, actions: Sequence[Action], sample: Sample, recipe: Mapping[str, Any]
) -> float:
    """Return the cost of a stretch of training: steps x global batch x one sample, action by action."""
    steps: dict[tuple[int, ...], int] = {}
    first: dict[tuple[int, ...], Action] = {}
    for action in actions:
        # A policy has thousands of actions of few kinds, which hold the very same values.
        kind = (id(action.points), id(action.distill), id(action.students))
        steps[kind] = steps.get(kind, 0) + action.last_step - action.first_step
        first.setdefault(kind, action)
    total = sum(steps[kind] * action_tflops_per_sample(facts, first[kind], sample, recipe) for kind in steps)
    return float(total * recipe["global_batch_size"])


def action_layer_tokens(facts: ModelFacts, action: Action, rows: MeasuredRows | None = None) -> float:
    """Return visual layer-tokens of one image in one step, mean over the passes that train (and measured images)."""
    passes = action.trained_passes
    tokens = sum(image_layer_tokens(facts, points, rows) for points in passes)
    return tokens / len(passes) if len(passes) > 1 else tokens


def image_tokens(facts: ModelFacts, rows: MeasuredRows | None) -> float:
    """Return the visual tokens of an image before compression; of measured rows the mean over their images."""
    return facts.image_grid.tokens if rows is None else rows.image_tokens


def parameter_count(facts: ModelFacts) -> dict[str, int]:
    """Return the weights by part (LLaVA-1.5-7B: 7.05e9), without norms and biases, with both embeddings."""
    size, inner = facts.vision_hidden_size, facts.vision_intermediate_size
    vision = facts.towers * facts.vision_layers * (4 * size**2 + (3 if facts.gated_tower else 2) * size * inner)
    vision += facts.tower_adapter
    embeddings = 2 * facts.vocab_size * facts.hidden_size
    decoder = facts.num_layers * linear_weights_per_layer(facts)
    if facts.decoder_layers:
        decoder = sum(layer.stored for layer in facts.decoder_layers)
    return {
        "vision_tower": vision,
        "projector": facts.projector_stored or facts.projector_weights,
        "language_model": decoder + embeddings,
    }

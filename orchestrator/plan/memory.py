"""The memory of a worker: bytes that a micro-batch's activations take, and a phase's weights, gradients and optimizer.

Per sample of the longest kind, `s` bytes a number of the compute type, the other letters as in `cost.py`, but `m` = 4
kept tensors of a gated MLP (gate, up, activation, product), else 2:

| part          | bytes kept for backward                                                                      |
|---------------|----------------------------------------------------------------------------------------------|
| decoder layer | `n (2 d (4 + 2 s) + 4 h a s + m f s)`: two norms, input in float32; q, k, v, o; MLP          |
| frozen layer  | `n (8 d + 4 h a s + (m - 1) f s)`: what only gradients of weights need is not kept            |
| more norms    | Gemma 2 and 3 5, Gemma 3, GLM-4V 4 in place of 2; of heads `n (h + h_kv) a (4 + s)` (Qwen3)   |
| eager scores  | `n^2 h (4 + s)` a layer, `4` where s = 4; of sdpa the mask of padding, `n^2 s`                |
| checkpointing | `n d s` a layer instead of both, and one layer, the largest, at a time                       |
| embeddings    | `3 n_0 d s`                                                                                  |
| logits        | `V (2 s + 12)` a label token, `12 V` where s = 4: logits, float32 copy, log-softmax, gradients |
| projector     | `N (3 p_in + 2 p_hidden + d) s`; of other kinds `ModelFacts.projector_kept`                  |
| vision tower  | `n_v (8 D + 4 F) s` a layer where it, or a compressor in it before, trains; else one layer's; |
|               | `8 n_v D` more with root-mean-square norms, `3 D` or more in Qwen-VL, GLM-4V and Ovis2; norms |
|               | around its layers                                                                            |
| LoRA          | `n (in (s + 1) + r s)` a matrix and layer: dropped-out input, its mask, its product with A    |
| teacher       | one decoder layer at its tokens; its logits, log-softmax and gradients beside the student's  |

Keys and values count for every query head: where rows are padded, attention repeats them. Norms, activations and
scores also keep a number or two a token and head (4 bytes each). On top comes one more decoder layer, the largest: what
its backward works in. Held against what autograd really keeps in `test_memory_formula.py`, part by part and in every
family in `test_memory_of_families.py`. What grows with the square of a micro-batch is left out: the mask between all
its images that Pixtral's tower makes for sdpa and eager attention.

States (`state_bytes`), of `w` weights of which `t` train, on `N` workers: ZeRO, Rajbhandari et al. 2020 (arXiv
1910.02054), section 3, as DeepSpeed 0.19 does it with torch's AdamW and gradients summed in float32:

| part         | stage 0 (float32) | 1                        | 2          | 3           |
|--------------|-------------------|--------------------------|------------|-------------|
| weights      | `4 w`             | `s w`                    | `s w`      | `s w / N`   |
| master, Adam | `8 t`             | `12 t / N`               | `12 t / N` | `12 t / N`  |
| gradients    | `4 t`             | `4 t`, `6 t` where s = 2 | `4 t / N`  | `4 t / N`   |
| buffers      |                   | `s b` where s = 4        | `s b`      | `s b + s l` |

`b` is `reduce_bucket_size`, twice that where communication overlaps below stage 3; `l` what stage 3 gathers at a time,
at most `stage3_max_live_parameters`. Stage 1 keeps fewer gradients in float32 without accumulation. `offload_optimizer`
puts `20 t / N` (below stage 3 `(20 + s) t / N`) into the host's memory in place of master weights, Adam and gradients,
`offload_param` the weights too. Held against the tensors of real engines in `test_state_memory.py`; left out are the
weights of norms, and of learned compressors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

from orchestrator.plan.cells.cell import Cell, PhasePlan
from orchestrator.plan.cost import (
    MeasuredRows,
    lora_weights_per_layer,
    of_grid,
    parameter_count,
    specs_of,
    tower_tokens_by_layer,
    visual_tokens_by_layer,
)
from orchestrator.plan.jobs import Action
from orchestrator.spec.budgets import keys_by_layer
from orchestrator.spec.components import Grid
from orchestrator.spec.deepspeed import given_config, zero_stage
from orchestrator.spec.infrastructure import ClusterSpec
from orchestrator.spec.model_facts import ModelFacts, compute_type

GIB = 2**30
"""Bytes."""


@dataclass(frozen=True)
class Longest:
    """The largest of each over a data set's samples: a sample padded into a micro-batch is never larger.

    Attributes:
        text_tokens: Tokens that are no image's.
        label_tokens: Tokens that carry the loss.
        visual_tokens: Tokens of all images before compression.
        images: Images.
    """

    text_tokens: int
    label_tokens: int
    visual_tokens: int
    images: int


def memory_documents(
    cells: Sequence[Cell], cluster: ClusterSpec, rows_of: Callable[[Cell, PhasePlan], MeasuredRows | None]
) -> list[dict[str, Any]]:
    """Return what a worker of each distinct phase needs, by the formulas: `memory` of `plan --json`; of phases that
    differ in their schedules alone the one that needs most.

    Samples count as long as `model_max_length` allows, of one image and with a label on every other token; of a
    micro-batch that `auto` chooses one counts. Models of unknown sizes or compute type are left out.

    Args:
        cells: The cells.
        cluster: Says how many workers there are, at least.
        rows_of: Measured rows of a phase's data, where images vary in size.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    seen: set[tuple[Any, ...]] = set()  # cells often hold the very same phases
    for cell in cells:
        dtype = compute_type(cell.spec.model) if cell.facts is not None else None
        for phase in () if dtype is None else cell.phases:
            assert dtype is not None
            assert cell.facts is not None
            rows = None if cell.facts.priced else rows_of(cell, phase)
            key = (id(cell.facts), id(phase.table), id(phase.recipe), dtype, rows)
            if key not in seen:
                seen.add(key)
                entry = _memory_of(cell, phase, dtype, cluster, rows)
                alike = tuple(value for name, value in entry.items() if name not in _OF_SCHEDULES)
                known = found.setdefault(alike, entry)
                if (entry["activations_gib"] or 0) > (known["activations_gib"] or 0):
                    found[alike] = entry
    return list(found.values())


_OF_SCHEDULES = ("activations_gib", "under", "device_gib")


def _memory_of(
    cell: Cell, phase: PhasePlan, dtype: str, cluster: ClusterSpec, rows: MeasuredRows | None
) -> dict[str, Any]:
    facts, workers = cell.facts, cluster.least_workers
    assert facts is not None
    s, recipe = (4 if dtype == "float32" else 2), phase.recipe.model_dump(mode="json")
    config = given_config(phase.recipe.deepspeed, on_gpu=cluster.use_gpu is not False)
    states = state_bytes(facts, recipe, s, config, workers)
    held = {name: getattr(states, name) / GIB for name in ("weights", "optimizer", "gradients", "buffers", "host")}
    size = phase.recipe.per_device_train_batch_size
    samples = 1 if size == "auto" else min(size, -(-phase.recipe.global_batch_size // workers))
    largest: tuple[float, str] | None = None
    image = facts.image_grid.tokens if facts.priced else _largest_image(rows)
    if image is not None and not facts.decoder_layers:
        text = max(0, phase.recipe.model_max_length - image)
        attention = cell.spec.model.attn_implementation
        distinct = dict(zip(phase.schedule.ids, phase.table, strict=True)).values()
        largest = max(
            (activation_bytes(facts, action, Longest(text, text, image, 1), recipe, s, attention), action.variant)
            for action in distinct
        )
    activations = None if largest is None else largest[0] * samples / GIB
    device = [*(held[name] for name in ("weights", "optimizer", "gradients", "buffers")), activations]
    return {
        "phase": phase.name,
        "deepspeed": phase.recipe.deepspeed if isinstance(phase.recipe.deepspeed, str) else "mapping",
        "num_workers": workers,
        "dtype": dtype,
        **{f"{name}_gib": held[name] for name in ("weights", "optimizer", "gradients", "buffers")},
        "activations_gib": activations,
        "under": None if largest is None else largest[1],
        "per_device_train_batch_size": None if size == "auto" else samples,
        "model_max_length": phase.recipe.model_max_length,
        "device_gib": None if activations is None else sum(part for part in device if part is not None),
        "host_gib": held["host"],
    }


def _largest_image(rows: MeasuredRows | None) -> int | None:
    return None if rows is None else max((image.tokens for _, image in rows.images), default=0)


def tokens_in_layers(facts: ModelFacts, points: Sequence[Mapping[str, Any]], longest: Longest) -> list[float]:
    """Return the visual and text tokens of the longest sample in each decoder layer.

    Where images vary in size a square image of the mean size stands for each; where a method cannot take that, its
    compression is left out.
    """
    visual: list[float] = [longest.visual_tokens] * facts.num_layers
    if longest.visual_tokens:
        grid = facts.visual_grid
        if grid is None:
            side = max(1, isqrt(longest.visual_tokens // max(1, longest.images)))
            grid = Grid(side, side)
        try:
            units = longest.visual_tokens / grid.tokens
            held = keys_by_layer(specs_of(points), facts.num_layers, grid)  # their hidden states stay, too
            tokens = visual_tokens_by_layer(grid, points, facts.num_layers)
            visual = [units * (n + k) for n, k in zip(tokens, held, strict=True)]
        except ValueError:
            pass
    return [tokens + longest.text_tokens for tokens in visual]


def activation_bytes(
    facts: ModelFacts,
    action: Action,
    longest: Longest,
    recipe: Mapping[str, Any],
    number_bytes: int,
    attn_implementation: str = "sdpa",
) -> float:
    """Return the bytes of one sample of a micro-batch while it goes forward and backward; they grow with its samples.

    Args:
        facts: The model.
        action: What the step does: its points and its teacher's; of several passes the largest counts.
        longest: The sample.
        recipe: `PhaseSpec` as a mapping.
        number_bytes: `s`: 4 in float32, else 2.
        attn_implementation: Only `eager` keeps scores.
    """
    if action.students is not None:  # pass after pass, beside the logits of the one they learn from
        own = replace(action, students=None)
        passes = [replace(own, points=points) for points in action.students.points]
        first, *others = (
            activation_bytes(facts, one, longest, recipe, number_bytes, attn_implementation) for one in (own, *passes)
        )
        return max(first, *(each + 2 * _logit_bytes(facts, longest, number_bytes) for each in others))
    eager, checkpointed = attn_implementation == "eager", bool(recipe["gradient_checkpointing"])
    trains = "language_model" in recipe["train"] and not recipe.get("lora")
    size, s = facts.hidden_size, number_bytes
    tokens = tokens_in_layers(facts, action.points, longest)
    kept = [_layer_bytes(facts, n, s, eager, trains) + _lora_bytes(facts, n, recipe, s) for n in tokens]
    logits = _logit_bytes(facts, longest, s)
    total = sum(n * size * s for n in tokens) + max(kept) if checkpointed else sum(kept)
    total += max(kept) + logits + 3 * max(tokens) * size * s
    features = longest.visual_tokens * _tower_share(facts, action.points)
    # What enters it and its norm; of two maps, what is between them, too.
    projected = facts.projector_kept or 3 * facts.projector_in + 2 * facts.projector_hidden
    total += features * s * (projected + size)
    if action.distill is not None:
        taught = tokens_in_layers(facts, action.distill.points, longest)
        total += max(_layer_bytes(facts, n, s, eager, trains=True) for n in taught) + 2 * logits
    if not longest.images:
        return total
    tower = [_tower_layer_bytes(facts, n, longest, s, eager) for n in _tower_tokens(facts, action.points, longest)]
    kept_from = 0 if "vision_tower" in recipe["train"] else None
    if kept_from is None and "compressor" in recipe["train"] and facts.priced:
        kept_from = of_grid(facts, specs_of(action.points), facts.image_grid).first_learned
    if kept_from is None:
        return max(total, *tower)
    total += _tower_tokens(facts, action.points, longest)[0] * _tower_norms_bytes(facts, s)  # around its layers
    if not checkpointed:
        return total + sum(tower[kept_from:])
    inputs = _tower_tokens(facts, action.points, longest)[kept_from:]
    return total + sum(inputs) * facts.vision_hidden_size * s + max(tower[kept_from:])


@dataclass(frozen=True)
class StateBytes:
    """What a worker holds between its steps, in bytes, and what a step adds beside activations.

    Attributes:
        weights: In the compute type.
        optimizer: Master weights in float32 and Adam's two states.
        gradients: Until the step is taken.
        buffers: Gradients on their way, and under ZeRO-3 what is gathered; at most.
        host: What is offloaded to the machine's memory.
        adam: Part of `optimizer`: what an engine makes at its first step.
    """

    weights: float
    optimizer: float
    gradients: float
    buffers: float
    host: float
    adam: float


def state_bytes(
    facts: ModelFacts, recipe: Mapping[str, Any], number_bytes: int, config: Mapping[str, Any], num_workers: int
) -> StateBytes:
    """Return the memory of one worker's states.

    Args:
        facts: The model.
        recipe: `PhaseSpec` as a mapping.
        number_bytes: `s`: 4 in float32, else 2.
        config: DeepSpeed's (`given_config`).
        num_workers: Number of workers.
    """
    counts, s, n = parameter_count(facts), number_bytes, num_workers
    if recipe.get("lora"):
        adapters = facts.num_layers * lora_weights_per_layer(facts, recipe["lora"])
        weights, trains = sum(counts.values()) + adapters, {**counts, "language_model": adapters}
    else:
        weights, trains = sum(counts.values()), counts
    trained = sum(trains[part] for part in recipe["train"] if part in trains)
    zero = config.get("zero_optimization", {})
    stage = zero_stage(config) or int(s < 4)  # `deepspeed_config` raises it
    own = 1 / n if stage else 1.0
    master, adam = (4 * trained * own if stage else 0.0), 8 * trained * own
    gradients = trained * (4 * own if stage >= 2 else 6 if stage and s < 4 else 4)
    of_weights, bucket, live = s * weights / (n if stage == 3 else 1), 0.0, 0.0
    if stage >= 2 or (stage == 1 and s == 4):
        bucket = s * zero.get("reduce_bucket_size", _BUCKET) * (2 if zero.get("overlap_comm") and stage < 3 else 1)
    if stage == 3 and n > 1:
        live = s * min(weights, zero.get("stage3_max_live_parameters", _LIVE))
    host = 0.0
    if _is_offloaded(zero, "offload_optimizer"):
        host, master, adam, gradients = (20 + (s if stage < 3 else 0)) * trained * own, 0.0, 0.0, 0.0
    if _is_offloaded(zero, "offload_param"):
        host, of_weights = host + of_weights, 0.0
    return StateBytes(of_weights, master + adam, gradients, bucket + live, host, adam)


_BUCKET, _LIVE = 5e8, 1e9
"""DeepSpeed's own `reduce_bucket_size` and `stage3_max_live_parameters`, numbers."""


def _is_offloaded(zero: Mapping[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"


def _layer_bytes(facts: ModelFacts, n: float, s: int, eager: bool, trains: bool) -> float:
    heads = 4 * facts.num_attention_heads * facts.head_dim
    mlp = ((4 if facts.gated_mlp else 2) - (0 if trains else 1)) * facts.intermediate_size
    norms = facts.decoder_norms * (facts.hidden_size * (4 + (2 * s if trains else 0)) + 4)
    if facts.head_norms:
        number = facts.num_attention_heads + facts.num_key_value_heads
        norms += number * (facts.head_dim * (4 + (s if trains else 0)) + 4)
    scores = n * n * facts.num_attention_heads * (4 if s == 4 else 4 + s) if eager else n * n * s
    return n * (norms + (heads + mlp) * s + 4 * facts.num_attention_heads) + scores


def _lora_bytes(facts: ModelFacts, n: float, recipe: Mapping[str, Any], s: int) -> float:
    lora = recipe.get("lora")
    if not lora:
        return 0
    attention = facts.num_attention_heads * facts.head_dim
    inputs = {"o_proj": attention, "down_proj": facts.intermediate_size}
    each = (inputs.get(name, facts.hidden_size) * (s + 1) + lora["r"] * s for name in set(lora["target_modules"]))
    return n * sum(each)


def _logit_bytes(facts: ModelFacts, longest: Longest, s: int) -> float:
    return longest.label_tokens * facts.vocab_size * (12 if s == 4 else 12 + 2 * s)


def _tower_share(facts: ModelFacts, points: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of an image's tokens that points in the vision tower leave."""
    inside = [spec for spec in specs_of(points) if spec.place == "tower"]
    if not inside or not facts.priced:
        return 1
    return of_grid(facts, inside, facts.image_grid).features / facts.image_grid.tokens


def _tower_tokens(facts: ModelFacts, points: Sequence[Mapping[str, Any]], longest: Longest) -> list[int]:
    """Return the tokens of the longest sample in each layer of the vision tower."""
    if not facts.priced:
        return [facts.patches_per_token * longest.visual_tokens] * facts.vision_layers
    inside = [point for point in points if str(point["layer"]).startswith("tower:")]
    units = max(longest.images, longest.visual_tokens / facts.image_grid.tokens)  # a video has several
    return [round(tokens * units) for tokens in tower_tokens_by_layer(facts, inside)]


def _tower_layer_bytes(facts: ModelFacts, n: int, longest: Longest, s: int, eager: bool) -> float:
    width = facts.vision_hidden_size
    scores = n * n / longest.images * max(1, width // 64) * (4 if s == 4 else 4 + s) if eager else 0
    kept = (4 + facts.tower_copies) * width + 4 * facts.vision_intermediate_size
    return n * (_tower_norms_bytes(facts, s) + kept * s + 4 * max(1, width // 64)) + scores


def _tower_norms_bytes(facts: ModelFacts, s: int) -> int:
    """Return what two norms of the vision tower keep for a patch: what they were given and what they gave, and root
    mean squares, which gated towers have, what was normed.
    """
    return 2 * facts.vision_hidden_size * (2 * s + (4 if facts.gated_tower else 0)) + 16

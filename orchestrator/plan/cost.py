"""The one cost formula: floating-point operations and visual tokens of forward passes and stage runs.

One multiply-add is 2 operations. Figures are per sample; `n` is visual plus text tokens of a layer, `d` the hidden
size, `f` the MLP's inner size, `V` the vocabulary, `h` heads of size `a`, `h_kv` key-value heads (GQA), `m` = 3 for a
gated MLP, else 2.

| part            | forward operations                                                                        |
|-----------------|-------------------------------------------------------------------------------------------|
| decoder linear  | `2 n W` a layer, `W = d (h + 2 h_kv) a + h a d + m d f` |
| attention       | `2 n^2 h a` a layer: scores and weighted sum, each `2 n^2 h a`, of which a causal mask needs half |
| LM head         | `2 d V` a label token: logits are computed only where a label needs them                     |
| projector       | `2 (p_in p_hidden + p_hidden d)` a token it takes (a point at the projector leaves it fewer) |
| vision tower    | `n_v (8 D^2 + 4 D F) + 4 n_v^2 D` a layer that runs, `n_v` with the class token; full attention |
| compressor      | a learned method's own count (`module_operations`); choosing and merging are left out |

Left out: embeddings, the patch convolution, norms, softmax (together under 0.5 % at 7B), padding.

Training: forward 1x; backward 2x for a part that trains (gradients of inputs and of weights), 1x for a frozen part
that gradients must pass, 0 for a frozen part before the first trained one; recompute 1x of the decoder, and of a
trained vision tower, under `gradient_checkpointing`. Frozen attention is counted 1x backward like the frozen weights
beside it, though its scores cost 2x (under 1.5 % of the decoder at 7B). LoRA: the base counts as frozen, `2 r (in +
out)` a token and matrix is added for the adapters, which train. A teacher's pass (self-distillation) is one more
forward pass of all parts, tower and LM head included, under the teacher's points. `gradient_checkpointing` is a
fingerprint and does not decide what a cell is, but it is work the machine does, so `train_tflops` counts it; compare
cells of one setting.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator import registry
from orchestrator.plan.jobs import Action
from orchestrator.spec.budgets import tokens_by_layer
from orchestrator.spec.components import CompressorSpec, Grid
from orchestrator.spec.model_facts import ModelFacts

_TERA = 1e12
_ORDER = ("vision_tower", "projector", "language_model")


@dataclass(frozen=True)
class Sample:
    """What one training sample holds on average.

    Attributes:
        text_tokens: Text tokens, template included.
        label_tokens: Tokens that carry the loss.
        images: Images (or frames, tiles) a sample.
    """

    text_tokens: float
    label_tokens: float
    images: float = 1.0


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
    return tokens_by_layer(_specs(points), num_layers, grid)


def _specs(points: Sequence[Mapping[str, Any]]) -> list[CompressorSpec]:
    return [registry.spec_class(registry.COMPRESSORS, point["kind"]).model_validate(dict(point)) for point in points]


def visual_layer_tokens(grid: Grid, points: Sequence[Mapping[str, Any]], num_layers: int) -> int:
    """Return the visual tokens of one image summed over decoder layers (`sum_l n_l`; LLaVolta section 4.1)."""
    return sum(visual_tokens_by_layer(grid, points, num_layers))


def compression_ratio(grid: Grid, layer_tokens: float, num_layers: int) -> float:
    """Return `num_layers * visual tokens / visual layer-tokens`; 1.0 on full tokens (LLaVolta section 4.1)."""
    return num_layers * grid.tokens / layer_tokens


def linear_weights_per_layer(facts: ModelFacts) -> int:
    """Return the weights of one decoder layer's linear maps: q, k, v, o and the MLP."""
    d, heads = facts.hidden_size, facts.num_attention_heads * facts.head_dim
    keys = facts.num_key_value_heads * facts.head_dim
    return 2 * d * heads + 2 * d * keys + (3 if facts.gated_mlp else 2) * d * facts.intermediate_size


def forward_decoder_linear_tflops(facts: ModelFacts, layer_tokens: float, text_tokens: float) -> float:
    """Return the paper's figure: linear layers of the decoder over visual and text tokens, one sample, forward."""
    return (layer_tokens + text_tokens * facts.num_layers) * 2 * linear_weights_per_layer(facts) / _TERA


def forward_tflops(facts: ModelFacts, points: Sequence[Mapping[str, Any]], sample: Sample) -> dict[str, float]:
    """Forward operations of one sample by part: vision_tower, projector, compressor (learned), decoder, lm_head."""
    specs = _specs(points)
    visual = tokens_by_layer(specs, facts.num_layers, facts.image_grid)
    pixels, features, learned = _before_decoder(facts, specs)
    tokens = [sample.images * n + sample.text_tokens for n in visual]
    attended = 2 * facts.num_attention_heads * facts.head_dim * sum(n * n for n in tokens)
    n = facts.vision_tokens - facts.image_grid.tokens + pixels
    size, inner = facts.vision_hidden_size, facts.vision_intermediate_size
    vision = facts.vision_layers * (n * (8 * size**2 + 4 * size * inner) + 4 * n * n * size)
    flops = {
        "vision_tower": sample.images * vision,
        "projector": sample.images * features * 2 * facts.projector_weights,
        "compressor": sample.images * learned,
        "decoder": 2 * linear_weights_per_layer(facts) * sum(tokens) + attended,
        "lm_head": 2 * facts.hidden_size * facts.vocab_size * sample.label_tokens,
    }
    return {part: value / _TERA for part, value in flops.items()}


def _before_decoder(facts: ModelFacts, specs: Sequence[CompressorSpec]) -> tuple[int, int, int]:
    """Return the tokens of an image that the tower makes and that the projector takes, and operations of all learned
    modules.
    """
    left, pixels, features, learned = facts.image_grid, facts.image_grid.tokens, facts.image_grid.tokens, 0
    for spec in sorted(specs, key=lambda spec: (spec.layer != "projector", spec.layer_index(facts.num_layers))):
        before = spec.layer == "projector" and facts.tokenwise_projector
        learned += spec.module_operations(left, facts.projector_in if before else facts.hidden_size)
        left = spec.kept_grid(left)
        features = left.tokens if before else features
        pixels = left.tokens if "pixels" in spec.needs else pixels
    return pixels, features, learned


def train_tflops_per_sample(
    facts: ModelFacts, points: Sequence[Mapping[str, Any]], sample: Sample, recipe: Mapping[str, Any]
) -> float:
    """Forward, backward and recompute of one sample under a phase's recipe (`PhaseSpec` as a mapping)."""
    forward = forward_tflops(facts, points, sample)
    passes = _passes(recipe)
    checkpointed = 1 if recipe.get("gradient_checkpointing") else 0
    vision = passes["vision_tower"] + (checkpointed if "vision_tower" in recipe["train"] else 0)
    total = (
        forward["vision_tower"] * vision
        + forward["projector"] * passes["projector"]
        + forward["compressor"] * (3 if "compressor" in recipe["train"] else passes["language_model"])
        + forward["decoder"] * (passes["language_model"] + checkpointed)
        + forward["lm_head"] * passes["language_model"]
    )
    if recipe.get("lora"):
        total += (3 + checkpointed) * _lora_forward_tflops(facts, points, sample, recipe["lora"])
    return total


def action_tflops_per_sample(facts: ModelFacts, action: Action, sample: Sample, recipe: Mapping[str, Any]) -> float:
    """Return one sample of an action's steps: training under its points, and a teacher's forward pass where there is
    one.
    """
    total = train_tflops_per_sample(facts, action.points, sample, recipe)
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
    visual = visual_layer_tokens(facts.image_grid, points, facts.num_layers)
    tokens = sample.images * visual + sample.text_tokens * facts.num_layers
    return 2 * tokens * lora_weights_per_layer(facts, lora) / _TERA


def _passes(recipe: Mapping[str, Any]) -> dict[str, int]:
    """Forward plus backward of each part, in units of its forward."""
    trained = set(recipe["train"])
    lora = bool(recipe.get("lora"))
    upstream, passes = False, {}
    for part in _ORDER:
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
    steps: dict[tuple[int, int], int] = {}
    first: dict[tuple[int, int], Action] = {}
    for action in actions:
        # A policy has thousands of actions of few kinds, which hold the very same values.
        kind = (id(action.points), id(action.distill))
        steps[kind] = steps.get(kind, 0) + action.last_step - action.first_step
        first.setdefault(kind, action)
    total = sum(steps[kind] * action_tflops_per_sample(facts, first[kind], sample, recipe) for kind in steps)
    return float(total * recipe["global_batch_size"])


def mean_visual_layer_tokens(facts: ModelFacts, actions: Sequence[Action]) -> float:
    """Return visual layer-tokens of one image, mean over the samples of some actions (all batches are of one size)."""
    steps = sum(a.last_step - a.first_step for a in actions)
    total = sum(
        (a.last_step - a.first_step) * visual_layer_tokens(facts.image_grid, a.points, facts.num_layers)
        for a in actions
    )
    return total / steps


def parameter_count(facts: ModelFacts) -> dict[str, int]:
    """Return the weights by part; norms and biases left out, input and output embeddings counted apart (LLaVA-1.5-7B:
    7.05e9).
    """
    vision = facts.vision_layers * (4 * facts.vision_hidden_size**2)
    vision += facts.vision_layers * 2 * facts.vision_hidden_size * facts.vision_intermediate_size
    embeddings = 2 * facts.vocab_size * facts.hidden_size
    return {
        "vision_tower": vision,
        "projector": facts.projector_weights,
        "language_model": facts.num_layers * linear_weights_per_layer(facts) + embeddings,
    }

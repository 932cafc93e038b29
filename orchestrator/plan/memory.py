"""The one memory formula: bytes that a micro-batch's activations and a phase's gradients and optimizer take.

Per sample of the longest kind, `s` bytes a number of the compute type, `n` visual plus text tokens of a layer, `d`,
`f`, `h`, `h_kv`, `a`, `V`, `D`, `F` as in `plan/cost.py`, `m` = 4 kept tensors of a gated MLP (gate, up, activation,
product), else 2:

| part          | bytes kept for backward                                                                      |
|---------------|----------------------------------------------------------------------------------------------|
| decoder layer | `n (2 d (4 + 2 s) + (2 h + 2 h_kv) a s + m f s)`: two norms, input in float32; q, k, v, o; MLP |
| frozen layer  | `n (8 d + (2 h + 2 h_kv) a s + (m - 1) f s)`: what only gradients of weights need is not kept  |
| eager scores  | `n^2 h (4 + s)` a layer, `4` where s = 4; sdpa and flash keep none                            |
| checkpointing | `n d s` a layer instead of both, and one layer, the largest, at a time                       |
| embeddings    | `3 n_0 d s`                                                                                  |
| logits        | `V (2 s + 12)` a label token, `12 V` where s = 4: logits, float32 copy, log-softmax, gradients |
| projector     | `N (p_in + 2 p_hidden + d) s`                                                                |
| vision tower  | `n_v (8 D + 4 F) s` a layer where it trains; else one layer's, before the decoder runs        |
| LoRA          | `n (in (s + 1) + r s)` a matrix and layer: dropped-out input, its mask, its product with A    |
| teacher       | one decoder layer at its tokens; its logits, log-softmax and gradients beside the student's  |

On top comes one more decoder layer, the largest: what its backward works in. Held against what autograd really keeps in
`tests/training/test_micro_batch.py`: equal to a few per cent where all parts train without checkpointing, up to
two fifths more where parts are frozen or the decoder is checkpointed.

Gradients and optimizer (`to_come_bytes`): ZeRO, Rajbhandari et al. 2020 (arXiv 1910.02054), section 3: 8 bytes of Adam
a trained weight and 4 of its master below float32, shared by the workers from stage 1 on; 4 bytes of gradient, from
stage 2 on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

from orchestrator.plan.cost import lora_weights_per_layer, parameter_count, visual_tokens_by_layer
from orchestrator.plan.jobs import Action
from orchestrator.spec.components import Grid
from orchestrator.spec.model_facts import ModelFacts


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
            visual = [units * tokens for tokens in visual_tokens_by_layer(grid, points, facts.num_layers)]
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
        action: What the step does: its points and its teacher's.
        longest: The sample.
        recipe: `PhaseSpec` as a mapping.
        number_bytes: `s`: 4 in float32, else 2.
        attn_implementation: Only `eager` keeps scores.
    """
    eager, checkpointed = attn_implementation == "eager", bool(recipe["gradient_checkpointing"])
    trains = "language_model" in recipe["train"] and not recipe.get("lora")
    size, s = facts.hidden_size, number_bytes
    tokens = tokens_in_layers(facts, action.points, longest)
    whole = [_layer_bytes(facts, n, s, eager, trains) + _lora_bytes(facts, n, recipe, s) for n in tokens]
    logits = _logit_bytes(facts, longest, s)
    total = sum(n * size * s for n in tokens) + max(whole) if checkpointed else sum(whole)
    total += max(whole) + logits + 3 * tokens[0] * size * s
    total += longest.visual_tokens * s * (facts.projector_in + 2 * facts.projector_hidden + size)
    if action.distill is not None:
        taught = tokens_in_layers(facts, action.distill.points, longest)
        total += max(_layer_bytes(facts, n, s, eager, trains=True) for n in taught) + 2 * logits
    if not longest.images:
        return total
    tower = _tower_layer_bytes(facts, longest, s, eager)
    if "vision_tower" not in recipe["train"]:
        return max(total, tower)
    kept = _tower_tokens(facts, longest) * facts.vision_hidden_size * s if checkpointed else tower
    return total + facts.vision_layers * kept + (tower if checkpointed else 0)


def to_come_bytes(facts: ModelFacts, recipe: Mapping[str, Any], number_bytes: int, zero: int, world_size: int) -> float:
    """Return the bytes of one worker's gradients and optimizer states, which an engine makes when it first steps."""
    counts = parameter_count(facts)
    if recipe.get("lora"):
        counts["language_model"] = facts.num_layers * lora_weights_per_layer(facts, recipe["lora"])
    trained = sum(counts[part] for part in recipe["train"] if part in counts)
    adam = trained * (8 if number_bytes == 4 else 12)
    return adam / (world_size if zero >= 1 else 1) + 4 * trained / (world_size if zero >= 2 else 1)


def _layer_bytes(facts: ModelFacts, n: float, s: int, eager: bool, trains: bool) -> float:
    heads = 2 * (facts.num_attention_heads + facts.num_key_value_heads) * facts.head_dim
    mlp = ((4 if facts.gated_mlp else 2) - (0 if trains else 1)) * facts.intermediate_size
    norms = 2 * facts.hidden_size * (4 + (2 * s if trains else 0))
    scores = n * n * facts.num_attention_heads * (4 if s == 4 else 4 + s) if eager else 0
    return n * (norms + (heads + mlp) * s) + scores


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


def _tower_tokens(facts: ModelFacts, longest: Longest) -> int:
    # A tower without a fixed image size sees about four patches for each visual token (Qwen-VL's merger).
    return facts.vision_tokens * longest.images if facts.priced else 4 * longest.visual_tokens


def _tower_layer_bytes(facts: ModelFacts, longest: Longest, s: int, eager: bool) -> float:
    n, width = _tower_tokens(facts, longest), facts.vision_hidden_size
    scores = n * n / longest.images * max(1, width // 64) * (4 if s == 4 else 4 + s) if eager else 0
    return n * (8 * width + 4 * facts.vision_intermediate_size) * s + scores


__all__ = ["Longest", "activation_bytes", "to_come_bytes", "tokens_in_layers"]

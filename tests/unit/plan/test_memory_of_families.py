"""The memory formula covers what autograd keeps in every family whose micro-batches `auto` may choose, part by part.

Not below it, and at most `MOST` (`LOOSE`) times as much. The tower's part is what training it adds; the rest is without
the layer in which backward works. Sizes here are tiny, so that what real sizes drown counts fully: the pixels are left
out.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_bytes import kept_bytes
from training_workers import recipe_of

from orchestrator.compression import attach
from orchestrator.compression.testing.families import TINY
from orchestrator.models.parts import set_trainable
from orchestrator.plan.jobs import Action
from orchestrator.plan.memory import Longest, activation_bytes
from orchestrator.spec.model_facts import FAMILIES, ModelFacts, model_facts

ALL = ("vision_tower", "projector", "language_model")
FULL = Action(0, 1, "full")
LABELS, TEXT = 30, 37
QUICK = ("qwen2_5_vl", "glm_ocr")
REFUSED = {  # by `auto`: their decoders' layers are not counted
    "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe_thinker", "glm4v_moe", "lfm2_vl", "gemma4", "llama4",
    "step3p7",
}  # fmt: skip
MOST = {"tower": 1.7, "rest": 1.5}
# Of how many patches an image's tokens are made is a bound there, which a video or a long image may reach.
LOOSE = {"llava_next": 2.0, "llava_next_video": 3.6, "llava_onevision": 3.0, "video_llama_3": 5.5}
PIXELS = r"patch_(?:embed|conv)|position_embedding"


def facts_of(model: Any, folder: Path) -> ModelFacts:
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    found = model_facts(str(folder))
    assert found is not None
    return found


def real_and_told(family: str, dtype: torch.dtype, folder: Path) -> dict[str, tuple[float, float]]:
    """What is kept for a row and what the formula says, by part."""
    tiny = TINY[family]
    attention, kind = tiny.attentions[-1], next(one for one in tiny.units if one != "video")

    def batch_of(rows: int) -> dict[str, Any]:
        batch = tiny.batch([[3, kind, TEXT]] * rows, "right", 0, LABELS)
        return {name: value.to(dtype) if torch.is_floating_point(value) else value for name, value in batch.items()}

    kept, told = [], []
    for train in (ALL, ALL[1:]):
        model = tiny.build(attention, 0).train().to(dtype)
        facts = facts_of(model, folder)
        set_trainable(model, train, lora=False)
        attachment, one = attach(model, []), batch_of(1)
        visual = int(attachment.visual_BN(one["input_ids"]).sum())
        longest = Longest(one["input_ids"].shape[1] - visual, LABELS, visual, len(tiny.units[kind]))
        unused = "|".join(str(layer) for layer in range(facts.vision_layers, facts.vision_depth)) or "(?!)"
        # Layers of the tower that nobody reads are let go at once.
        left_out = rf"{PIXELS}|(?:vision|image)_\w+\.(?:\w+\.)*layers\.(?:{unused})$"
        kept.append(kept_bytes(model, batch_of, left_out))
        size, recipe = dtype.itemsize, recipe_of(train=train)
        deeper = replace(facts, num_layers=facts.num_layers + 1)
        with_one, with_two = (
            activation_bytes(each, FULL, longest, recipe, size, attention) for each in (facts, deeper)
        )
        told.append(with_one - (with_two - with_one))
    return {"tower": (kept[0] - kept[1], told[0] - told[1]), "rest": (kept[1], told[1])}


@pytest.mark.parametrize(
    "family",
    [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES if one not in REFUSED],
)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_formula_covers_what_autograd_keeps_of_each_part(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    for part, (real, told) in real_and_told(family, dtype, tmp_path).items():
        most = LOOSE.get(family, MOST[part]) if part == "tower" else MOST[part]
        assert real <= told <= most * real, (part, round(told / real, 3))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) & set(TINY)))
def test_the_others_are_those_that_auto_refuses(family: str, tmp_path: Path) -> None:
    facts = facts_of(TINY[family].build("eager", 0), tmp_path)
    assert bool(facts.decoder_layers) == (family in REFUSED)

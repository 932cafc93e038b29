"""Dropout is a function of (seed, step, sample): padding and recomputation change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from orchestrator.errors import StageRunError, UsageError
from orchestrator.models.build import build_model
from orchestrator.models.lora import add_lora
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.phase import LoraSpec
from orchestrator.training.dropout import Draws, SampleDropout, draw_by_sample, dropped_mask

KEYS = torch.tensor([[7, 2**32 - 3], [2**31 + 5, 11], [7, 12]])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_masks_are_drawn_with_their_probability_and_independently(p: float) -> None:
    mask = dropped_mask(KEYS, (3, 64, 257), p).float()
    spread = (p * (1 - p)) ** 0.5
    assert float(mask.mean()) == pytest.approx(p, abs=5 * spread / mask.numel() ** 0.5)
    for dim, most in ((0, 3), (1, 64), (2, 257)):
        means = mask.mean(dim=[d for d in range(3) if d != dim])
        assert float((means - p).abs().max()) < 6 * spread / (mask.numel() / most) ** 0.5
    # Neighbours among samples, positions and features do not fall together.
    centred = (mask - p) / spread
    for dim in range(3):
        size = mask.shape[dim] - 1
        product = centred.narrow(dim, 0, size) * centred.narrow(dim, 1, size)
        assert abs(float(product.mean())) < 5 / product.numel() ** 0.5


def test_a_sample_draws_the_same_in_any_micro_batch_and_length() -> None:
    draws = Draws()
    module = SampleDropout(0.3, "a", draws).train()
    draws.enter(3, 5, [10, 11, 12])
    together = module(torch.ones(3, 9, 40))
    assert torch.equal(module(torch.ones(3, 9, 40)), together), "recomputed: the same"
    draws.enter(3, 5, [12, 10])
    assert torch.equal(module(torch.ones(2, 30, 40))[:, :9], together[[2, 0]])
    for other in ((4, 5, [12, 10]), (3, 6, [12, 10]), (3, 5, [13, 14])):
        draws.enter(*other)
        assert not torch.equal(module(torch.ones(2, 9, 40)), together[[2, 0]])
    draws.enter(3, 5, [10, 11, 12])
    assert not torch.equal(SampleDropout(0.3, "b", draws)(torch.ones(3, 9, 40)), together)
    assert together.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert torch.equal(module.eval()(torch.ones(2, 3)), torch.ones(2, 3))
    with pytest.raises(StageRunError, match="not a row for each of the micro-batch's 3 samples"):
        module.train()(torch.ones(27, 40))


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_dropout_that_cannot_be_drawn_by_sample_is_refused(made: tuple[Path, Path], tmp_path: Path, part: str) -> None:
    config = json.loads((made[0] / "config.json").read_text())
    config[part]["attention_dropout"] = 0.2
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = build_model(ModelSpec(model_name_or_path=str(tmp_path), weights="random"), None)
    with pytest.raises(UsageError, match=r"dropout: 0\.2"):
        draw_by_sample(model, Draws())


def test_adapters_dropout_is_taken_over(made: tuple[Path, Path]) -> None:
    model = build_model(ModelSpec(model_name_or_path=str(made[0]), weights="random"), None)
    add_lora(model, LoraSpec(r=2, alpha=4, dropout=0.1), seed=0)
    draw_by_sample(model, Draws())
    found = [module for module in model.modules() if isinstance(module, SampleDropout)]
    assert len(found) == 2 * 7 and not any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())

"""Methods that drop tokens, inside a model: all kept is the plain model, a cache changes nothing, draws repeat."""

from __future__ import annotations

import pytest
import torch
from reference import make_batch, tiny_llava

from orchestrator.compression import attach

ROWS = [[3, "image", 7], [9], [2, "image", 2, "image", 5]]
METHODS = ["stride", "random_drop"]


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_all_kept_is_the_plain_model(kind, padding):
    model, batch = tiny_llava(), make_batch(ROWS, padding)
    plain = model(**batch).loss
    attach(model, [{"kind": kind, "layer": 1, "stride": 1}])
    assert float(model(**batch).loss.detach()) == pytest.approx(float(plain.detach()), abs=1e-5)


@pytest.mark.parametrize("kind", METHODS)
def test_generation_with_a_cache_equals_recomputing(kind):
    model = tiny_llava().eval()
    batch = make_batch(ROWS, "left")
    batch.pop("labels")
    attachment = attach(model, [{"kind": kind, "layer": 2, "stride": 4}])
    attachment.set_step(sample_index=[4, 5, 6])
    options = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [model.config.image_token_id]}
    cached = model.generate(**batch, use_cache=True, **options)
    assert torch.equal(cached, model.generate(**batch, use_cache=False, **options))


def test_random_draws_repeat_for_a_step_and_change_with_it():
    model, batch = tiny_llava(), make_batch(ROWS)
    attachment = attach(model, [{"kind": "random_drop", "layer": 1, "stride": 4}])
    losses = []
    for step in (3, 3, 4):
        attachment.set_step(step=step, seed=1, sample_index=[11, 12, 13])
        losses.append(model(**batch).loss)
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])

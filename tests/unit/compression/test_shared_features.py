"""Features that are found again: answers and losses of every family are bit for bit those of a model that computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orchestrator.compression import attach
from orchestrator.compression.features import SharedFeatures
from orchestrator.compression.testing.families import TINY
from orchestrator.compression.testing.kit import bench_of, generate

FAST = ("llava", "qwen2_5_vl", "llava_next", "internvl")
FAMILIES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in TINY]


def found_under(model, batch, points, features=None):
    """Loss, logits and generated tokens with their logits."""
    attachment = attach(model, points)
    try:
        with torch.no_grad(), attachment.sharing(features):
            output = model(**batch.inputs, return_logits=True)
            said = generate(model, attachment, batch, attachment._decoder.family, use_cache=True)
        return output.loss, output.logits, said.sequences, *said.logits
    finally:
        attachment.detach()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_variant_answers_as_if_it_had_computed(name):
    bench = bench_of(name)
    model = TINY[name].build("sdpa" if "sdpa" in TINY[name].attentions else "eager", 0).eval()
    batch, other = (bench.batch(bench.rows(False), "left", seed) for seed in (0, 1))
    layer = max(1, TINY[name].first_layer)
    variants = [
        [],
        [{"kind": "average_pool", "layer": layer, "stride": 2}],
        [{"kind": "average_pool", "layer": TINY[name].layers - 1, "stride": 4}],
    ]
    features = SharedFeatures()
    for points in variants:
        for one in (batch, other):
            alone, shared = found_under(model, one, points), found_under(model, one, points, features)
            for wanted, got in zip(alone, shared, strict=True):
                assert (wanted is None and got is None) or torch.equal(wanted.nan_to_num(), got.nan_to_num())
    assert features.found >= features.made > 0, "the first variant computes, the others find"


def test_what_its_text_may_not_tell_apart_is_computed():
    """numpy's text leaves out the middle of a long array."""

    class Inner:
        def get_image_features(self, pixels, sizes):
            return torch.tensor(float(sizes.sum()))

    inner, features = Inner(), SharedFeatures()
    one, other = np.zeros(5000), np.zeros(5000)
    other[2500] = 1
    assert repr(one) == repr(other)
    with features.of(inner):
        found = [float(inner.get_image_features(torch.zeros(1), sizes)) for sizes in (one, other, one)]
    assert found == [0, 1, 0] and features.found == 0

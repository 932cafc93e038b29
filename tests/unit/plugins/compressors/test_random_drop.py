"""random_drop: what it draws depends on seed, step and sample alone."""

from __future__ import annotations

import torch
from orchestrator_plugins.compressors.random_drop import RandomDrop, RandomDropSpec

from orchestrator.compression import Context
from orchestrator.spec.components import Grid

TOKENS, KEPT = 24, 6
IMAGES = torch.randn(4, TOKENS, 3, generator=torch.Generator().manual_seed(0))


def places(rows, samples, step=0, seed=0, layer=0):
    images = len(rows)
    context = Context(
        layer=layer,
        positions_ABN=torch.arange(TOKENS).expand(1, images, TOKENS),
        sizes_BN=torch.ones(images, TOKENS, dtype=torch.long),
        rows_B=torch.tensor(rows),
        seed=seed,
        step=step,
        sample_indices=samples,
    )
    kept = RandomDrop(RandomDropSpec(layer=layer, stride=4)).compress(IMAGES[:images], Grid(4, 6), context)
    assert kept.hidden_BMD.shape == (images, KEPT, 3)
    found = kept.positions_ABM[0]
    assert torch.equal(kept.hidden_BMD, torch.stack([IMAGES[b, found[b]] for b in range(images)]))
    assert bool((found[:, 1:] > found[:, :-1]).all())
    return [tuple(row) for row in found.tolist()]


def test_the_batch_around_a_sample_changes_nothing():
    together = places([0, 1, 2], (7, 8, 9))
    assert places([0, 1], (9, 7)) == [together[2], together[0]]


def test_seed_step_sample_layer_and_image_each_draw_anew():
    base = places([0], (7,))
    others = [places([0], (7,), step=1), places([0], (7,), seed=1), places([0], (8,)), places([0], (7,), layer=1)]
    assert all(other != base for other in others)
    two_images = places([0, 0], (7, 7))
    assert two_images[0] == base[0] and two_images[1] != base[0]


def test_every_token_has_the_same_chance():
    counts = torch.zeros(TOKENS)
    draws = 600
    for step in range(draws):
        for row in places([0], (3,), step=step):
            counts[list(row)] += 1
    expected = draws * KEPT / TOKENS
    # Five standard deviations of a binomial count.
    assert float((counts - expected).abs().max()) < 5 * (expected * (1 - KEPT / TOKENS)) ** 0.5

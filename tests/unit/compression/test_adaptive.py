"""Counts that depend on the image: what runs is counted, rows are as they are alone, memory is measured at the most."""

from __future__ import annotations

import pytest
import torch
from orchestrator_plugins.compressors.divt import clusters
from reference import make_batch, tiny_llava

from orchestrator.compression import attach
from orchestrator.compression.testing import check_compressor
from orchestrator.compression.testing.families import TINY
from orchestrator.compression.testing.tiny import move_parameters
from orchestrator.errors import UsageError

MIXED = [[3, "image", 7], [9], [2, "image", 2, "image", "image", 5]]
TOKENS, LAYERS = 9, 4


def divt(layer="projector", **options):
    return {"kind": "divt", "layer": layer, "keep_ratio": 1, "threshold": 0.5, "heads": 2} | options


def attached(points, **options):
    model = tiny_llava("sdpa", **options).train()
    attachment = attach(model, points)
    move_parameters(attachment.learned_modules)
    return model, attachment


def counts_at_projector(batch, threshold=0.5, most=TOKENS):
    """By the tower's own features: the second-last layer's patches, without CLS."""
    with torch.no_grad():
        tower = tiny_llava("sdpa").model.vision_tower
        features = tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    return clusters(features, threshold, most)[1].tolist()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_what_runs_is_counted(padding):
    batch = make_batch(MIXED, padding)
    counts = counts_at_projector(batch)
    assert len(set(counts)) > 2 and max(counts) < TOKENS
    points = [divt(), {"kind": "stride", "layer": 2, "stride": 2}]
    model, attachment = attached(points)
    model(**batch)
    halves = sum(-(-count // 2) for count in counts)
    assert attachment.visual_tokens_per_layer == (sum(counts),) * 2 + (halves,) * 2
    attachment.switch([divt(keep_tokens=4, keep_ratio=None)])
    model(**batch)
    assert attachment.visual_tokens_per_layer == (sum(min(4, count) for count in counts),) * LAYERS
    model.gradient_checkpointing_enable({"use_reentrant": False})
    attachment.switch(points)
    model(**batch).loss.backward()
    assert attachment.visual_tokens_per_layer == (sum(counts),) * 2 + (halves,) * 2


@pytest.mark.parametrize(
    "points", [[divt()], [divt(), divt(2)], [divt(0), {"kind": "average_pool", "layer": 2, "stride": 2}]]
)
def test_rows_generate_what_they_do_alone(points):
    """Rows whose images leave other numbers, with a KV cache, beside one without an image; beams too."""
    model, _ = attached(points)
    model.eval()
    rows = [[3, "image", 4], [6], [2, "image", 1, "image", 5]]
    batch = make_batch(rows, "left", answer=0)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [0, 62, 63]}
    together = model.generate(**batch_of(batch), **options)[:, -4:]
    beams = model.generate(**batch_of(batch), **options, num_beams=2)[:, -4:]
    pixels = batch["pixel_values"].split([1, 2])
    for row, images in enumerate((pixels[0], None, pixels[1])):
        mask = batch["attention_mask"][row].bool()
        alone = {name: batch[name][row : row + 1][:, mask] for name in ("input_ids", "attention_mask")}
        alone |= {} if images is None else {"pixel_values": images}
        assert torch.equal(model.generate(**alone, **options)[0, -4:], together[row])
        assert torch.equal(model.generate(**alone, **options, num_beams=2)[0, -4:], beams[row])


@pytest.mark.parametrize("layer", ["projector", 2])
def test_logits_stand_at_the_centres(layer):
    """Of a token that was dropped they are NaN; a cluster's stand where its centre stood."""
    batch = make_batch([[2, "image", 3, "image", "image", 4]])
    model, attachment = attached([divt(layer)])
    seen = []
    compress = attachment.points[0].compressor.compress
    attachment.points[0].compressor.compress = lambda *given: (seen.append(compress(*given)), seen[-1])[1]
    logits = model(**batch, return_logits=True).logits[0]
    starts, columns = (2, 14, 23), {0, 1, 11, 12, 13, 32, 33, 34, 35}
    (kept,) = seen
    for start, sources, count in zip(starts, kept.sources_BM.tolist(), kept.counts_B.tolist(), strict=True):
        columns |= {start + source for source in sources[:count]}
    assert len(set(kept.counts_B.tolist())) > 1
    assert set((~logits.isnan().any(1)).nonzero().flatten().tolist()) == columns


@pytest.mark.parametrize(
    ("family", "points"),
    [
        ("llava", [{"kind": "average_pool_2d", "layer": "tower:1", "keep_tokens": 6}, divt()]),
        ("llava", [divt(), {"kind": "fastv", "layer": 2, "keep_ratio": "1/2"}, divt(3)]),
        ("llava", [divt(), {"kind": "isolator", "layer": 0}]),
        ("video_llava", [{"kind": "evs", "layer": 0}, divt(2)]),
    ],
)
def test_beside_other_points(family, points):
    assert check_compressor(points, [family]).proven


def batch_of(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("layer", ["projector", 2])
def test_memory_is_measured_at_the_most(layer):
    batch = make_batch(MIXED)
    model, attachment = attached([divt(layer, keep_ratio="3/4")])
    before = model(**batch).loss
    with attachment.largest():
        attachment.set_step(step=3, seed=1, sample_index=[0, 1, 2])  # as a step does
        loss = model(**batch).loss
        loss.backward()
    images, most = 4, 7
    left = TOKENS * images if layer == 2 else most * images
    assert attachment.visual_tokens_per_layer == (left,) * 2 + (most * images,) * 2
    assert bool(loss.isfinite()) and float((loss - before).detach().abs()) > 1e-6
    assert torch.equal(model(**batch).loss, before)


def test_what_cannot_follow_it_is_refused():
    for later, told in (
        (
            {"kind": "stride", "layer": 2, "keep_tokens": 3},
            "may leave fewer than keep_tokens 3; give keep_ratio or stride",
        ),
        ({"kind": "token_grouping", "layer": 2, "keep_tokens": 3}, "divt before it may leave fewer"),
    ):
        with pytest.raises(UsageError, match=told):
            attach(tiny_llava(), [divt(), later])
    with pytest.raises(UsageError, match="divt before it leaves another number of each"):
        attach(TINY["video_llava"].build("sdpa", 0), [divt(0), {"kind": "evs", "layer": 1}])
    attach(tiny_llava(), [divt(), divt(2, keep_ratio=None, keep_tokens=3)])

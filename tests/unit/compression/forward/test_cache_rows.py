"""A filled KV cache of a compressed model: its record follows when rows are chosen, repeated, copied or cropped."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

from orchestrator.compression import attach
from orchestrator.compression.forward.cache import record_of
from orchestrator.compression.testing.families import TINY
from orchestrator.errors import UsageError

GEMMA_3, QWEN2_VL = (TINY[name] for name in ("gemma3", "qwen2_vl"))


TINY = {"qwen2_vl": QWEN2_VL, "gemma3": GEMMA_3}
ROWS = [[3, "image", 7], [9], [2, "image", 1, "image", 5]]
POINTS = [
    {"kind": "average_pool", "layer": 1, "stride": 2, "positions": "renumber"},
    {"kind": "average_pool", "layer": 2, "stride": 2, "size_bias": True},
]


def filled(name):
    """A model and its cache after the prompt; rows have unequal padding, and sizes that count."""
    tiny = TINY[name]
    model = tiny.build("eager", 0).eval()
    attach(model, POINTS)
    batch = tiny.batch(ROWS, "left", 0, 0)
    del batch["labels"]
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    return model, batch, cache


def step(model, batch, cache, index, tokens=(5,)):
    """Logits of further tokens in rows `index` of the batch."""
    mask = batch["attention_mask"][index]
    mask = torch.cat([mask, mask.new_ones(len(index), len(tokens))], 1)
    ids = torch.tensor([tokens] * len(index))
    positions = (mask.cumsum(1) - 1)[:, -len(tokens) :]
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return output.logits[:, -1]


@pytest.mark.parametrize("name", TINY)
def test_keys_and_values_go_with_the_last_who_holds_them(name):
    """In a circle they would stay, a batch's after another's, until Python looks for circles."""
    model, batch, cache = filled(name)
    step(model, batch, cache, [0, 1, 2])
    gc.disable()
    try:
        kept = [weakref.ref(cache), weakref.ref(cache.layers[-1])]
        del cache
        assert [one() for one in kept] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("name", TINY)
def test_rows_that_are_chosen_or_repeated_go_on_as_they_were(name):
    model, batch, cache = filled(name)
    whole = step(model, batch, copy.deepcopy(cache), [0, 1, 2])
    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(torch.tensor([2, 1]))
    assert torch.allclose(step(model, batch, chosen, [2, 1]), whole[[2, 1]], atol=1e-5)
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    assert torch.allclose(step(model, batch, repeated, [0, 0, 1, 1, 2, 2]), whole.repeat_interleave(2, 0), atol=1e-5)
    reordered = copy.deepcopy(cache)
    reordered.reorder_cache(torch.tensor([1, 2, 0]))
    assert torch.allclose(step(model, batch, reordered, [1, 2, 0]), whole[[1, 2, 0]], atol=1e-5)
    assert torch.allclose(step(model, batch, cache, [0, 1, 2]), whole, atol=1e-6), "a copy changed the cache"


def test_the_last_tokens_can_be_taken_back_but_no_image():
    model, batch, cache = filled("qwen2_vl")
    once = step(model, batch, copy.deepcopy(cache), [0, 1, 2], (5, 9))
    step(model, batch, cache, [0, 1, 2], (7, 8, 6))
    cache.crop(-3)
    assert torch.allclose(step(model, batch, cache, [0, 1, 2], (5, 9)), once, atol=1e-5)
    # The shortest answer after an image is 5 tokens and the one that ends the image.
    assert record_of(cache).tail == 2 + 6
    with pytest.raises(UsageError, match="only 8"):
        cache.crop(-9)
    with pytest.raises(UsageError, match="negative"):
        cache.crop(9)


@pytest.mark.parametrize("name", TINY)
def test_generate_goes_on_in_a_cache_whose_first_layer_is_short(name):
    tiny = TINY[name]
    model = tiny.build("eager", 0).eval()
    attach(model, [{"kind": "average_pool", "layer": 0, "stride": 2}])
    batch = tiny.batch([[3, "image", 7]], "left", 0, 0)
    del batch["labels"], batch["attention_mask"]
    options = {"do_sample": False, "suppress_tokens": [62, 63], "return_dict_in_generate": True}
    first = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, **options)
    count = batch["input_ids"].shape[1] + 2  # the last token was not run
    assert first.past_key_values.get_seq_length() == count > first.past_key_values.get_seq_length(0)
    batch.pop("input_ids")
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in batch:
            batch[key] = torch.cat([batch[key], batch[key].new_zeros(1, 3)], 1)
    options |= {"max_new_tokens": 4, "min_new_tokens": 4}
    whole = model.generate(first.sequences, **batch, **options)
    for key in ("pixel_values", "image_grid_thw"):
        batch.pop(key, None)
    further = model.generate(first.sequences, past_key_values=first.past_key_values, **batch, **options)
    assert torch.equal(further.sequences, whole.sequences)


def test_a_cache_that_is_emptied_forgets():
    model, batch, cache = filled("qwen2_vl")
    cache.reset()
    assert record_of(cache) is None
    with torch.no_grad():
        again = model(**batch, past_key_values=cache, use_cache=True).logits[:, -1]
        anew = model(**batch, past_key_values=DynamicCache(config=model.config), use_cache=True).logits[:, -1]
    assert torch.allclose(again, anew, atol=1e-6)


def test_static_caches_are_refused():
    model, batch, _ = filled("qwen2_vl")
    with pytest.raises(UsageError, match="static"):
        model(**batch, past_key_values=StaticCache(config=model.config, max_cache_len=99), use_cache=True)

"""What the recorder says attention saw, against full attention maps of the plain eager model, one row at a time."""

from __future__ import annotations

import pytest
import torch
from reference import IMAGE, TOKENS, make_batch, tiny_llava
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig
from transformers.cache_utils import DynamicCache
from witness import LayerWitnessSpec, NobodySpec, TowerWitnessSpec, Witness

from orchestrator.compression import attach
from orchestrator.errors import UsageError

LAYER = 2
ROWS = [[3, "image", 7], [9], [2, "image", 2, "image", 9], [1, "image", "image"]]


def batch_of(padding="right", labels="several", seed=0):
    """Rows with one image, none, two (two answers) and two at the end (nothing is labelled, with `several`)."""
    batch = make_batch(ROWS, padding, seed)
    if labels == "none":
        del batch["labels"]
    else:
        row = batch["labels"][2]
        last = int(batch["attention_mask"][2].nonzero().max())
        row[last - 6] = batch["input_ids"][2, last - 6]  # an earlier answer of one token
    return batch


def rows_of(batch):
    """Each row alone, without padding: token ids, images, labels."""
    images = iter(batch["pixel_values"])
    for ids, mask, labels in zip(
        batch["input_ids"], batch["attention_mask"], batch.get("labels", [None] * 4), strict=True
    ):
        ids = ids[mask.bool()]
        count = int((ids == IMAGE).sum()) // TOKENS
        pixels = torch.stack([next(images) for _ in range(count)]) if count else None
        yield ids, pixels, None if labels is None else labels[mask.bool()].tolist()


def query_tokens(labels, count):
    """The tokens before each answer; without any, the last."""
    if labels is None:
        return [count - 1]
    before = [i for i in range(count - 1) if labels[i] == -100 and labels[i + 1] != -100]
    return before or [count - 1]


def full_map(model, ids, pixels, labels, layer):
    """What the queries paid to each token and each token's key, from the whole map of a plain forward."""
    with torch.no_grad():
        # A cache without the config keeps all keys, of sliding layers too.
        cache = DynamicCache()
        output = model(input_ids=ids[None], pixel_values=pixels, output_attentions=True, past_key_values=cache)
    map_HNN = output.attentions[layer][0]
    paid_N = map_HNN[:, query_tokens(labels, len(ids))].mean((0, 1))
    keys_ND = cache.layers[layer].keys[0].transpose(0, 1).flatten(1)
    return paid_N, keys_ND


def witness(model, batch, spec=LayerWitnessSpec, layer=LAYER):
    Witness.forget()
    attachment = attach(model, [spec(layer=layer)])
    model(**batch)
    attachment.detach()
    (told,) = Witness.told
    return told


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("labels", ["several", "none"])
@pytest.mark.parametrize("text", ["llama", "qwen2", "mistral"])
def test_scores_and_keys_are_those_of_the_full_map(attention, padding, labels, text):
    options = {"sliding_window": 6} if text == "mistral" else {}
    plain = tiny_llava("eager", text, **options).eval()
    batch = batch_of(padding, labels)
    told = witness(tiny_llava(attention, text, **options), batch)
    image = 0
    for row, (ids, pixels, row_labels) in enumerate(rows_of(batch)):
        paid_N, keys_ND = full_map(plain, ids, pixels, row_labels, LAYER - 1)
        real_N = batch["attention_mask"][row].bool()
        assert torch.allclose(told.row_keys_RND[row][real_N], keys_ND, atol=1e-5)
        is_text_N = (ids != IMAGE) & (torch.tensor(row_labels or [-100] * len(ids)) == -100)
        assert told.text_RN[row][real_N].tolist() == is_text_N.tolist()
        assert not told.text_RN[row][~real_N].any()
        places = (ids == IMAGE).nonzero().flatten().view(-1, TOKENS)
        for place_N in places:
            assert int(told.rows_B[image]) == row
            assert torch.allclose(told.attention_BN[image], paid_N[place_N], atol=1e-5)
            assert torch.equal(real_N.nonzero().flatten()[place_N], told.columns_BN[image])
            image += 1
    assert image == 5
    assert float(told.attention_BN.std()) > 1e-3, "all equal scores would prove nothing"


@pytest.mark.slow  # torch compiles it for the CPU
def test_flex_attention_tells_the_same():
    batch = batch_of("left", "none")
    with torch.no_grad():
        expected = witness(tiny_llava("eager").eval(), batch)
        got = witness(tiny_llava("flex_attention").eval(), batch)
    assert torch.allclose(got.attention_BN, expected.attention_BN, atol=1e-5)
    real_RN = batch["attention_mask"].bool()
    assert torch.allclose(got.row_keys_RND[real_RN], expected.row_keys_RND[real_RN], atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layer", [0, 3])
def test_the_cls_row_is_that_of_the_towers_full_map(attention, layer):
    batch = batch_of("left")
    plain = tiny_llava("eager").eval()
    tower = plain.model.vision_tower
    used = plain.config.vision_feature_layer  # -2 of two layers: the first layer's output
    module = tower.encoder.layers[used].self_attn
    keys = []
    module.k_proj.register_forward_hook(lambda _, args, output: keys.append(output))
    with torch.no_grad():
        map_IHTT = tower(batch["pixel_values"], output_attentions=True).attentions[used]
    told = witness(tiny_llava(attention), batch, TowerWitnessSpec, layer)
    assert torch.allclose(told.cls_attention_BN, map_IHTT[:, :, 0, 1:].mean(1), atol=1e-6)
    heads = module.num_heads
    assert torch.allclose(told.cls_keys_BND, keys[0][:, 1:].unflatten(2, (heads, -1)).mean(2), atol=1e-5)
    assert told.attention_BN is None and told.row_keys_RND is None


def test_answers_choose_nothing_and_training_asks_as_generation_does():
    """Other answers, or none yet: the same scores, the same text."""
    batch = make_batch([[3, "image", 7], [2, "image", 6]], answer=3)
    other = {name: value.clone() for name, value in batch.items()}
    answers = batch["labels"] != -100
    other["input_ids"][answers] = other["input_ids"][answers] % 60 + 1
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    told, changed = (witness(tiny_llava(), one) for one in (batch, other))
    assert torch.equal(told.attention_BN, changed.attention_BN) and torch.equal(told.text_RN, changed.text_RN)
    prompt = {"input_ids": batch["input_ids"][:1, :-3], "pixel_values": batch["pixel_values"][:1]}
    assert torch.allclose(witness(tiny_llava(), prompt).attention_BN[0], told.attention_BN[0], atol=1e-6)


def test_a_second_point_at_a_layer_sees_what_its_sources_saw():
    batch = make_batch(ROWS[:3], "left")
    expected = witness(tiny_llava(), batch)
    Witness.forget()
    model = tiny_llava()
    attach(model, [{"kind": "stride", "layer": LAYER, "stride": 2}, LayerWitnessSpec(layer=LAYER)])
    model(**batch)
    assert torch.allclose(Witness.told[0].attention_BN, expected.attention_BN[:, ::2], atol=1e-6)
    own = Witness.told[0].row_keys_RND[Witness.told[0].rows_B.unsqueeze(1), Witness.told[0].columns_BN]
    before = expected.row_keys_RND[expected.rows_B.unsqueeze(1), expected.columns_BN]
    assert torch.allclose(own, before[:, ::2], atol=1e-6)


def state_of(model):
    """Every module's own attributes and config, by identity."""
    return {
        name: {key: id(value) for key, value in module.__dict__.items() if key in ("config", "forward", "generate")}
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("spec", [LayerWitnessSpec, TowerWitnessSpec])
def test_no_trace_after_forward_after_an_error_and_after_detach(spec):
    model, batch = tiny_llava("sdpa"), batch_of()
    before = state_of(model)
    attachment = attach(model, [spec(layer=LAYER)])
    attached = state_of(model)
    model(**batch)
    assert state_of(model) == attached
    broken = [model.model.language_model.layers[LAYER - 1].mlp, model.model.vision_tower.encoder.layers[-1].mlp]

    def fail(*_):
        raise RuntimeError("broken on purpose")

    handles = [module.register_forward_pre_hook(fail) for module in broken]
    while handles:
        with pytest.raises(RuntimeError, match="on purpose"):
            model(**batch)
        assert state_of(model) == attached
        handles.pop().remove()
    Witness.forget()
    model(**batch)
    assert len(Witness.told) == 1
    attachment.detach()
    assert state_of(model) == before


def test_numbers_and_calls_are_those_of_a_method_that_needs_nothing():
    """ZeRO-3 gathers parameters by the order of hooked calls; recording adds none and moves no bit."""
    model, batch = tiny_llava("sdpa").train(), batch_of("left")
    calls = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: calls.append(name))
    seen = []
    for spec in (NobodySpec, LayerWitnessSpec, TowerWitnessSpec):
        attachment = attach(model, [spec(layer=LAYER)])
        model.zero_grad()
        calls.clear()
        loss = model(**batch).loss
        loss.backward()
        seen.append(
            (float(loss.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None], [*calls])
        )
        attachment.detach()
    for loss, gradients, order in seen[1:]:
        assert loss == seen[0][0] and order == seen[0][2]
        assert all(torch.equal(one, other) for one, other in zip(gradients, seen[0][1], strict=True))


def test_layer_zero_has_no_layer_before_it():
    with pytest.raises(UsageError, match=r"layer_witness at layer 0.*none has run"):
        attach(tiny_llava(), [LayerWitnessSpec(layer=0)])


def test_a_tower_without_cls_is_refused():
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2, image_size=24, patch_size=8
    )
    text = tiny_llava().config.text_config
    config = LlavaConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_id=IMAGE,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    with pytest.raises(UsageError, match="CLS token"):
        attach(LlavaForConditionalGeneration(config), [TowerWitnessSpec(layer=1)])


class _Mixer(nn.Module):
    """Attention that is looked up nowhere."""

    def __init__(self, config=None):
        super().__init__()
        if config is not None:
            self.config = config

    def forward(self, hidden_states, **kwargs):
        return hidden_states.cumsum(1), None


def test_attention_that_cannot_be_recorded_is_named():
    model, batch = tiny_llava(), batch_of()
    layer = model.model.language_model.layers[LAYER - 1]
    attach(model, [LayerWitnessSpec(layer=LAYER)])
    layer.self_attn = _Mixer(model.config.text_config)
    with pytest.raises(UsageError, match="_Mixer does not look up its function in transformers' ALL_ATTENTION"):
        model(**batch)
    layer.self_attn = _Mixer()
    with pytest.raises(UsageError, match="no attention module with a config"):
        model(**batch)


def test_ready_made_features_have_no_cls_row():
    model, batch = tiny_llava(), batch_of()
    features = model.model.get_image_features(pixel_values=batch.pop("pixel_values"))
    attach(model, [TowerWitnessSpec(layer=1)])
    with pytest.raises(UsageError, match="pixel_values"):
        model(**batch, mm_encoder_outputs={"image": features})

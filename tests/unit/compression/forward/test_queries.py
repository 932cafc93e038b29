"""The last layer runs only for tokens whose logits a label needs: same numbers, less work, only where it is right."""

from __future__ import annotations

import pytest
import torch
from reference import assert_same_gradients, decoder_facts, gradients, make_batch, tiny_llava
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.compression import attach
from orchestrator.compression.families import family_of
from orchestrator.compression.forward import decoder, queries, segments
from orchestrator.compression.forward.queries import Queries, runs_for_queries, shows_queries
from orchestrator.compression.testing.families import TINY
from orchestrator.models.lora import add_lora
from orchestrator.plan import cost
from orchestrator.plan.cost import Sample
from orchestrator.spec.phase import LoraSpec
from orchestrator.training.dropout import Draws, draw_by_sample

MIXED = [[3, "image", 7], [9], [2, "image", 2, "image", "image", 5]]
POOLED = [{"kind": "average_pool", "layer": 1, "stride": 2}]
EXIT = [{"kind": "early_exit", "layer": 3}]
KEYS = [{"kind": "average_pool", "layer": 1, "stride": 2, "keys_only": True}]
ANSWER = 3
WHOLE = {"ernie4_5_vl_moe"}  # its layers ask for the class of their MLP


def last_layer(model):
    return model.model.language_model.layers[-1]


@pytest.fixture
def seen():
    """Shapes that modules of the last layer were given, by name; `watch(model)` begins."""
    shapes: dict[str, list[tuple[int, ...]]] = {}

    def watch(model):
        for name, module in last_layer(model).named_modules():
            module.register_forward_pre_hook(
                lambda _, args, name=name: (
                    shapes.setdefault(name, []).append(tuple(args[0].shape[:2])) if args else None
                )
            )
        return shapes

    return watch


@pytest.mark.parametrize("points", [[], POOLED])
def test_only_what_keys_and_values_need_runs_for_all_tokens(points, seen):
    model, batch = tiny_llava("sdpa").train(), make_batch(MIXED)
    rows, columns = batch["input_ids"].shape
    attachment = attach(model, points)
    shapes = seen(model)
    model(**batch).loss.backward()
    kept = columns if not points else columns - 3 * 9 + 3 * 5
    assert attachment.trims_last_layer
    for name in ("self_attn.k_proj", "self_attn.v_proj", "input_layernorm"):
        assert shapes[name] == [(rows, kept)], name
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp", "mlp.down_proj", "post_attention_layernorm"):
        assert shapes[name] == [(rows, ANSWER)], name


@pytest.mark.parametrize(
    "more",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"use_cache": True},
        {"return_logits": True},
        {"labels": None},
    ],
)
@pytest.mark.parametrize("points", [[], POOLED])
def test_who_reads_more_gets_it_all(more, points, seen):
    model, batch = tiny_llava("eager").eval(), make_batch(MIXED)
    attach(model, points)
    shapes = seen(model)
    model(**(batch | more))
    assert shapes["mlp"] == shapes["input_layernorm"]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_on_full_tokens_is_the_plain_models(padding, attention, checkpointing, seen):
    batch = make_batch(MIXED, padding)
    batch["labels"][0, -8:-4] = batch["input_ids"][0, -8:-4]  # two answers, and rows with more of them than others
    plain, model = tiny_llava(attention).train(), tiny_llava(attention).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    attach(model, [])
    shapes = seen(model)
    expected, found = plain(**batch).loss, model(**batch).loss
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    assert_same_gradients(gradients(model, found), gradients(plain, expected), 1e-6)
    assert all(shape[1] < batch["input_ids"].shape[1] for shape in shapes["mlp"])


def test_labels_shifted_by_the_caller_and_none_at_all():
    batch = make_batch(MIXED)
    model = tiny_llava("sdpa").train()
    attach(model, [])
    expected = model(**batch).loss.detach()
    shifted = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    rest = {name: value for name, value in batch.items() if name != "labels"}
    assert float(model(**rest, shift_labels=shifted).loss.detach()) == pytest.approx(float(expected), abs=1e-6)
    loss = model(**rest, labels=torch.full_like(batch["labels"], -100)).loss
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(one.grad is None or not bool(one.grad.any()) for one in model.parameters())


@pytest.mark.parametrize("points", [[], POOLED])
def test_modules_are_called_once_and_in_the_same_order(points):
    """ZeRO-3 gathers parameters by the order of hooked calls."""
    model, batch = tiny_llava("sdpa").train(), make_batch(MIXED)
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: called.append(name))
    model(**batch)
    plain = called.copy()
    attach(model, points)
    called.clear()
    model(**batch)
    assert called == plain


def test_where_all_visual_tokens_leave_the_layer_before_runs_for_the_text():
    model, batch = tiny_llava("sdpa").train(), make_batch([[3, "image", 7], [4, "image", 6]])
    rows, columns = batch["input_ids"].shape
    attach(model, [{"kind": "early_exit", "layer": 3}])
    shapes = {}
    for name, module in model.model.language_model.layers.named_modules():
        module.register_forward_pre_hook(
            lambda _, args, name=name: shapes.update({name: tuple(args[0].shape[:2])}) if args else None
        )
    model(**batch)
    assert shapes["1.mlp"] == (rows, columns)
    assert shapes["2.self_attn.k_proj"] == (rows, columns) and shapes["2.mlp"] == (rows, columns - 9)
    assert shapes["3.self_attn.k_proj"] == (rows, columns - 9) and shapes["3.mlp"] == (rows, ANSWER)


def test_label_logits_keep_their_order():
    batch = make_batch([[3, "image", 7], [2, "image", 2, "image", 9]])
    batch["labels"][0, 14:18] = batch["input_ids"][0, 14:18]
    plain, model = tiny_llava("sdpa").eval(), tiny_llava("sdpa").eval()
    attach(model, [])
    with torch.no_grad():
        found = model(**batch, label_logits=True).logits
        logits = plain(**{name: value for name, value in batch.items() if name != "labels"}).logits
    wanted = logits[:, :-1][batch["labels"][:, 1:] != -100]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_rows_with_fewer_labels_are_filled_up_without_repeats():
    targets = torch.full((3, 6), -100)
    targets[0, [1, 2, 4]] = 7
    targets[1, 3] = 7
    queries = Queries.of(targets != -100)
    assert queries.columns_BQ.tolist() == [[1, 2, 4], [3, 4, 5], [3, 4, 5]]
    values = torch.randn(3, 6, 2)
    back = queries.put(queries.take(values))
    assert bool((back == values).sum() >= 3 * 3 * 2) and not bool(back[0, [0, 3, 5]].any())
    assert Queries.of(torch.ones(1, 4, dtype=torch.bool)) is None


def test_dropout_that_draws_by_place_keeps_the_whole_layer():
    model = tiny_llava("sdpa").train()
    layer = last_layer(model)
    assert runs_for_queries(layer)
    layer.mlp.add_module("lora_dropout", nn.Dropout(0.1))
    assert not runs_for_queries(layer)
    assert runs_for_queries(layer.eval())


def adapted(dropout):
    """A model with adapters that do something, whose dropout draws by sample as in training."""
    model = tiny_llava("sdpa").train()
    add_lora(model, LoraSpec(r=2, alpha=4, dropout=dropout), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    draws = Draws()
    draw_by_sample(model, draws)
    draws.enter(seed=0, step=1, samples=range(len(MIXED)))
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("points", [[], POOLED, EXIT, KEYS])
def test_adapters_give_what_they_give_in_whole_layers(points, dropout, seen, monkeypatch):
    batch = make_batch(MIXED)
    model = adapted(dropout)
    attach(model, points)
    shapes = seen(model)
    loss = model(**batch).loss
    found = gradients(model, loss)
    shortened = shapes["mlp"][0][1] < shapes["input_layernorm"][0][1]
    assert shortened == (dropout == 0.0)  # dropout draws by the place in a row
    for module in (decoder, queries, segments):
        monkeypatch.setattr(module, "runs_for_queries", lambda layer: False)
    whole = adapted(dropout)
    attach(whole, points)
    expected = whole(**batch).loss
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    wanted = gradients(whole, expected)
    assert any("lora_A" in name and bool(one.any()) for name, one in wanted.items())
    assert_same_gradients(found, wanted, 3e-6)
    if not points:
        plain = adapted(dropout)
        assert float(plain(**batch).loss.detach()) == pytest.approx(float(loss.detach()), abs=1e-6)


def test_flex_attention_keeps_the_whole_layer():
    model = tiny_llava("flex_attention").train()
    assert not runs_for_queries(last_layer(model))


class Mixing(nn.Module):
    """An MLP whose tokens see one another, which no layer that runs for some of them can do."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden_BND):
        return self.mlp(hidden_BND) + hidden_BND.mean(1, keepdim=True)


def test_a_layer_that_mixes_tokens_elsewhere_runs_whole(monkeypatch):
    from transformers.models.llama import modeling_llama

    make = modeling_llama.LlamaMLP
    monkeypatch.setattr(modeling_llama, "LlamaMLP", lambda config: Mixing(make(config)))

    class LlamaDecoderLayer(modeling_llama.LlamaDecoderLayer):  # a class of its own, so that nothing is known of it
        pass

    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", LlamaDecoderLayer)
    model, batch = tiny_llava("sdpa").train(), make_batch(MIXED)
    expected = model(**batch).loss
    attachment = attach(model, [])
    assert not attachment.trims_last_layer
    assert float(model(**batch).loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)


@pytest.mark.parametrize("name", sorted(TINY))
def test_families_whose_last_layer_is_shortened(name):
    family = family_of(TINY[name].build("sdpa" if "sdpa" in TINY[name].attentions else "eager", 0))
    assert shows_queries(family) == (name not in WHOLE)


def test_what_is_not_done_is_what_the_formula_says():
    """Operations of a forward pass as torch counts them, which counts scores above the diagonal, too."""
    batch = make_batch([[3, "image", 7], [4, "image", 6]])
    rows, columns = batch["input_ids"].shape
    counts = []
    for whole in (False, True):
        model = tiny_llava("eager").eval()
        attachment = attach(model, [])
        if whole:
            attachment._decoder.trims = False
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**batch)
        counts.append(counter.get_total_flops())
    text = model.config.text_config
    facts = decoder_facts(text)
    sample = Sample(columns - 9, ANSWER)
    unread = columns - ANSWER
    once = cost.unread_tflops_per_sample(facts, [], sample, {"train": []}) * 1e12
    scores = facts.num_attention_heads * facts.head_dim * (4 * unread * columns - 2 * unread**2)
    assert counts[1] - counts[0] == pytest.approx(rows * (once + scores), rel=1e-6)

"""Every family trains and answers from images: batches are the processor's own, labels are on answers only."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conversations import row_of
from family_folders import FOLDERS, write_folder
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from orchestrator.compression import attach
from orchestrator.data.processing.encode import Encoder, collate
from orchestrator.data.processing.processor import load_processor
from orchestrator.data.processing.templates import render
from orchestrator.errors import DataError, UsageError
from orchestrator.evaluation.evaluate import evaluation_mode, greedy_answers
from orchestrator.evaluation.protocol import EvaluationData
from orchestrator.spec.model import ModelSpec

# What their processors ask for in transformers, where it is not installed.
NEEDS = {
    family: package
    for family, package in {"smolvlm": "num2words", "mistral3": "torchvision"}.items()
    if find_spec(package) is None
}
SIZES_HW = {"wide": (30, 44), "tall": (50, 21), "square": (24, 24), "large": (60, 66)}
LAYER = 1


class Served:
    """A family's folder, loaded."""

    def __init__(self, family, folder):
        self.family, self.folder = family, write_folder(family, folder)
        self.processor = load_processor(ModelSpec(model_name_or_path=str(self.folder)))
        self.hf, self.encoder = self.processor.processor, Encoder(self.processor, "chat_template", 2048)

    def model(self):
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(self.folder, attn_implementation="eager")
        return AutoModelForImageTextToText.from_config(config)

    def batch(self, rows, **options):
        return collate([self.encoder.encode(row) for row in rows], self.processor, **options)

    def wanted(self, rows, prompt=False):
        """What the model's own processor gives for these rows."""
        images = [[Image.open(image.path).convert("RGB") for image in row.images] for row in rows]
        given = {"images": images if any(images) else None}
        if self.family == "paligemma":
            # Its processor writes the begin token, the line end and the suffix itself.
            given["text"] = ["<image>" * len(row.images) + row.turns[0].text.replace("<image>", "") for row in rows]
            if not prompt:
                given["suffix"] = [row.turns[1].text for row in rows]
        else:
            given["text"] = [render("chat_template", row, self.processor.chat, prompt).text for row in rows]
        return self.hf(**given, return_tensors="pt", padding=True, padding_side="right")


@pytest.fixture(scope="module", params=list(FOLDERS))
def served(request, tmp_path_factory):
    if request.param in NEEDS:
        pytest.skip(f"its processor needs {NEEDS[request.param]}")
    return Served(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, size in SIZES_HW.items():
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return {name: str(folder / f"{name}.png") for name in SIZES_HW}


@pytest.fixture(scope="module")
def rows(pictures):
    """Rows of one, none, two and one image."""
    return [
        row_of("<image>what is the red shape?", "circle", images=(pictures["wide"],), index=0),
        row_of("is there a shape?", "no", index=1),
        row_of("<image><image>which is blue?", "the rectangle", images=(pictures["tall"], pictures["large"]), index=2),
        row_of("<image>is it a triangle?", "yes", images=(pictures["square"],), index=3),
    ]


def test_a_batch_is_what_the_processor_gives(served, rows):
    for chosen in ([0], [0, 3], [2], [3, 2, 0], [0, 1, 2, 3]):
        if 1 in chosen and served.family == "paligemma":
            continue  # its processor takes no row without an image
        some = [rows[number] for number in chosen]
        batch, wanted = served.batch(some), served.wanted(some)
        assert set(batch) - {"labels"} == set(wanted) - {"labels"}
        for name in set(batch) - {"labels"}:
            assert batch[name].shape == wanted[name].shape, name
            assert torch.equal(batch[name], wanted[name].to(batch[name].dtype)), name
        if served.family == "paligemma":
            assert torch.equal(batch["labels"], wanted["labels"].masked_fill(wanted["attention_mask"] == 0, -100))


def test_cached_images_join_to_the_same_batch(served, rows):
    first = served.batch([rows[2], rows[0]])
    served.batch([rows[3]])
    again = served.batch([rows[2], rows[0]])
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_rows_without_an_image(served, rows):
    batch = served.batch([rows[1], rows[1]])
    assert not any(name.startswith(("pixel", "image")) for name in batch)
    if served.family != "paligemma":
        assert torch.equal(batch["input_ids"], served.wanted([rows[1], rows[1]])["input_ids"])


def test_labels_are_on_the_answer_alone(served, rows):
    for row in rows:
        sample = served.encoder.encode(row)
        kept = sample.labels[sample.labels != -100]
        assert served.processor.tokenizer.decode(kept).strip() == f"{row.turns[1].text}</s>"
        assert (sample.labels[sample.labels != -100] == sample.input_ids[sample.labels != -100]).all()
        visual = int((sample.input_ids == served.processor.image_token_id).sum())
        assert visual == sample.num_visual_tokens and (visual > 0) == bool(row.images)


def test_answers_after_later_images_carry_the_loss(served, pictures):
    row = row_of("<image>first?", "one", "and <image>?", "two", images=(pictures["large"], pictures["wide"]), index=7)
    if served.family == "paligemma":
        return  # it has no turns
    sample = served.encoder.encode(row)
    text = served.processor.tokenizer.decode(sample.labels[sample.labels != -100])
    assert "".join(text.split()) == "one</s>two</s>"


def test_the_limit_never_cuts_an_image(served, rows):
    whole, tried = served.encoder.encode(rows[2]), 0
    for limit in range(len(whole) // 2, len(whole) + 2):
        try:
            sample = Encoder(served.processor, "chat_template", limit).encode(rows[2])
        except DataError as error:
            assert "an image of" in str(error)
            continue
        tried += 1
        texts = served.processor.images.texts(sample.images)
        visual = int((sample.input_ids == served.processor.image_token_id).sum())
        assert visual == sum(text.num_visual_tokens for text in texts) == sample.num_visual_tokens
        assert len(sample) <= limit
        if len(sample.images) == 2:
            assert (sample.input_ids == whole.input_ids[: len(sample)]).all()
        collate([sample], served.processor)
    assert tried > 2


def test_one_training_step(served, rows):
    model = served.model()
    attachment = attach(model, [{"kind": "average_pool", "layer": LAYER, "keep_ratio": 0.5}])
    batch = served.batch(rows)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    assert torch.isfinite(loss)
    embedding = model.get_input_embeddings().weight.grad
    assert embedding is not None and embedding.abs().sum() > 0
    # Gemma 3 starts a map behind its tower at zero, so that only the map itself learns in the first step.
    seeing = [p.grad for name, p in model.named_parameters() if "language_model" not in name and "lm_head" not in name]
    assert any(grad is not None and grad.abs().sum() > 0 for grad in seeing)
    visual = int((batch["input_ids"] == served.processor.image_token_id).sum())
    layers = model.config.get_text_config().num_hidden_layers
    assert visual * LAYER < attachment.last_visual_layer_tokens < visual * layers


def test_answers_are_the_plain_models_whatever_the_batch(served, rows):
    model = served.model()
    data = EvaluationData(rows, served.encoder, served.processor)
    tokenizer = served.processor.tokenizer
    with evaluation_mode(model):
        answers = greedy_answers(model, rows, data, batch_size=4, max_new_tokens=4)
        for row, answer in zip(rows, answers, strict=True):
            if served.family == "paligemma" and not row.images:
                continue
            given = served.wanted([row], prompt=True)
            given = {name: value for name, value in given.items() if name != "labels"}
            new = model.generate(
                **given,
                max_new_tokens=4,
                do_sample=False,
                suppress_tokens=served.processor.placeholder_ids,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )[0, given["input_ids"].shape[1] :]
            assert tokenizer.decode(new, skip_special_tokens=True).strip() == answer
        attach(model, [{"kind": "average_pool", "layer": LAYER, "keep_ratio": 0.5}])
        together = greedy_answers(model, rows, data, batch_size=4, max_new_tokens=4)
        assert together == greedy_answers(model, rows, data, batch_size=1, max_new_tokens=4)


@pytest.mark.parametrize("family", list(NEEDS))
def test_a_processor_whose_package_is_missing_is_refused(family, tmp_path):
    with pytest.raises(UsageError, match=rf"processor of {family} needs a package .*(?i:{NEEDS[family]})"):
        load_processor(ModelSpec(model_name_or_path=str(write_folder(family, tmp_path))))


def test_two_images_of_a_row_that_loses_one_are_read_as_a_lone_image_is(tmp_path, pictures):
    """LLaVA-OneVision cuts a lone image into tiles, and several of a row not."""
    served = Served("llava_onevision", tmp_path)
    row = row_of("<image>a", "b", "<image>c", "d", images=(pictures["square"], pictures["large"]))
    both = served.encoder.encode(row)
    lone = served.processor.images.texts(row.images[:1])[0].num_visual_tokens
    second = np.flatnonzero(both.input_ids == served.processor.image_token_id)[-1]
    sample = Encoder(served.processor, "chat_template", int(second)).encode(row)
    assert sample.images == row.images[:1]
    assert int((sample.input_ids == served.processor.image_token_id).sum()) == lone != 10
    assert collate([sample], served.processor)["batch_num_images"].tolist() == [1]


def test_a_model_of_prefix_and_suffix_has_no_turns(tmp_path):
    served = Served("paligemma", tmp_path)
    with pytest.raises(DataError, match="one question and writes one answer, not 4 turns"):
        served.encoder.encode(row_of("a", "b", "c", "d"))


def test_a_processor_of_another_model_is_refused(tmp_path, pictures):
    folder = write_folder("llava", tmp_path)
    config = AutoConfig.from_pretrained(folder)
    config.image_token_id = 7
    config.save_pretrained(folder)
    encoder = Encoder(load_processor(ModelSpec(model_name_or_path=str(folder))), "chat_template", 2048)
    with pytest.raises(UsageError, match=r"LlavaProcessor writes .* without the model's placeholder"):
        encoder.encode(row_of("<image>what?", "a", images=(pictures["wide"],)))

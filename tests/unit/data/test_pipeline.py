"""TrainData on real easy-VQA rows and real files: batches ready for the model."""

import runpy
import shutil

import pytest
import torch
from conversations import say
from PIL import Image
from repository import MODELS, TINY_LLAVA
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from orchestrator.data.processing.images import BoundedCache
from orchestrator.data.processing.processor import load_processor
from orchestrator.data.train_data import build_train_data
from orchestrator.errors import DataError, UsageError
from orchestrator.spec.model import ModelSpec

TINY = str(MODELS / "tiny-llava")
EASY = [{"name": "train", "share": 1.0, "spec": {"kind": "easy_vqa", "split": "train"}}]


def files(path, pictures, **fields):
    return [
        {"name": "mine", "share": 1.0, "spec": {"kind": "llava_json", "data_path": path, "image_folder": str(pictures)}}
        | fields
    ]


def test_a_batch_of_easy_vqa(processor):
    data = build_train_data(EASY, processor, 2048)
    assert len(data) == 38_575
    indices = data.batch_indices(0, 0, 128, True)
    batch = data.collate(indices)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    assert batch["pixel_values"].shape == (128, 3, 64, 64) and batch["pixel_values"].dtype == torch.float32
    for number, index in enumerate(indices):
        labels = batch["labels"][number]
        assert processor.tokenizer.decode(labels[labels != -100]) == f" {data.rows[index].turns[1].text}</s>"
        assert int(batch["attention_mask"][number].sum()) == len(data.sample(index))
    assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.pad_token_id).all()
    again = data.collate(indices)
    assert all(torch.equal(again[name], batch[name]) for name in batch)


def test_pixels_are_the_processors_own(processor, pictures, conversation_file):
    records = [{"image": f"{n}.png", "conversations": say("<image>", "a")} for n in (2, 0, 2, 5)]
    data = build_train_data(files(conversation_file(records), pictures), processor, 2048)
    wanted = processor.processor.image_processor(
        images=[Image.open(pictures / f"{n}.png").convert("RGB") for n in (2, 0, 2, 5)], return_tensors="pt"
    )["pixel_values"]
    assert torch.equal(data.collate([0, 1, 2, 3])["pixel_values"], wanted)


def test_padding_sides_and_mixed_and_text_only_batches(processor, pictures, conversation_file):
    records = [
        {"image": ["0.png", "1.png"], "conversations": say("<image> and <image>?", "both")},
        {"conversations": say("hello there", "hi")},
        {"image": "2.png", "conversations": say("look <image>", "yes")},
    ]
    data = build_train_data(files(conversation_file(records), pictures), processor, 2048)
    right, left = data.collate([0, 1, 2]), data.collate([0, 1, 2], padding_side="left")
    assert right["pixel_values"].shape[0] == 3
    for number in range(3):
        keep_right, keep_left = right["attention_mask"][number].bool(), left["attention_mask"][number].bool()
        assert keep_right[0] and keep_left[-1]
        for name in ("input_ids", "labels"):
            assert torch.equal(right[name][number][keep_right], left[name][number][keep_left])
    assert "pixel_values" not in data.collate([1])


def test_the_model_takes_the_batch_and_learns_from_it(processor):
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(TINY))
    data = build_train_data(EASY, processor, 2048)
    loss = model(**data.collate(data.batch_indices(0, 0, 4, True))).loss
    loss.backward()
    idle = {name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}
    # CLIP's pooled output is no input of LLaVA; every other parameter must learn.
    assert idle == {"model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"}
    assert 200_000 < sum(weight.numel() for weight in model.parameters()) < 260_000


def test_a_mixture_counts_shares(processor, pictures, conversation_file):
    records = [{"image": "0.png", "conversations": say("<image>", "a")}] * 10
    sets = [
        {"name": "a", "share": 0.5, "spec": {"kind": "easy_vqa", "split": "test", "max_samples": 40}},
        files(conversation_file(records), pictures, share=1.0)[0],
    ]
    data = build_train_data(sets, processor, 2048)
    assert len(data) == 30 and len(data.rows) == 50
    seen = data.batch_indices(3, 0, 30, False)
    assert sum(index < 40 for index in seen) == 20 and {index for index in seen if index >= 40} == set(range(40, 50))


def test_an_image_that_breaks_after_the_check_stops_the_run(processor, pictures, conversation_file):
    path = conversation_file([{"image": "0.png", "conversations": say("<image>", "a")}])
    data = build_train_data(files(path, pictures), processor, 2048)
    (pictures / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"0\.png is empty; restore"):
        data.collate([0])


def test_rows_with_too_many_images_are_told_before_training(processor, pictures, conversation_file):
    records = [
        {"image": "0.png", "conversations": say("<image>", "a")},
        {"image": ["0.png"] * 3, "conversations": say("<image>" * 3, "a")},
    ]
    with pytest.raises(DataError, match="row 1: 3 images take 192 tokens, model_max_length is 150"):
        build_train_data(files(conversation_file(records), pictures), processor, 150)


def test_a_limit_that_leaves_no_answer_is_told_before_training(processor):
    with pytest.raises(DataError, match=r"data\.train: model_max_length 70 cuts off every answer"):
        build_train_data(EASY, processor, 70)


def test_a_folder_without_a_processor_is_told(tmp_path):
    with pytest.raises(UsageError, match="no processor in"):
        load_processor(ModelSpec(model_name_or_path=str(tmp_path)))


def test_a_tokenizer_without_an_end_token_is_told(tmp_path):
    for name in ("config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"):
        shutil.copy(TINY_LLAVA / name, tmp_path)
    with pytest.raises(UsageError, match="names no eos_token"):
        load_processor(ModelSpec(model_name_or_path=str(tmp_path)))


def test_the_cache_forgets_what_was_not_used_for_longest():
    cache: BoundedCache[str] = BoundedCache(30)
    for name in "abc":
        cache.put(name, name, 10)
    assert cache.get("a") == "a"
    cache.put("d", "d", 10)
    assert cache.get("b") is None and cache.get("a") == "a" and cache.get("d") == "d"
    cache.put("too large", "x", 31)
    assert cache.get("too large") is None and cache.get("c") == "c"


def test_the_tiny_folder_loads_and_its_answers_are_single_tokens(processor):
    found = AutoProcessor.from_pretrained(TINY)
    assert found.image_token_id == processor.image_token_id == AutoConfig.from_pretrained(TINY).image_token_id
    for word in ("yes", "no", "circle", "rectangle", "triangle", "red", "teal", "yellow"):
        assert len(processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1
    text = 'Hello, "World"! {x}\n\n 1 + 2 ~ 3'
    assert processor.tokenizer.decode(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_tiny_folders_are_what_their_script_writes(tmp_path):
    runpy.run_path(str(MODELS / "make_tiny_llava.py"))["main"](tmp_path)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    names = {path.parts[0] for path in written}
    assert names == {"tiny-llava", "tiny-llava-16", "tiny-llava-digits"}
    assert written == sorted(path.relative_to(MODELS) for name in names for path in (MODELS / name).iterdir())
    for file in written:
        assert (tmp_path / file).read_text() == (MODELS / file).read_text(), file

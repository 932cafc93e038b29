"""What cannot run is refused by `validate`, with the reason and what to do: places, folders, implementations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from spec_files import TINY

from orchestrator.errors import SpecError
from orchestrator.spec.loader import load_experiment

ROWS = "train: {kind: easy_vqa, split: train}"
MODEL = "model_name_or_path: tiny, weights: random"
PARTS = "model_name_or_path: tiny, weights: {{vision_tower: {}, projector: random, language_model: {}}}"
JSON = "train: {{kind: llava_json, data_path: {}}}"
TABLE = [
    (("seed: 0", "cluster: {address: 'ray://head:10001'}"), "does not run over Ray's client"),
    ((ROWS, JSON.format("https://host/rows.json")), "not from an address"),
    ((ROWS, JSON.format("s3://bucket/rows.json")), "not from an address"),
    ((ROWS, JSON.format("hf://datasets/org/rows.json")), "not from an address"),
    (("kind: exact_match", "kind: anls"), "anls needs answers of every row, which data.test does not give"),
    ((ROWS, JSON.format("rows.parquet")), "`.parquet` files are not read"),
    ((ROWS, JSON.format("rows.CSV")), "`.CSV` files are not read"),
    ((ROWS, JSON.format("tiny")), "expected a file, got a folder"),
    ((ROWS, JSON.format("rows.json, image_folder: experiment.yaml")), "expected a folder, got a file"),
    ((MODEL, "model_name_or_path: adapter, weights: random"), "merge_and_unload"),
    ((MODEL, "model_name_or_path: gguf"), "GGUF holds quantised weights"),
    ((MODEL, "model_name_or_path: empty"), "the folder has no config.json"),
    ((MODEL, PARTS.format("random", "adapter")), "merge_and_unload"),
    ((MODEL, PARTS.format("empty", "random")), "the folder has no config.json"),
    ((MODEL, PARTS.format("random", "gguf/model.gguf")), "GGUF holds quantised weights"),
    ((MODEL, "model_name_or_path: shards"), "1 of 2 files of its weights are missing: two.safetensors"),
    ((MODEL, "model_name_or_path: broken"), "pytorch_model.bin.index.json cannot be read"),
    ((MODEL, "model_name_or_path: pointer"), "a pointer of Git LFS"),
    ((MODEL, PARTS.format("random", "shards")), "two.safetensors"),
    ((MODEL, PARTS.format("pointer", "random")), "git lfs pull"),
    ((MODEL, "model_name_or_path: llama, weights: random"), "`llama` is a model of text"),
    ((MODEL, "model_name_or_path: t5, weights: random"), "`t5` is a model of text"),
    ((MODEL, "model_name_or_path: typeless, weights: random"), "names no `model_type`"),
    ((MODEL, "model_name_or_path: original, weights: random"), "LLaVA's own format"),
    ((MODEL, PARTS.format("llama", "random")), "`llama` is no vision tower"),
    ((MODEL, PARTS.format("random", "t5")), "`t5` has an encoder and a decoder"),
    (("seed: 0", "cluster: {storage_path: 'gs://bucket/runs'}"), "no such storage"),
    (("seed: 0", "cluster: {storage_path: experiment.yaml}"), "expected a folder, got a file"),
    (("seed: 0", "tracking: {tracking_uri: 'wandb://project'}"), "MLflow does not support `wandb:`"),
    (("seed: 0", "tracking: {also: [tensorbord]}"), "did you mean tensorboard?"),
    (("seed: 0", "tracking: {also: [wandb, wandb]}"), "stands here twice"),
    (("seed: 0", "tracking: {also: [mlflow]}"), "MLflow records everything anyway"),
    (("seed: 0", "tracking: {tracking_uri: mlruns}"), "no longer stores records in plain folders"),
    (("seed: 0", "tracking: {tracking_uri: 'file:///x'}"), "no longer stores records in plain folders"),
    (("seed: 0", "tracking: {tracking_uri: 'localhost:5000'}"), "write http://localhost:5000"),
    (("seed: 0", "tracking: {tracking_uri: 'sqlite3:///x.db'}"), "MLflow does not support `sqlite3:`"),
    (("seed: 0", "cluster: {resources_per_worker: {gpu: 1}}"), "write GPU"),
    (("seed: 0", "cluster: {resources_per_worker: {Cpu: 2}}"), "write CPU"),
    (("seed: 0", "cluster: {use_gpu: false, resources_per_worker: {GPU: 1}}"), "drop one of the two"),
    (("max_steps", "global_batch_size: 4\n    per_device_train_batch_size: 8\n    max_steps"), "does not divide"),
    (("max_steps", "lora: {target_modules: []}\n    max_steps"), "LoRA without modules"),
    (("max_steps", "lora: {target_modules: [q_proj, fc1]}\n    max_steps"), "no linear layers `fc1`"),
    (("max_steps", "lora: {target_modules: [lm_head]}\n    max_steps"), "no linear layers `lm_head`"),
    (("max_steps", "lora: {target_modules: [self_attn.q_proj]}\n    max_steps"), "`self_attn.q_proj`"),
    (("max_steps", "lora: {target_modules: [all-linear]}\n    max_steps"), "no linear layers `all-linear`"),
]
TEXT = {"vocab_size": 201, "hidden_size": 64}
INDEX = {"weight_map": {"lm_head.weight": "one.safetensors", "model.norm.weight": "two.safetensors"}}
FILES = {
    "adapter/adapter_config.json": {},
    "gguf/model.gguf": {},
    "empty/notes.txt": {},
    "shards/config.json": TINY,
    "shards/model.safetensors.index.json": INDEX,
    "shards/one.safetensors": {},
    "broken/config.json": TINY,
    "broken/pytorch_model.bin.index.json": [],
    "pointer/config.json": TINY,
    "llama/config.json": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TEXT},
    "t5/config.json": {"model_type": "t5", "is_encoder_decoder": True, **TEXT},
    "typeless/config.json": {key: value for key, value in TINY.items() if key != "model_type"},
    "original/config.json": {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336", **TEXT},
    "remote/config.json": {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}, **TEXT},
    "other/config.json": {"model_type": "other", "vision_config": {}, **TEXT},
}


@pytest.fixture
def places(folder: Path) -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "pointer/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    return folder


@pytest.mark.parametrize(("change", "message"), TABLE, ids=[change[1][:60] for change, _ in TABLE])
def test_what_cannot_be_used_is_refused(
    places: Path, write: Callable[..., Path], small: str, change: tuple[str, str], message: str
) -> None:
    text = f"seed: 0\n{small}"
    assert change[0] in text
    with pytest.raises(SpecError) as caught:
        load_experiment(write(text.replace(*change)))
    (error,) = caught.value.errors
    assert message in f"{error.message} {error.hint}"
    assert error.line is not None and error.value is not None


@pytest.mark.parametrize(
    "uri", ["http://host:5000", "sqlite:///x.db", "postgresql+psycopg2://host/db", "databricks", "databricks://profile"]
)
def test_mlflows_own_addresses_are_let_through(write: Callable[..., Path], small: str, uri: str) -> None:
    assert load_experiment(write(f"tracking: {{tracking_uri: '{uri}'}}\n{small}")).cells


@pytest.mark.parametrize("name", ["remote", "other"])
def test_a_model_that_may_take_images_is_let_through(
    places: Path, write: Callable[..., Path], small: str, name: str
) -> None:
    assert load_experiment(write(small.replace("model_name_or_path: tiny", f"model_name_or_path: {name}"))).cells


def test_every_worker_has_a_sample_under_auto(write: Callable[..., Path], small: str) -> None:
    text = f"cluster: {{num_workers: 8}}\n{small}"
    batch = "global_batch_size: {}\n    per_device_train_batch_size: auto\n    max_steps"
    assert load_experiment(write(text.replace("max_steps", batch.format(9)))).cells
    with pytest.raises(SpecError, match="less than a sample for each of 8 workers"):
        load_experiment(write(text.replace("max_steps", batch.format(7))))


def test_auto_needs_a_model_whose_sizes_are_known(places: Path, write: Callable[..., Path], small: str) -> None:
    text = small.replace("max_steps", "per_device_train_batch_size: auto\n    max_steps")
    assert load_experiment(write(text)).cells
    with pytest.raises(SpecError, match="its sizes are not known"):
        load_experiment(write(text.replace("model_name_or_path: tiny", "model_name_or_path: other")))
    (places / "other" / "config.json").write_text('{"model_type": "qwen3_vl_moe"}')
    with pytest.raises(SpecError, match="its layers have experts, or do not all attend"):
        load_experiment(write(text.replace("model_name_or_path: tiny", "model_name_or_path: other")))


def test_weights_that_are_not_here_yet_are_noted(write: Callable[..., Path], small: str) -> None:
    loaded = load_experiment(write(small.replace("weights: random", "weights: pretrained")))
    assert any("there are no weights in" in notice for notice in loaded.notices)


@pytest.mark.parametrize(
    ("gone", "words"), [("tokenizer.json", "no tokenizer in"), ("processor_config.json", "no image processor in")]
)
def test_what_reads_texts_and_images_is_noted_where_it_is_not_here(
    folder: Path, write: Callable[..., Path], small: str, gone: str, words: str
) -> None:
    (folder / "tiny" / gone).unlink()
    assert [notice for notice in load_experiment(write(small)).notices if words in notice]


def test_data_that_is_not_here_yet_is_noted(folder: Path, write: Callable[..., Path], small: str) -> None:
    loaded = load_experiment(write(small.replace(ROWS, JSON.format("rows.json"))))
    message = f"data.train.data_path: {folder}/rows.json does not exist yet"
    assert [notice for notice in loaded.notices if message in notice]


PLUGIN = """
from typing import ClassVar, Literal
from orchestrator.spec.components import DataSpec

class OwnRows(DataSpec):
    {implementation}
    kind: Literal["own_rows"] = "own_rows"
    def num_rows(self): return 10
    def content_digest(self): return ""

class Whole:
    def rows(self): return []

class Lacking:
    def lines(self): return []

def make(): return Whole()
"""


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("", "names nothing"),
        ("implementation: ClassVar[str] = 'Whole'", "is not MODULE:CLASS"),
        ("implementation: ClassVar[str] = 'nowhere_at_all:Whole'", "there is no module nowhere_at_all"),
        ("implementation: ClassVar[str] = 'nowhere_at_all.deep:Whole'", "there is no module nowhere_at_all.deep"),
        ("implementation: ClassVar[str] = __name__ + ':Hole'", "the module has no Hole"),
        ("implementation: ClassVar[str] = __name__ + ':Lacking'", "Lacking lacks rows()"),
        ("implementation: ClassVar[str] = __name__ + ':Whole'", None),
        ("implementation: ClassVar[str] = __name__ + ':make'", None),
    ],
)
def test_an_implementation_is_there(
    write: Callable[..., Path], small: str, implementation: str, message: str | None
) -> None:
    write(PLUGIN.format(implementation=implementation), "own.py")
    file = write("plugins: [own.py]\n" + small.replace(ROWS, "train: {kind: own_rows}"))
    if message is None:
        assert load_experiment(file).cells
        return
    with pytest.raises(SpecError) as caught:
        load_experiment(file)
    (error,) = caught.value.errors
    assert message in error.message and error.path == "data.train.kind"

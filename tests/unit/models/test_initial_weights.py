"""Initial weights: the same for the same seed, put together by part, and clear words where they do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from repository import TINY_LLAVA
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from orchestrator.errors import StageRunError, StorageError, UsageError
from orchestrator.models.build import WEIGHTS_FILE, build_model, compute_dtype, save_weights, weight_tensors
from orchestrator.models.initial_weights import write_initial_weights, write_start_weights
from orchestrator.plan.jobs import RootJob, StartJob
from orchestrator.spec.model import ModelSpec

PREFIX = {"vision_tower": "model.vision_tower.", "language_model": "model.language_model."}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP, a vision tower alone, a Llama with fewer tokens, and LLaVA's mm_projector.bin, all of the tiny sizes."""
    folder = tmp_path_factory.mktemp("sources")
    config = json.loads((TINY_LLAVA / "config.json").read_text())
    vision = {key: value for key, value in config["vision_config"].items() if key != "model_type"}
    text = {key: value for key, value in config["text_config"].items() if key != "model_type"}
    torch.manual_seed(5)
    small_text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPModel(CLIPConfig(text_config=small_text, vision_config=vision)).save_pretrained(folder / "clip")
    CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(folder / "tower")
    CLIPVisionModel(CLIPVisionConfig(**{**vision, "hidden_size": 32})).save_pretrained(folder / "narrow_tower")
    LlamaForCausalLM(LlamaConfig(**{**text, "vocab_size": 190})).save_pretrained(folder / "llama")
    LlamaForCausalLM(LlamaConfig(**{**text, "vocab_size": 999})).save_pretrained(folder / "large_llama")
    shapes = {"0.weight": (64, 64), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    projector = {f"model.mm_projector.{name}": torch.randn(shape) for name, shape in shapes.items()}
    (folder / "t5").mkdir()
    (folder / "t5/config.json").write_text(json.dumps({"model_type": "t5"}))
    torch.save(projector, folder / "mm_projector.bin")
    torch.save({"model.mm_projector.0.weight": torch.zeros(64, 32)}, folder / "broken.bin")
    return folder


def _written(folder: Path, seed: int = 0, **model: object) -> dict[str, torch.Tensor]:
    job = RootJob("root", {"model_name_or_path": str(TINY_LLAVA), "weights": "random", **model}, seed)
    write_initial_weights(job, folder)
    return load_file(folder / WEIGHTS_FILE)


def test_random_weights_are_a_function_of_the_seed(tmp_path: Path) -> None:
    _written(tmp_path / "a")
    torch.randn(7)  # the caller's generator has no say
    _written(tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS_FILE).read_bytes() == (tmp_path / "b" / WEIGHTS_FILE).read_bytes()
    other = _written(tmp_path / "c", seed=1)
    assert not torch.equal(other["lm_head.weight"], load_file(tmp_path / "a" / WEIGHTS_FILE)["lm_head.weight"])
    assert all(tensor.dtype == torch.float32 for tensor in other.values())


def test_a_built_model_has_the_files_weights_and_computes(tmp_path: Path) -> None:
    weights = _written(tmp_path, seed=3)
    model = build_model(
        ModelSpec(model_name_or_path=str(TINY_LLAVA), attn_implementation="eager"), tmp_path / WEIGHTS_FILE
    )
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weight_tensors(model).items())
    assert model.config.text_config._attn_implementation == "eager"
    torch.manual_seed(3)
    plain = build_model(ModelSpec(model_name_or_path=str(TINY_LLAVA), attn_implementation="eager"), None)
    ids = torch.tensor([[1, 20, 21, 22]])
    # Buffers such as the rotary frequencies are not in the file and must be whole all the same.
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_tied_embeddings_are_written_once_and_tied_again(tmp_path: Path) -> None:
    shutil.copytree(TINY_LLAVA, tmp_path / "tied")
    config = json.loads((TINY_LLAVA / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "tied/config.json").write_text(json.dumps(config))
    spec = ModelSpec(model_name_or_path=str(tmp_path / "tied"), weights="random")
    write_initial_weights(RootJob("root", spec.model_dump(), 0), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS_FILE)
    model = build_model(spec, tmp_path / WEIGHTS_FILE)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_pretrained_is_what_was_saved(tmp_path: Path) -> None:
    torch.manual_seed(11)
    model = build_model(ModelSpec(model_name_or_path=str(TINY_LLAVA)), None)
    model.save_pretrained(tmp_path / "saved")
    written = _written(tmp_path, model_name_or_path=str(tmp_path / "saved"), weights="pretrained")
    assert written.keys() == weight_tensors(model).keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in weight_tensors(model).items())


@pytest.mark.parametrize("tower", ["clip", "tower"])
def test_weights_by_part(sources: Path, tmp_path: Path, tower: str) -> None:
    parts = {"vision_tower": tower, "language_model": "llama", "projector": "mm_projector.bin"}
    written = _written(tmp_path, weights={part: str(sources / name) for part, name in parts.items()})
    vision = load_file(sources / tower / "model.safetensors")
    name = "encoder.layers.0.mlp.fc1.weight"
    given = next(tensor for key, tensor in vision.items() if key.endswith(name) and "text_model" not in key)
    assert torch.equal(written[f"model.vision_tower.{name}"], given)
    llama = load_file(sources / "llama/model.safetensors")
    embedding = written["model.language_model.embed_tokens.weight"]
    assert torch.equal(embedding[:190], llama["model.embed_tokens.weight"])
    assert torch.allclose(embedding[190:], llama["model.embed_tokens.weight"].mean(0).expand(11, -1))
    assert torch.equal(written["lm_head.weight"][:190], llama["lm_head.weight"])
    assert torch.equal(
        written["model.language_model.layers.3.mlp.up_proj.weight"], llama["model.layers.3.mlp.up_proj.weight"]
    )
    projector = torch.load(sources / "mm_projector.bin", weights_only=True)
    for ours, theirs in (("linear_1", "0"), ("linear_2", "2")):
        given = projector[f"model.mm_projector.{theirs}.weight"]
        assert torch.equal(written[f"model.multi_modal_projector.{ours}.weight"], given)


def test_random_parts_follow_the_seed(sources: Path, tmp_path: Path) -> None:
    parts = {"vision_tower": str(sources / "tower"), "language_model": "random", "projector": "random"}
    one, two = (_written(tmp_path / str(seed), seed=seed, weights=parts) for seed in (0, 1))
    same = {name for name in one if torch.equal(one[name], two[name])}
    assert {name for name in one if name.startswith("model.vision_tower.")} <= same
    assert "lm_head.weight" not in same and "model.multi_modal_projector.linear_1.weight" not in same


@pytest.mark.parametrize(
    ("part", "source", "error", "words"),
    [
        (
            "vision_tower",
            "narrow_tower",
            StageRunError,
            "patch_embedding.weight [32, 3, 8, 8] instead of",
        ),
        ("language_model", "large_llama", StageRunError, "999 tokens, more than the model's 201"),
        ("projector", "broken.bin", StageRunError, "missing: linear_1.bias, linear_2.bias, linear_2.weight"),
        ("projector", "nothing.bin", UsageError, "model.weights.projector"),
        ("vision_tower", "no_folder", UsageError, "no_folder"),
        ("language_model", "t5", UsageError, "is not of the kind that is needed"),
        ("language_model", "tower", (UsageError, StageRunError), "model.weights.language_model"),
    ],
)
def test_what_does_not_fit_is_said(
    sources: Path, tmp_path: Path, part: str, source: str, error: type[Exception], words: str
) -> None:
    parts = {"vision_tower": "random", "language_model": "random", "projector": "random", part: str(sources / source)}
    with pytest.raises(error) as told:
        _written(tmp_path, weights=parts)
    assert words in str(told.value)


@pytest.fixture(scope="module")
def spoilt(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sources with one number gone wrong in each, or stored in whole numbers."""
    folder = tmp_path_factory.mktemp("spoilt")
    projector = torch.load(sources / "mm_projector.bin", weights_only=True)
    name = "model.mm_projector.2.bias"
    for kind, value in {"nan": float("nan"), "inf": float("-inf")}.items():
        torch.save({**projector, name: torch.full((64,), value)}, folder / f"{kind}.bin")
        save_file({**projector, name: torch.full((64,), value).bfloat16()}, folder / f"{kind}.safetensors")
    whole = {key: (tensor * 10).to(torch.int8) for key, tensor in projector.items() if key.endswith("weight")}
    torch.save({**projector, **whole}, folder / "int8.bin")
    tower = CLIPVisionModel.from_pretrained(sources / "tower")
    tower.get_parameter("encoder.layers.0.mlp.fc1.bias").data[3] = float("inf")
    tower.save_pretrained(folder / "tower")
    llama = LlamaForCausalLM.from_pretrained(sources / "llama")
    llama.get_parameter("model.layers.3.mlp.up_proj.weight").data[-1, -1] = float("nan")
    llama.save_pretrained(folder / "llama", max_shard_size="100KB")
    assert (folder / "llama/model.safetensors.index.json").is_file()
    whole_model = build_model(ModelSpec(model_name_or_path=str(TINY_LLAVA)), None)
    whole_model.lm_head.weight.data[0, 0] = float("nan")
    whole_model.save_pretrained(folder / "model")
    save_weights(weight_tensors(whole_model), folder / "state/model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("part", "source", "words"),
    [
        ("projector", "nan.bin", "NaN or infinity in linear_2.bias"),
        ("projector", "inf.bin", "NaN or infinity in linear_2.bias"),
        ("projector", "nan.safetensors", "NaN or infinity in linear_2.bias"),
        ("projector", "inf.safetensors", "NaN or infinity in linear_2.bias"),
        ("projector", "int8.bin", "quantised weights: linear_1.weight (torch.int8)"),
        ("vision_tower", "tower", "encoder.layers.0.mlp.fc1.bias"),
        ("language_model", "llama", "model.layers.3.mlp.up_proj.weight"),
    ],
)
def test_numbers_nobody_can_train_from_are_named(
    spoilt: Path, tmp_path: Path, part: str, source: str, words: str
) -> None:
    parts = {"vision_tower": "random", "projector": "random", "language_model": "random", part: str(spoilt / source)}
    with pytest.raises(StageRunError) as told:
        _written(tmp_path, weights=parts)
    assert words in str(told.value) and f"model.weights.{part}: {spoilt / source}" in str(told.value)
    assert not (tmp_path / WEIGHTS_FILE).exists()


def test_a_whole_model_and_a_folder_to_start_from_are_looked_at_too(spoilt: Path, tmp_path: Path) -> None:
    with pytest.raises(StageRunError, match=r"model\.model_name_or_path: .* holds NaN or infinity in lm_head.weight"):
        _written(tmp_path, model_name_or_path=str(spoilt / "model"), weights="pretrained")
    for name in ("model", "state"):
        job = StartJob("start", {"model_name_or_path": str(TINY_LLAVA)}, None, None, str(spoilt / name))
        with pytest.raises(StageRunError, match=f"{name}.* holds NaN or infinity in lm_head.weight"):
            write_start_weights(job, None, None, tmp_path)


def test_a_projector_file_runs_no_code(tmp_path: Path) -> None:
    import pickle

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    (tmp_path / "mm_projector.bin").write_bytes(pickle.dumps({"model.mm_projector.0.weight": Hostile()}))
    parts = {"vision_tower": "random", "language_model": "random", "projector": str(tmp_path)}
    with pytest.raises(UsageError, match="no plain weights"):
        _written(tmp_path, weights=parts)
    assert not (tmp_path / "ran").exists()


def test_a_part_left_out_a_missing_folder_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="projector, language_model is not named"):
        _written(tmp_path, weights={"vision_tower": "random"})
    with pytest.raises(UsageError, match="there is no /no/such/model"):
        _written(tmp_path, model_name_or_path="/no/such/model")
    with pytest.raises(StorageError, match="are missing"):
        build_model(ModelSpec(model_name_or_path=str(TINY_LLAVA)), tmp_path / "none.safetensors")


def test_a_file_of_another_model_is_refused_with_its_names(tmp_path: Path) -> None:
    save_weights({"lm_head.weight": torch.zeros(3, 3), "extra": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(StageRunError) as told:
        build_model(ModelSpec(model_name_or_path=str(TINY_LLAVA)), tmp_path / "x.safetensors")
    assert "not in the model: extra" in str(told.value) and "lm_head.weight [3, 3] instead of" in str(told.value)


def test_auto_dtype_is_the_configs(tmp_path: Path) -> None:
    assert compute_dtype(ModelSpec(model_name_or_path=str(TINY_LLAVA))) == "float32"
    shutil.copytree(TINY_LLAVA, tmp_path / "m")
    config = json.loads((TINY_LLAVA / "config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert compute_dtype(ModelSpec(model_name_or_path=str(tmp_path / "m"))) == "bfloat16"


@pytest.fixture(scope="module")
def two_towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny Video-LLaVA, whose images and videos have a tower each."""
    folder = tmp_path_factory.mktemp("two_towers")
    config = json.loads((TINY_LLAVA / "config.json").read_text())
    video = VideoLlavaConfig(vision_config=config["vision_config"], text_config=config["text_config"])
    torch.manual_seed(3)
    VideoLlavaForConditionalGeneration(video).save_pretrained(folder)
    return folder


def test_both_towers_of_a_model_come_out_of_a_complete_one(two_towers: Path, tmp_path: Path) -> None:
    parts = {"vision_tower": str(two_towers), "language_model": "random", "projector": "random"}
    written = _written(tmp_path, model_name_or_path=str(two_towers), weights=parts)
    saved = {name.removeprefix("model."): each for name, each in load_file(two_towers / "model.safetensors").items()}
    for tower in ("image_tower.", "video_tower."):
        names = [name for name in written if f".{tower}" in name]
        assert len(names) > 10 and all(torch.equal(written[name], saved[name.removeprefix("model.")]) for name in names)
    (head,) = (each for name, each in saved.items() if name.endswith("lm_head.weight"))
    assert not torch.equal(written["lm_head.weight"], head), "the language model is random"


def test_one_tower_for_a_model_with_two_is_refused(two_towers: Path, sources: Path, tmp_path: Path) -> None:
    parts = {"vision_tower": str(sources / "tower"), "language_model": "random", "projector": "random"}
    with pytest.raises(UsageError, match=r"several modules there \(model.video_tower, model.image_tower\)"):
        _written(tmp_path, model_name_or_path=str(two_towers), weights=parts)

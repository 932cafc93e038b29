"""export: a trained cell as a Hugging Face folder that plain transformers and `load_exported` read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from repository import ROOT, TINY_LLAVA
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from orchestrator.compression import attach, attachment_of
from orchestrator.data.records.image_files import pad_to_square
from orchestrator.data.rows import open_data_set
from orchestrator.errors import DamagedStateError, UsageError
from orchestrator.evaluation.evaluate import load_model
from orchestrator.models.build import model_from_config
from orchestrator.models.compressor_weights import load_learned
from orchestrator.models.export import export_cell, load_exported
from orchestrator.models.initial_weights import write_initial_weights
from orchestrator.models.shrink import copy_processor_files
from orchestrator.plan.experiment_plan import prepare
from orchestrator.plan.ledger import Ledger
from orchestrator.spec.model import ModelSpec

MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is it?"}]}]
PLUGIN = """
from orchestrator import plugin

class FirstTokensSpec(plugin.CompressorSpec):
    kind: str = "first_tokens"
    implementation = f"{__name__}:FirstTokens"

class FirstTokens:
    def __init__(self, spec):
        self.spec = spec

    def compress(self, visual_BND, grid, context):
        kept = self.spec.kept_tokens(grid)
        return plugin.take(visual_BND, plugin.evenly_spaced(kept, kept).expand(len(visual_BND), -1), context)
"""
EXPERIMENT = """
schema_version: 1
name: mine
plugins: [first_tokens.py]
model: {model_name_or_path: base, weights: pretrained, dtype: float32}
data:
  mine:
    {kind: llava_json, data_path: mine.json, image_folder: ., conversation_template: vicuna_v1, image_aspect_ratio: pad,
     on_bad_row: drop, max_bad_share: 0.5}
compressors:
  learned: [{kind: laco, layer: tower:0%, stride: 4}, {kind: q_former, layer: 1, keep_tokens: 8, heads: 2}]
  wide: {kind: average_pool, layer: 2, stride: 4}
  first: {kind: first_tokens, layer: 1, keep_tokens: 8}
  clusters: {kind: divt, layer: 1, keep_ratio: 1/2}
  merged: {kind: tome, layer: tower:0, keep_ratio: 1/2, inside_layer: true}
  groups: [{kind: token_grouping, layer: projector, keep_tokens: 8}, {kind: isolator}]
  deep:
    - {kind: late_injection, layer: 1}
    - {kind: pyramid_drop, layer: 2, keep_tokens: 8}
    - {kind: early_exit, layer: 3}
  keys: {kind: fastv, layer: 1, keep_ratio: 1/2, keys_only: true}
  fast: [{kind: divprune, layer: projector, keep_ratio: 1/4}, {kind: isolator}]
schedules:
  up: {kind: stages, stages: [{share: 1/2}, {compressor: wide}]}
  passes: {kind: sandwich, heaviest: clusters, compressors: [groups], final: clusters}
  annealed: {kind: stages, stages: [{compressor: keys, anneal: {key: keep_ratio, start: 1, end: 1/4, moves: 2}}]}
  dual:
    kind: interleaved
    compressor: fast
    full_share: 1/2
    final: fast
    distill: {teacher: fast, weight: 1.0, added: true}
phases:
  finetune:
    data: mine
    train: [projector, language_model, compressor]
    lora: {r: 4, alpha: 8}
    schedule: full
    max_steps: 2
    global_batch_size: 4
    per_device_train_batch_size: 4
    learning_rate: 1.0e-2
    model_max_length: 256
    deepspeed: zero0
evaluate:
  vqa: {kind: exact_match, data: mine, max_new_tokens: 4}
cluster: {storage_path: runs}
matrix:
  phases.finetune.schedule: [up, learned, first, passes, groups, merged, deep, keys, annealed, dual]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with conversations, pictures, a pretrained model, and both cells trained on them with LoRA."""
    folder = tmp_path_factory.mktemp("home")
    records = []
    for number, colour in enumerate(("red", "green", "blue", "red")):
        Image.new("RGB", (40 + 9 * number, 60), colour).save(folder / f"{number}.png")
        said = [{"from": "human", "value": "<image>\nWhat color is it?"}, {"from": "gpt", "value": colour}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    records.append({"id": "4", "image": "lost.png", "conversations": said})
    (folder / "mine.json").write_text(json.dumps(records))
    spec = ModelSpec(model_name_or_path=str(TINY_LLAVA), weights="random")
    torch.manual_seed(0)
    (folder / "base").mkdir()
    copy_processor_files(spec, folder / "base")
    model_from_config(spec).save_pretrained(folder / "base")
    (folder / "mine.yaml").write_text(EXPERIMENT.replace("first_tokens.py", str(folder / "first_tokens.py")))
    (folder / "first_tokens.py").write_text(PLUGIN)
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "run", "mine.yaml", "--local"],
        cwd=folder, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def exported(home: Path, schedule: str, target: Path, **options) -> Path:
    walk = prepare(home / "mine.yaml")
    return export_cell(walk, walk.find(f"schedule={schedule}"), target, **options)


def question(processor, home: Path):
    content = [{"type": "image", "image": Image.open(home / "1.png")}, *MESSAGES[0]["content"][1:]]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip


def trained(home: Path, schedule: str, points=None):
    """The cell's model as training and evaluation build it, under `final` or other points."""
    walk = prepare(home / "mine.yaml")
    cell = walk.find(f"schedule={schedule}")
    weights = walk.ledger.state_folder(cell.state) / "weights" / "model.safetensors"
    model = load_model(cell.evaluations[0], weights, torch.device("cpu")).eval()
    attach(model, list(cell.phases[-1].schedule.final.points) if points is None else points)
    load_learned(model, weights)
    return model


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits.nan_to_num(nan=7.0)  # NaN where a token was dropped


@pytest.mark.parametrize("schedule", ["up", "learned"])
def test_plain_transformers_loads_every_weight_and_is_the_model_on_full_tokens(home, tmp_path, schedule):
    folder = exported(home, schedule, tmp_path / "out")
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    inputs = question(AutoProcessor.from_pretrained(folder), home)
    assert torch.equal(logits(model, inputs), logits(trained(home, schedule, []), inputs))
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    assert {"README.md", "config.json", "generation_config.json", "llavolta.json", "model.safetensors"} <= {
        file.name for file in folder.iterdir()
    }


@pytest.mark.parametrize(
    "schedule", ["up", "learned", "passes", "groups", "merged", "deep", "keys", "annealed", "dual"]
)
def test_load_exported_gives_the_logits_of_training_under_final(home, tmp_path, schedule):
    folder = exported(home, schedule, tmp_path / "out")
    model, processor = load_exported(folder)
    inputs = question(processor, home)
    here, there = logits(model, inputs), logits(trained(home, schedule), inputs)
    assert torch.allclose(here, there, atol=1e-6, rtol=0)
    full = logits(trained(home, schedule, []), inputs)
    assert not torch.allclose(here, full, atol=1e-3)  # the compressor acts
    attachment_of(model).switch([])
    assert torch.allclose(logits(model, inputs), full, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "schedule", ["up", "learned", "passes", "groups", "merged", "deep", "keys", "annealed", "dual"]
)
def test_load_exported_answers_as_the_cell_was_evaluated(home, tmp_path, schedule):
    model, processor = load_exported(exported(home, schedule, tmp_path / "out"))
    walk = prepare(home / "mine.yaml")
    (job,) = walk.find(f"schedule={schedule}").evaluations
    answers = [one["answer"] for one in walk.ledger.predictions(job.id)]
    mean = tuple(int(255 * value) for value in processor.image_processor.image_mean)
    found = []
    for number in range(4):
        picture = pad_to_square(Image.open(home / f"{number}.png").convert("RGB"), mean)
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image", "image": picture}, *MESSAGES[0]["content"][1:]]}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        new = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, suppress_tokens=[processor.image_token_id],
            eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id,
        )  # fmt: skip
        new = new[0, inputs["input_ids"].shape[1] :]
        found.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    assert found == answers[:4] and any(answers)


@pytest.mark.slow
def test_a_cell_trained_on_videos_answers_about_frames_as_it_was_evaluated(llavolta, tmp_path):
    """The frames are taken as the folder says."""
    spec = ROOT / "experiments" / "moving_shapes.yaml"
    settings = [
        "phases.finetune.max_steps=60", "phases.finetune.schedule=changed", "evaluate.vqa.under=final",
        "data.train.num_clips=400", "data.test.num_clips=8", f"cluster.storage_path={tmp_path / 'runs'}",
    ]  # fmt: skip
    few = [word for setting in settings for word in ("--set", setting)]
    assert (done := llavolta("run", spec, "--local", *few)).returncode == 0, done.stderr
    done = llavolta("export", spec, "out", "--cell", "moving-shapes", "--json", *few)
    assert done.returncode == 0, done.stderr
    model, processor = load_exported(tmp_path / "out")
    note = json.loads((tmp_path / "out" / "llavolta.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert note["video"] == {"num_frames": 4, "fps": None} and "linspace(0, n - 1, 4, dtype=int)" in card
    walk = prepare(spec, settings)
    (job,) = walk.cells[0].evaluations
    found = []
    for row in open_data_set(walk.cells[0].spec.data["test"]).rows():
        with av.open(row.images[0].path) as file:
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        taken = [frames[number] for number in np.linspace(0, len(frames) - 1, 4, dtype=int)]
        said = [{"type": "video"}, {"type": "text", "text": row.turns[0].text.removeprefix("<video>\n")}]
        text = processor.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True)
        inputs = processor(
            text=text, videos=[torch.tensor(np.stack(taken)).permute(0, 3, 1, 2)], add_special_tokens=False,
            videos_kwargs={"do_sample_frames": False}, return_tensors="pt",
        )  # fmt: skip
        new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        found.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    answers = [one["answer"] for one in walk.ledger.predictions(job.id)]
    assert found == answers and any(answers)


def test_the_note_holds_what_the_cell_is_and_came_to(home, tmp_path):
    walk = prepare(home / "mine.yaml")
    cell = walk.find("schedule=learned")
    folder = export_cell(walk, cell, tmp_path / "out")
    note = json.loads((folder / "llavolta.json").read_text())
    assert note["cell"] == {"id": cell.id, "name": cell.name, "axes": {"phases.finetune.schedule": "learned"}}
    assert note["points"] == [dict(point) for point in cell.phases[-1].schedule.final.points]
    summary = walk.record(cell).summary
    assert note["scores"] == {"eval/vqa/accuracy": summary["eval/vqa/accuracy"]}
    assert note["cost"]["cost/train_tflops"] == summary["cost/train_tflops"]
    assert note["experiment_spec_sha"] == walk.record(cell).tags["experiment_spec_sha"]
    assert "transformers" in note["trained_with"]["versions"] and note["written_with"]["torch"] == torch.__version__
    assert load_file(folder / note["compressor_weights"])
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and cell.id in card and "eval/vqa/accuracy" in card
    assert "| 0 to 2 | learned |" in card and "load_exported(FOLDER)" in card
    assert "LoRA (r 4, alpha 8, dropout 0.05) on `q_proj`" in card
    assert "1 of 5 rows dropped; row 4: " in card
    assert "tokenize=True, return_dict=True" in card and "padded to a square" in card


def test_the_card_names_the_plugin_of_the_compressor(home, tmp_path):
    folder = exported(home, "first", tmp_path / "out")
    assert 'load_exported(FOLDER, plugins=["first_tokens.py"])' in (folder / "README.md").read_text()


def test_whoever_may_read_the_card_may_read_the_weights(home, tmp_path):
    folder = exported(home, "learned", tmp_path / "out")
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_the_chat_template_is_the_one_of_training(home, tmp_path):
    processor = AutoProcessor.from_pretrained(exported(home, "up", tmp_path / "out"))
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert text.startswith("A chat between a curious user") and text.endswith(
        "USER: <image>\nWhat color is it? ASSISTANT:"
    )


@pytest.mark.parametrize("schedule", ["up", "learned"])
def test_an_adapter_on_its_base_is_the_merged_model(home, tmp_path, schedule):
    from peft import PeftModel

    folder = exported(home, schedule, tmp_path / "adapter", adapter=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(home / "base") and config["r"] == 4
    assert config["modules_to_save"] == ["model.multi_modal_projector"]
    assert not (folder / "model.safetensors").exists()
    base = AutoModelForImageTextToText.from_pretrained(home / "base", dtype=torch.float32)
    inputs = question(AutoProcessor.from_pretrained(folder), home)
    before = logits(base, inputs)
    plain = logits(PeftModel.from_pretrained(base, folder).eval(), inputs)
    merged = logits(trained(home, schedule, []), inputs)
    assert torch.allclose(plain, merged, atol=2e-5, rtol=0)
    assert not torch.allclose(before, merged, atol=1e-2)  # training changed something
    native = AutoModelForImageTextToText.from_pretrained(folder)  # transformers finds the base by itself
    assert torch.allclose(logits(native, inputs), merged, atol=2e-5, rtol=0)
    model, _ = load_exported(folder)
    assert isinstance(model, PeftModel)
    assert torch.allclose(logits(model, inputs), logits(trained(home, schedule), inputs), atol=2e-5, rtol=0)


def test_an_existing_folder_is_refused_and_left_as_it_is(home, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        exported(home, "up", tmp_path / "out")
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "notes.txt"]
    (tmp_path / "empty").mkdir()
    assert (exported(home, "up", tmp_path / "empty") / "config.json").is_file()


def test_weights_that_are_not_there_are_told_apart(home, tmp_path, built_in_only):
    copy = tmp_path / "home"
    shutil.copytree(home, copy, symlinks=True)
    walk = prepare(copy / "mine.yaml")
    up, learned = walk.find("schedule=up"), walk.find("schedule=learned")
    walk.ledger.store.drop(up.state, "weights")  # what `cluster.keep: {leaf: none}` and gc do
    with pytest.raises(UsageError, match=r"were not kept .*leaf: weights"):
        export_cell(prepare(copy / "mine.yaml"), up, tmp_path / "out")
    file = walk.ledger.state_folder(learned.state) / "weights" / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(DamagedStateError):
        export_cell(prepare(copy / "mine.yaml"), learned, tmp_path / "out")
    other = prepare(copy / "mine.yaml", ["seed=5"])
    with pytest.raises(UsageError, match=rf"is not trained yet \(it is new in the storage {other.ledger.url}\)"):
        export_cell(other, other.find("schedule=up"), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def as_it_comes(folder: Path, storage: str, **model) -> Path:
    """An experiment without phases: the model as it comes, its root written."""
    settings = {"model_name_or_path": str(TINY_LLAVA), "weights": "random", "dtype": "float32", **model}
    text = {
        "schema_version": 1, "name": "plain", "model": settings, "phases": {}, "cluster": {"storage_path": storage},
        "data": {"test": {"kind": "easy_vqa", "split": "test", "max_samples": 4}},
        "evaluate": {"vqa": {"kind": "exact_match", "data": "test"}},
    }  # fmt: skip
    (folder / "plain.yaml").write_text(json.dumps(text))
    cell = prepare(folder / "plain.yaml").cells[0]
    ledger = Ledger(storage)
    ledger.begin(cell.root.id)
    write_initial_weights(cell.root, ledger.writing_folder(cell.root.id))
    ledger.commit(cell.root.id)
    return folder / "plain.yaml"


def test_weights_have_the_dtype_of_the_experiment_and_no_lora_gives_no_adapter(tmp_path):
    walk = prepare(as_it_comes(tmp_path, str(tmp_path / "runs"), dtype="bfloat16"))
    folder = export_cell(walk, walk.cells[0], tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert next(load_exported(folder)[0].parameters()).dtype == torch.bfloat16
    assert json.loads((folder / "llavolta.json").read_text())["points"] == []
    own = (TINY_LLAVA / "chat_template.jinja").read_text()
    assert (folder / "chat_template.jinja").read_text() == own  # nothing was trained: the model's own stays
    with pytest.raises(UsageError, match="trained no LoRA"):
        export_cell(walk, walk.cells[0], tmp_path / "adapter", adapter=True)


def test_weights_in_a_bucket_are_downloaded(tmp_path, bucket, monkeypatch):
    path = as_it_comes(tmp_path, f"{bucket}/runs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another-machine"))
    walk = prepare(path)
    folder = export_cell(walk, walk.cells[0], tmp_path / "out")
    assert AutoModelForImageTextToText.from_pretrained(folder).num_parameters() > 0


def test_a_folder_that_is_none_is_told(tmp_path):
    with pytest.raises(UsageError, match="no folder that `llavolta export` wrote"):
        load_exported(tmp_path)


def test_a_compressor_of_a_plugin_is_named_before_anything_is_loaded(home, tmp_path):
    folder = exported(home, "up", tmp_path / "out")
    note = json.loads((folder / "llavolta.json").read_text())
    note["points"][0]["kind"], note["plugins"] = "of_mine", ["of_mine.py"]
    (folder / "llavolta.json").write_text(json.dumps(note))
    with pytest.raises(UsageError, match=r"of_mine.*of_mine\.py.*plugins="):
        load_exported(folder)


def test_a_plugin_that_is_not_there_is_named_with_the_folder_it_was_looked_for_in(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=rf"of_mine\.py is not a file; of_mine\.py is relative to {tmp_path}$"):
        load_exported(exported(home, "up", tmp_path / "out"), plugins=["of_mine.py"])


@pytest.mark.slow
def test_the_verb_prints_the_folder_and_refuses_one_that_is_there(home, tmp_path):
    def llavolta(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "orchestrator", "export", str(home / "mine.yaml"), *map(str, arguments)]
        return subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=120, check=False)

    target = tmp_path / "out"
    done = llavolta(target, "--cell", "schedule=up", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == str(target) and (target / "model.safetensors").is_file()
    done = llavolta(target, "--cell", "schedule=up")
    assert done.returncode == 2 and "exists already" in done.stderr
    done = llavolta(tmp_path / "other", "--cell", "schedule=down")
    assert done.returncode == 2 and "cell schedule=down fits no cell" in done.stderr

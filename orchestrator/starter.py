"""init(): a commented experiment to start from, valid as it stands."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from orchestrator.errors import SpecError, UsageError
from orchestrator.experiment import Experiment, load

MODEL = "llava-hf/llava-1.5-7b-hf"
_WEIGHT_FILES = ("*.safetensors", "*.bin")
_TEMPLATE = """\
# Which schedule of visual-token compression keeps what full tokens learn, and what does it save?
#
#   llavolta validate {file}       every error at once, before anything starts
#   llavolta plan {file}           the cells, what they share, what they cost
#   llavolta run {file} --smoke    all of it made small: does it work here?
#   llavolta run {file}            runs what is missing, ends with the table
#
# `llavolta schema` describes every key; `llavolta compressors` lists the methods.
schema_version: 1
name: {name}
seed: 0

model:
  model_name_or_path: {model}    # a folder or a hub id: any image-text-to-text model of transformers
  weights: {weights}    # pretrained | random | by part: {{vision_tower: ..., language_model: ..., projector: random}}
  dtype: auto    # compute in the checkpoint's own type; also float32, bfloat16, float16

data:    # named data sets
{data}

compressors:    # named variants: a method, the decoder layer from which it acts, and how much it leaves
  heavy: {{kind: average_pool, layer: 25%, stride: 8}}    # 1 token of 8; `layer` is an integer or a share of the depth
  light: {{kind: average_pool, layer: 50%, stride: 2}}

schedules:    # how training is divided into stages; `full` and each variant's name are schedules already
  staged:
    kind: stages
    stages:
      - {{share: 1/3, compressor: heavy}}
      - {{share: 1/3, compressor: light}}
      - {{}}    # the rest, on full tokens

phases:
  finetune:    # `pretrain` (the projector alone) may stand before it
    data: train
    train: [projector, language_model]    # also vision_tower; `lora: {{r: 128, alpha: 256}}` trains less
    max_steps: 300    # optimizer steps; or num_train_epochs: 1
    global_batch_size: 128    # the scientific quantity; micro-batch and accumulation follow from it
    per_device_train_batch_size: auto    # the largest that fits, found for each stage
    learning_rate: {rate}
    warmup_ratio: 0.03
    model_max_length: 2048    # tokens of a sample, counted before compression
    gradient_checkpointing: true
    deepspeed: zero2    # zero0 to zero3, zero2_offload, zero3_offload, or a file

evaluate:    # named evaluations, `under` what the last stage trained with (final) and on full tokens
  answers: {{kind: exact_match, data: test, under: [final, full]}}

matrix:    # the grid: any dotted path; a second seed doubles it
  phases.finetune.schedule: [full, heavy, staged]
  seed: [0]

report: {{baseline: {{phases.finetune.schedule: full}}, mean_over: [seed]}}
"""
_EASY_VQA = """\
  train: {kind: easy_vqa, split: train}    # 38,575 questions on simple pictures, in a PyPI package
  test: {kind: easy_vqa, split: test, max_samples: 2000}"""
_LLAVA_JSON = """\
  train: &records
    kind: llava_json    # records of `image` and `conversations`
    data_path: {path}
    image_folder: null    # null: the folder of data_path
    on_bad_row: fail    # or drop, up to max_bad_share
  test: {{<<: *records, max_samples: 500}}    # put a file here that is not trained on"""


def init(file: str | os.PathLike[str], *, model: str = MODEL, data: str = "easy_vqa") -> Experiment:
    """Write a commented experiment to start from, valid as it stands, and load it.

    Args:
        file: YAML file to write; it must not exist.
        model: A folder or a hub id.
        data: A LLaVA JSON file, or `easy_vqa`.

    Raises:
        UsageError: the file exists or is no `.yaml`, or there is no such data file.
        SpecError: the model cannot be trained so; nothing is left written.
    """
    file = Path(file)
    if file.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{file}: name a .yaml file")
    if data != "easy_vqa" and not Path(data).is_file():
        raise UsageError(f"data {data}: there is no such file; name a LLaVA JSON file, or easy_vqa")
    folder = Path(model).expanduser()
    pretrained = not folder.is_dir() or any(found for form in _WEIGHT_FILES for found in folder.glob(form))
    text = _TEMPLATE.format(
        file=file,
        name=_scalar(file.stem),
        model=_scalar(_seen_from(file, folder) if folder.is_dir() else model),
        weights="pretrained" if pretrained else "random",
        data=_EASY_VQA if data == "easy_vqa" else _LLAVA_JSON.format(path=_scalar(_seen_from(file, Path(data)))),
        rate="2.0e-5" if pretrained else "1.0e-3",
    )
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UsageError(f"{file} exists; init overwrites nothing, so name another file") from None
    try:
        return load(file)
    except SpecError:
        file.unlink()
        raise


def _seen_from(file: Path, target: Path) -> str:
    """Return a path relative to the file's folder where it lies in it, else absolute."""
    path = os.path.relpath(target, file.parent)
    return str(target.absolute()) if path.startswith("..") else path


def _scalar(text: str) -> str:
    written: str = yaml.safe_dump(text, width=10**9, allow_unicode=True)
    return written.removesuffix("\n").removesuffix("\n...")

"""Names and values that users bring from other programs: read as aliases, or explained, never misled."""

# ruff: noqa: E501 (a table is read by its columns)

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import registry
from orchestrator.errors import ErrorDetail, SpecError
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.loader import load_experiment
from orchestrator.spec.phase import LoraSpec, PhaseSpec
from orchestrator.spec.yaml.key_hints import _VALUES, hint_for_key, meaning_of

KNOWN = tuple(PhaseSpec.model_fields)
# What LLaVA's own train.py takes beside transformers' arguments, and what its scripts and siblings pass most.
LLAVA = [
    "version",
    "freeze_backbone",
    "tune_mm_mlp_adapter",
    "vision_tower",
    "mm_vision_select_layer",
    "pretrain_mm_mlp_adapter",
    "mm_projector_type",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
    "mm_patch_merge_type",
    "mm_vision_select_feature",
    "data_path",
    "lazy_preprocess",
    "is_multimodal",
    "image_folder",
    "image_aspect_ratio",
    "cache_dir",
    "optim",
    "remove_unused_columns",
    "freeze_mm_mlp_adapter",
    "mpt_attn_impl",
    "double_quant",
    "quant_type",
    "bits",
    "lora_enable",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_weight_path",
    "lora_bias",
    "mm_projector_lr",
    "mm_vision_tower",
]
FACTORY = [
    "stage",
    "finetuning_type",
    "template",
    "cutoff_len",
    "dataset_dir",
    "dataset",
    "overwrite_cache",
    "preprocessing_num_workers",
    "lora_target",
    "lora_rank",
    "freeze_vision_tower",
    "freeze_multi_modal_projector",
    "freeze_language_model",
    "image_max_pixels",
    "val_size",
    "plot_loss",
    "overwrite_output_dir",
    "quantization_bit",
    "flash_attn",
    "max_samples",
    "mask_history",
    "packing",
    "additional_target",
    "adapter_name_or_path",
    "media_dir",
    "mix_strategy",
    "interleave_probs",
]
AXOLOTL = [
    "base_model",
    "datasets",
    "sequence_len",
    "micro_batch_size",
    "val_set_size",
    "flash_attention",
    "sample_packing",
    "wandb_project",
    "wandb_entity",
    "wandb_name",
    "adapter",
    "lora_target_linear",
    "load_in_8bit",
    "load_in_4bit",
    "saves_per_epoch",
    "evals_per_epoch",
    "special_tokens",
    "chat_template",
    "train_on_inputs",
    "num_epochs",
    "lora_modules_to_save",
    "mlflow_experiment_name",
    "pad_to_sequence_len",
    "gradient_checkpointing_kwargs",
    "optimizer",
    "lr_scheduler",
    "tokenizer_type",
    "model_type",
]
SWIFT = [
    "train_type",
    "sft_type",
    "tuner_type",
    "freeze_vit",
    "freeze_llm",
    "freeze_aligner",
    "max_length",
    "vit_lr",
    "aligner_lr",
    "lora_rank",
    "target_modules",
    "attn_impl",
    "torch_dtype",
    "split_dataset_ratio",
    "system",
    "lazy_tokenize",
    "max_pixels",
    "loss_scale",
    "dataset_num_proc",
    "truncation_strategy",
    "val_dataset",
    "model",
]
DEEPSPEED = [
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "fp16",
    "bf16",
    "optimizer",
    "scheduler",
    "steps_per_print",
]
LISTS = {"llava": LLAVA, "llama_factory": FACTORY, "axolotl": AXOLOTL, "swift": SWIFT, "deepspeed": DEEPSPEED}


def answered(name: str, spec: type = PhaseSpec) -> bool:
    """Whether a name is a key or an alias of a block, or gets its meaning, or the block it belongs to."""
    if name in spec.model_fields or name in spec.aliases:
        return True
    hint = hint_for_key(name, tuple(spec.model_fields), "phases.finetune")
    assert hint is None or "did you mean" not in hint, f"{name}: {hint}"
    return hint is not None


def test_every_argument_of_transformers_has_an_answer() -> None:
    from transformers import TrainingArguments

    names = [field.name for field in dataclasses.fields(TrainingArguments)]
    assert len(names) > 90
    assert [name for name in names if not answered(name)] == []


def test_every_argument_of_peft_has_an_answer() -> None:
    from peft import LoraConfig

    names = [field.name for field in dataclasses.fields(LoraConfig)]
    assert len(names) > 20
    assert [name for name in names if not answered(name, LoraSpec)] == []
    assert [name for name in names if not answered(name)] == []


@pytest.mark.parametrize("source", LISTS)
def test_every_name_of_a_framework_has_an_answer(source: str) -> None:
    assert [name for name in LISTS[source] if not answered(name) and name not in ("mpt_attn_impl", "cache_dir")] == []


@pytest.mark.parametrize("name", [name for names in LISTS.values() for name in names])
def test_no_name_is_misled_at_the_top_of_the_file(name: str) -> None:
    """Flat files of other programs: the answer is by meaning, or there is none."""
    if name not in ExperimentSpec.model_fields:
        assert "did you mean" not in (hint_for_key(name, tuple(ExperimentSpec.model_fields)) or "")


# (key in the phase, part of its hint)
MEANT = [
    ("warmup_steps: 100", "warmup_ratio: a share of the phase, warm-up steps / all steps"),
    ("gradient_accumulation_steps: 4", "global_batch_size / (per_device_train_batch_size x cluster.num_workers)"),
    ("mm_projector_lr: 2e-5", "learning_rate: {projector: ..."),
    ("bf16: true", "model.dtype: bfloat16"),
    ("fp16: true", "model.dtype: float16"),
    ("report_to: wandb", "tracking: {"),
    ("lora_r: 8", "lora: {r: ...}"),
    ("lora_alpha: 16", "lora: {alpha: ...}"),
    ("save_steps: 500", "cluster.checkpoint_every"),
    ("output_dir: out", "cluster.storage_path"),
    ("logging_steps: 1", "every optimizer step is logged"),
    ("tune_mm_mlp_adapter: true", "train: the parts that train"),
    ("image_aspect_ratio: pad", "data.NAME.image_aspect_ratio"),
    ("version: v1", "conversation_template"),
    ("optim: adamw_torch", "the optimizer is AdamW"),
    ("run_name: x", "name for the experiment"),
    ("hub_token: x", "uploads nothing"),
    ("load_in_4bit: true", "not quantized"),
    ("sample_packing: true", "never packed"),
    ("--logging-dir: x", "cluster.storage_path"),
    ("num_workers: 2", "cluster.num_workers"),
    ("checkpoint_every: 2", "cluster.checkpoint_every"),
    ("tracking_uri: x", "tracking.tracking_uri"),
    ("stride: 2", "compressors.NAME.stride"),
    ("cell_name: x", "`cell_name` at the top of the file"),
    ("lerning_rate: 1", "did you mean learning_rate?"),
    ("Max-Grad-Norm: 1", "did you mean max_grad_norm?"),
    ("global_batch: 16", "did you mean global_batch_size?"),
]


@pytest.mark.parametrize("case", MEANT, ids=lambda case: case[0].partition(":")[0])
def test_a_key_of_another_program_is_reported_by_meaning(case: tuple, small: str, write: Callable[..., Path]) -> None:
    key, hint = case
    errors = errors_of(write(small.replace("    data: train\n", f"    data: train\n    {key}\n")))
    assert len(errors) == 1, "\n".join(map(str, errors))
    assert hint in (errors[0].hint or ""), errors[0]


@pytest.mark.parametrize("key", ["trainer_style: x", "maximum_temperature: 3", "ful: 1", "k2_s16: 3", "xx: 1"])
def test_a_key_that_nothing_is_like_gets_no_hint(key: str, small: str, write: Callable[..., Path]) -> None:
    errors = errors_of(write(small.replace("    data: train\n", f"    data: train\n    {key}\n")))
    assert [error.hint for error in errors] == [None]


def test_meanings_hold_for_set_and_axes_too(small: str, write: Callable[..., Path]) -> None:
    found = errors_of(write(small + "matrix: {phases.finetune.warmup_steps: [1, 2]}\n"), "model.bf16=true")
    assert "warmup_ratio" in str(found[1].hint)
    assert "dtype" in str(found[0].hint)


def test_names_of_lora_are_read_as_ours(small: str, write: Callable[..., Path]) -> None:
    lora = "    lora: {lora_r: 8, lora_alpha: 16, lora_dropout: 0.1}\n"
    loaded = load_experiment(write(small.replace("    data: train\n", f"    data: train\n{lora}")))
    assert loaded.cells[0].spec.phases.finetune.lora == LoraSpec(r=8, alpha=16, dropout=0.1)
    assert sum("is read as" in notice for notice in loaded.notices) == 3


@pytest.mark.parametrize("pair", [("k2_s4", "k2_s8"), ("zero2", "zero3"), ("warmup_steps", "max_steps"),
                                  ("report_to", "report"), ("a", "b"), ("light", "right")])  # fmt: skip
def test_other_things_are_not_other_spellings(pair: tuple[str, str]) -> None:
    name, known = pair
    if pair == ("light", "right"):
        assert registry.nearest(name, (known,)) == known  # one letter: spelling alone cannot tell
    else:
        assert registry.nearest(name, (known,)) is None


# (what is replaced, by what, the hint)
REWRITTEN = [
    ("1e-3", '"2e-5"', "write 2e-5 without quotes"),
    ("1e-3", "'0.001'", "write 0.001 without quotes"),
    ("1e-3", "2,5", "write 2.5, with a decimal point"),
    ("1e-3", "5%", "write 0.05, as a decimal"),
    ("1e-3", "1/4", "write 0.25, as a decimal"),
    ("1e-3", "2 x 10^-5", "write 2e-05, as a decimal"),
    ("1e-3", "None", "write null, or leave the key out"),
    ("max_steps: 100", 'max_steps: "100"', "write 100 without quotes"),
    ("max_steps: 100", "max_steps: 2,000", "write 2000, without separators"),
    ("max_steps: 100", "max_steps: 2 000", "write 2000, without separators"),
    ("max_steps: 100", "max_steps: 10k", "write 10000, in full"),
    ("max_steps: 100", "max_steps: 1e3", "write 1000"),
    ("max_steps: 100", "max_steps: 100.0", "write 100"),
    ("max_steps: 100", "max_steps: [100, 200]", "matrix: {phases.finetune.max_steps: [100, 200]}"),
    ("name: small", "name: 5", 'put it in quotes: "5"'),
    ("name: small", "name: small\nseed: '0'", "write 0 without quotes"),
    ("stride: 8", "stride: '8'", "write 8 without quotes"),
    ("learning_rate: 1e-3", "gradient_checkpointing: yes", "write true"),
    ("learning_rate: 1e-3", "gradient_checkpointing: 'False'", "write false"),
    ("learning_rate: 1e-3", "gradient_checkpointing: 1", "write true"),
    ("learning_rate: 1e-3", "gradient_checkpointing: off", "write false"),
    ("learning_rate: 1e-3", "lora: None", "write null, or leave the key out"),
    ("learning_rate: 1e-3", "train: projector", "write [projector]"),
    ("learning_rate: 1e-3", "train: projector, language_model", "write [projector, language_model]"),
    ("learning_rate: 1e-3", "train: [llm]", "did you mean language_model?"),
    ("learning_rate: 1e-3", "learning_rate: {mm_projector: 1e-3}", "did you mean projector?"),
    ("learning_rate: 1e-3", "per_device_train_batch_size: '16'", "write 16 without quotes"),
    ("learning_rate: 1e-3", "lr_scheduler_type: constant_with_warmup", "did you mean constant?"),
    ("learning_rate: 1e-3", "deepspeed: stage2", "did you mean zero2?"),
    ("weights: random", "dtype: bf16", "did you mean bfloat16?"),
    ("weights: random", "dtype: torch.float16", "did you mean float16?"),
    ("weights: random", "attn_implementation: fa2", "did you mean flash_attention_2?"),
    ("kind: average_pool", "kind: avgpool", "did you mean average_pool?"),
    ("kind: easy_vqa, split: train", "kind: llava, split: train", "did you mean llava_json?"),
    ("max_steps: 100", "max_steps: ten", None),
    ("max_steps: 100", "max_steps: 50%", None),
    ("max_steps: 100", "max_steps: 2.5", None),
]  # fmt: skip


@pytest.mark.parametrize("case", REWRITTEN, ids=[case[1] for case in REWRITTEN])
def test_how_a_value_is_to_be_written(case: tuple, small: str, write: Callable[..., Path]) -> None:
    old, new, hint = case
    errors = errors_of(write(small.replace(old, new, 1)))
    assert len(errors) == 1, "\n".join(map(str, errors))
    assert errors[0].hint == hint or (hint is not None and hint in (errors[0].hint or "")), errors[0]


@pytest.mark.parametrize("key", _VALUES)
def test_values_that_are_meant_exist(key: str) -> None:
    """A hint names what is there: each meaning is a value of its key."""
    text = str(PhaseSpec.model_json_schema()) + str(ExperimentSpec.model_fields["model"].annotation.model_json_schema())
    kinds = [kind for group in (registry.COMPRESSORS, registry.DATA, registry.SCHEDULES, registry.EVALUATIONS)
             for kind in registry.kinds(group)]  # fmt: skip
    elsewhere = ["zero0", "zero1", "zero2", "zero3", "log_uniform", "choice", "vicuna_v1", "chat_template", "plain"]
    for meant in set(_VALUES[key].values()):
        assert f"'{meant}'" in text or meant in kinds or meant in elsewhere, meant


def test_a_place_says_which_phase() -> None:
    assert (
        meaning_of("warmup_steps", "phases.pretrain")
        == "use warmup_ratio: a share of the phase, warm-up steps / all steps"
    )
    assert "phases.pretrain.learning_rate" in str(meaning_of("mm_projector_lr", "phases.pretrain.lora"))
    assert "phases.finetune.learning_rate" in str(meaning_of("mm_projector_lr"))


# (what is replaced, by what, the path of the one error)
CAUSES = [
    ("name: small", "name: small\nextends: nope.yaml", "extends"),
    ("name: small", "name: small\nextends: [nope.yaml]", "extends"),
    ("compressors:", "compresors:", "compresors"),
    ("compressors:", "Compressors:", "Compressors"),
    ("data:\n  train", "dat:\n  train", "dat"),
    ("schedules:", "schedule:", "schedule"),
    ("model: {", "modle: {", "modle"),
    ("evaluate:\n", "matrix: {phases.finetune.shedule: [full, two]}\nreport: {baseline: {phases.finetune.schedule: full}}\nevaluate:\n", "matrix.phases.finetune.shedule"),
    ("kind: stages", "kind: stagess", "schedules.two.kind"),
    ("kind: average_pool, layer: 2, stride: 8", "kind: my_pool, layer: 2, stride: 8", "compressors.heavy.kind"),
    ("evaluate:\n", "plugins: [nope.py]\nevaluate:\n", "plugins.0"),
    ("  vqa: {kind: exact_match, data: test}", "  kind: exact_match\n  data: test", "evaluate.kind"),
    ("data: test}", "data: test}\n  under: [full]", "evaluate.under"),
    ("  heavy: {kind: average_pool, layer: 2, stride: 8}\n", "  kind: average_pool\n  layer: 2\n  stride: 8\n", "compressors.kind"),
    ("  train: {kind: easy_vqa, split: train}\n", "  kind: easy_vqa\n  split: train\n", "data.kind"),
    ("phases:\n  finetune:\n    data: train\n    schedule: two\n    max_steps: 100\n    learning_rate: 1e-3", "phases:\n  data: train\n  max_steps: 100", "phases.data"),
    ("  two:\n    kind: stages\n    stages: [{share: 1/2, compressor: heavy}, {}]", "  kind: stages\n  stages: [{}]", "schedules.kind"),
    ("tiny, weights", "tinny, weights", "model.model_name_or_path"),
]  # fmt: skip


@pytest.mark.parametrize("case", CAUSES, ids=[f"{case[2]}-{number}" for number, case in enumerate(CAUSES)])
def test_a_cause_is_reported_alone(case: tuple, small: str, write: Callable[..., Path]) -> None:
    old, new, path = case
    assert old in small
    text = small.replace(old, new, 1)
    if "nope.py" in new:
        text = text.replace("kind: average_pool", "kind: my_pool")
    assert [error.path for error in errors_of(write(text))] == [path]


def test_a_file_below_that_cannot_be_read_is_reported_alone(write: Callable[..., Path]) -> None:
    write("model: {a: [\n", "base.yaml")
    text = "extends: base.yaml\nname: x\nmatrix: {phases.finetune.schedule: [full, heavy]}\n"
    errors = errors_of(write(text + "report: {baseline: {phases.finetune.schedule: full}}\n"))
    assert len(errors) == 1
    assert str(errors[0].file).endswith("base.yaml")


def test_a_missing_level_names_the_entries_there_are(small: str, write: Callable[..., Path]) -> None:
    write(small, "base.yaml")
    error = errors_of(write("extends: base.yaml\nname: x\nevaluate: {under: [final, full]}\n"))[0]
    assert "the level with the name is missing above `under`" in error.message
    assert error.hint == "write evaluate: {vqa: {under: ...}}"


def test_long_values_are_shortened_everywhere(small: str, write: Callable[..., Path]) -> None:
    long = "x" * 5000
    for text in (
        small.replace("name: small", f"name: {long}"),
        small.replace("name: small", f"{long}: small"),
        small.replace("kind: stages", f"kind: {long}"),
        small.replace("schedule: two", f"schedule: {long}"),
        small.replace("schedule: two", "schedule: nowhere").replace(
            "schedules:\n",
            "schedules:\n" + "".join(f"  long_name_{n}: {{kind: constant, compressor: full}}\n" for n in range(300)),
        ),
        small + f"matrix: {{{long}: [1]}}\n",
        small + f"include: [{{seed: {long}}}]\n",
        small + f'description: 3\nplugins: ["{long}"]\n',
    ):
        for error in errors_of(write(text)):
            assert len(str(error)) < 1800, str(error)
            assert all(len(part) < 700 for part in str(error).splitlines())
    assert "..." in errors_of(write(small), f"model.{long}=3")[0].message


def errors_of(path: Path, *overrides: str) -> tuple[ErrorDetail, ...]:
    with pytest.raises(SpecError) as caught:
        load_experiment(path, overrides)
    return caught.value.errors

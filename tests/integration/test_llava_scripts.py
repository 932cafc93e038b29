"""import-llavolta: a training script becomes the experiment it describes, or is refused with the lines that are why."""

import re

import pytest
import yaml
from repository import TINY_LLAVA

import orchestrator as llv
from orchestrator.errors import SpecError, UsageError
from orchestrator.plan.cells.expand import expand_cells

HEAD = """\
#!/bin/bash
# The form of LLaVolta's scripts: lists in variables, one call a phase.
DATA='/data'
OUT=
LAYERS={layers}
STRIDES={strides}
PIVOTS={pivots} # a comment
NAME=mine
"""
COMMON = """\
    --model_name_or_path lmsys/vicuna-7b-v1.5 \\
    --vision_tower openai/clip-vit-large-patch14-336 \\
    --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False \\
    --bf16 True --num_train_epochs 1 --save_steps 24000 --evaluation_strategy "no" \\
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" \\
    --model_max_length 2048 --gradient_checkpointing True --report_to wandb \\
"""
PRETRAIN = (
    """
deepspeed llava/train/train_mem.py \\
    --deepspeed ./scripts/zero2.json --version plain --tune_mm_mlp_adapter True \\
    --data_path ${DATA}//pretrain/blip_laion_cc_sbu_558k.json --image_folder $DATA/pretrain \\
    --output_dir $OUT/pretrain-$NAME \\
"""
    + COMMON
    + """\
    --per_device_train_batch_size 32 --learning_rate 1e-3 \\
"""
)
FINETUNE = (
    """
deepspeed llava/train/train_mem.py \\
    --deepspeed ./scripts/zero3.json --version v1 --image_aspect_ratio pad --group_by_modality_length True \\
    --data_path $DATA/tuning/llava_v1_5_mix665k.json --image_folder $DATA/tuning \\
    --pretrain_mm_mlp_adapter $OUT/pretrain-$NAME/mm_projector.bin --output_dir $OUT/$NAME \\
"""
    + COMMON
    + """\
    --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --learning_rate 2e-5 \\
"""
)
END = "    # > $OUT/log 2>&1\n"  # what a line continues with may be a comment
LISTS = """\
    --strides $STRIDES --layers $LAYERS --pivots $PIVOTS --grouping avgpool1d --progressive True > $OUT/log 2>&1
"""


def script(folder, *calls, layers="2,2,16,0", strides="8,2,2,1", pivots="1300,2600,3900"):
    file = folder / "train.sh"
    file.write_text(HEAD.format(layers=layers, strides=strides, pivots=pivots) + "".join(calls))
    return file


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def imported(file, **options):
    return llv.import_llavolta([file], "mine.yaml", **options)


def faults(file, **options):
    with pytest.raises(SpecError) as error:
        imported(file, **options)
    return [(fault.line, fault.path, fault.message) for fault in error.value.errors]


def test_a_four_stage_script_is_the_papers_recipe(tmp_path):
    experiment, notes = imported(script(tmp_path, PRETRAIN + END, FINETUNE + LISTS))
    spec = experiment.loaded.spec
    pretrain, finetune = spec.phases.pretrain, spec.phases.finetune
    assert (pretrain.global_batch_size, pretrain.learning_rate, pretrain.train) == (256, 1e-3, ("projector",))
    assert (finetune.global_batch_size, finetune.learning_rate) == (128, 2e-5)
    assert finetune.train == ("projector", "language_model") and finetune.lora is None
    for phase in (pretrain, finetune):
        assert (phase.lr_scheduler_type, phase.warmup_ratio, phase.weight_decay) == ("cosine", 0.03, 0.0)
        assert (phase.model_max_length, phase.gradient_checkpointing, phase.num_train_epochs) == (2048, True, 1)
    assert (pretrain.deepspeed, finetune.deepspeed, spec.model.dtype) == ("zero2", "zero3", "bfloat16")
    assert (pretrain.group_by_modality_length, finetune.group_by_modality_length) == (False, True)
    assert spec.data["finetune"].image_aspect_ratio == "pad" and spec.data["pretrain"].image_aspect_ratio is None
    assert spec.data["pretrain"].data_path == "/data/pretrain/blip_laion_cc_sbu_558k.json"
    (cell,) = expand_cells(experiment.loaded)
    first, second = cell.phases
    assert (first.total_steps, second.total_steps) == (2181, 5198)
    assert not first.table[0].points
    places = [[(point["layer"], point["stride"]) for point in action.points] for action in second.table]
    assert places == [[(2, 8)], [(2, 2)], [(16, 2)], []]
    assert [action.last_step for action in second.table] == [1300, 2600, 3900, 5198]
    assert notes[0] == "the script does not say on how many GPUs it runs: 8 are taken (--gpus)"
    assert notes[1] == "left out: --evaluation_strategy, --report_to, --save_steps"


def test_accumulation_and_launchers_count(tmp_path):
    """Pivots count forward passes, of which accumulation makes several a step."""
    call = FINETUNE.replace("accumulation_steps 1", "accumulation_steps 2").replace(
        "deepspeed llava", "deepspeed --include localhost:0,1,2,3 llava"
    )
    experiment, notes = imported(script(tmp_path, PRETRAIN + END, call + LISTS))
    (cell,) = expand_cells(experiment.loaded)
    assert experiment.loaded.spec.phases.finetune.global_batch_size == 16 * 2 * 4
    assert [action.last_step for action in cell.phases[-1].table] == [650, 1300, 1950, 5198]
    assert not any("GPUs" in note for note in notes)
    odd = script(tmp_path, PRETRAIN + END, call + LISTS, pivots="1301,2600,3900")
    (found,) = faults(odd, drop_unreachable=True)
    assert found[:2] == (7, "--pivots") and "inside a step" in found[2]


def test_a_stage_that_is_never_reached_is_refused_or_left_out(tmp_path):
    """LLaVolta's scripts of one compression throughout name a second stage and a pivot that is `never used`."""
    file = script(tmp_path, PRETRAIN + LISTS, FINETUNE + LISTS, layers="16,0", strides="8,1", pivots="10000")
    assert faults(file) == [
        (7, "--pivots", "10000 is never reached: the phase has 2181 steps"),
        (7, "--pivots", "10000 is never reached: the phase has 5198 steps"),
    ]
    experiment, notes = imported(file, drop_unreachable=True)
    (cell,) = expand_cells(experiment.loaded)
    for phase in cell.phases:
        assert [[(point["layer"], point["stride"]) for point in action.points] for action in phase.table] == [[(16, 8)]]
    assert "finetune: what follows pivot 10000 is never reached and left out" in notes


@pytest.mark.parametrize(
    ("lists", "told"),
    [
        ({"strides": "8,2,1"}, (6, "--strides", "3 strides for 4 layers")),
        ({"pivots": "1300,2600"}, (7, "--pivots", "2 pivots for 4 stages; there is one between two stages")),
        ({"pivots": "1300,1200,3900"}, (7, "--pivots", "each is larger than the one before")),
        ({"strides": "8,1,2,1"}, (6, "--strides", "a stage of stride 1 is never left")),
        ({"strides": "8,x,2,1"}, (6, "--strides", "is no list of whole numbers")),
        ({"strides": "8,0,2,1"}, (6, "--strides", "a stride is at least 1")),
    ],
)
def test_lists_that_the_reference_would_read_otherwise_are_refused(tmp_path, lists, told):
    (found,) = faults(script(tmp_path, PRETRAIN + END, FINETUNE + LISTS, **lists))
    assert found[:2] == told[:2] and told[2] in found[2]


def test_everything_without_a_counterpart_is_told_at_once(tmp_path):
    call = FINETUNE.replace("--version v1", "--version mpt --new_flag 3").replace(
        "-select_layer -2", "-select_layer -1"
    )
    call = call.replace("$NAME/mm_projector", "other/mm_projector").replace("_layer -2", "_layer -1")
    file = script(tmp_path, PRETRAIN + END, "for seed in 1 2; do\n", call, "done\n", "cd $(pwd)\n")
    messages = [message for _, _, message in faults(file)]
    assert all(any(part in message for message in messages) for part in (
        "--new_flag is not known", "there is no such conversation template", "has no counterpart here",
        "the finetuning does not start from what line 10 trains", "`for` is not read", "runs a command",
    )), messages  # fmt: skip
    assert not (tmp_path / "mine.yaml").exists()


def test_the_projectors_output_and_layers_beyond_the_decoder(tmp_path):
    experiment, _ = imported(
        script(tmp_path, PRETRAIN + END, FINETUNE + LISTS, layers="-1,33", strides="4,8", pivots="1300")
    )
    (cell,) = expand_cells(experiment.loaded)
    first, second = cell.phases[-1].table
    (point,) = first.points
    assert (point["layer"], point["stride"], point["positions"]) == (0, 4, "renumber") and not second.points


def test_lora_rates_by_part_and_variables_from_outside(tmp_path):
    call = FINETUNE.replace(
        "--version v1", "--version $1 --lora_enable True --lora_r 8 --lora_alpha 16 --mm_projector_lr 1e-4"
    )
    file = script(tmp_path, PRETRAIN + END, call)
    assert "$1 is not set" in faults(file)[0][2]
    experiment, _ = imported(file, define={"1": "v1", "DATA": "/elsewhere"}, gpus=2)
    finetune = experiment.loaded.spec.phases.finetune
    assert (finetune.lora.r, finetune.lora.alpha, finetune.lora.dropout) == (8, 16, 0.05)
    assert finetune.learning_rate == {"projector": 1e-4, "language_model": 2e-5} and finetune.global_batch_size == 32
    assert experiment.loaded.spec.data["finetune"].data_path.startswith("/elsewhere/")


def test_what_a_script_does_not_say_is_what_the_program_takes(tmp_path):
    """transformers' TrainingArguments and llava/train/train.py: a rate of 5e-5 without decay over three epochs, ..."""
    file = tmp_path / "bare.sh"
    file.write_text(
        "torchrun --nnodes=2 --nproc_per_node=4 llava/train/train.py --model_name_or_path some/lm "
        "--vision_tower some/clip --data_path rows.json --image_folder images --version plain\n"
    )
    experiment, notes = imported(file, model=str(TINY_LLAVA))
    spec = experiment.loaded.spec
    phase = spec.phases.finetune
    assert (phase.learning_rate, phase.lr_scheduler_type, phase.warmup_ratio) == (5e-5, "linear", 0.0)
    assert (phase.num_train_epochs, phase.global_batch_size, phase.model_max_length) == (3, 8 * 8, 512)
    assert (phase.deepspeed, spec.model.dtype, spec.seed) == ("zero0", "float32", 42)
    assert spec.data["finetune"].data_path == str(tmp_path / "rows.json")
    assert len(notes) == 3 and "zero0" in notes[2]
    assert notes[0].startswith("--mm_vision_select_layer -1 is a matter of the config of")


def test_on_the_command_line(llavolta, tmp_path):
    file = script(tmp_path, PRETRAIN + END, FINETUNE + LISTS)
    done = llavolta("import-llavolta", file.name, "-o", "mine.yaml")
    assert done.returncode == 0 and "mine.yaml: 1 cell; next: llavolta plan mine.yaml" in done.stdout
    text = (tmp_path / "mine.yaml").read_text()
    assert re.match(r"# From train\.sh, by `llavolta import-llavolta`\.", text)
    assert yaml.safe_load(text)["schedules"]["finetune_stages"]["stages"][3] == {}
    again = llavolta("import-llavolta", file.name, "-o", "mine.yaml")
    assert again.returncode == 2 and "mine.yaml exists" in again.stderr
    assert llavolta("plan", "mine.yaml", "--text-tokens", "62").returncode == 0
    nothing = tmp_path / "nothing.sh"
    nothing.write_text("echo hello\n")
    with pytest.raises(UsageError, match=r"no call of llava/train/train.py"):
        imported(nothing)
    assert llavolta("import-llavolta", "nothing.sh", "-o", "x.yaml", "--define", "A").returncode == 2
    assert llavolta("import-llavolta", "absent.sh", "-o", "x.yaml").returncode == 2

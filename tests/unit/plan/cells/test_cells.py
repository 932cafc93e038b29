"""What a cell is: every field of every spec either changes its id or does not, as docs/concepts/identity.md says."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator import registry
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.infrastructure import ClusterSpec, KeepSpec, ReportSpec, TrackingSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.phase import LoraSpec, PhaseSpec, PhasesSpec

F = "phases__finetune__"
SEARCH = {"objectives": {"eval/score/accuracy": "max"}, "space": {"seed": {"kind": "choice", "values": [1, 2]}}}
HEAVY = {"kind": "average_pool", "layer": 2, "stride": 8}
STAGES = [{"share": "1/2", "compressor": "heavy"}, {}]
# Class -> field -> (change that must give another id, changes that must not). None: the field has one value only.
FIELDS: dict[type[Any], dict[str, tuple[dict[str, Any] | None, list[dict[str, Any]]]]] = {
    ExperimentSpec: {
        "schema_version": (None, []),
        "name": (None, [{"name": "other"}]),
        "description": (None, [{"description": "words"}]),
        "plugins": (None, [{"plugins": ["/some/other/plugin.py"]}]),
        "seed": ({"seed": 1}, []),
        "model": ({"model__dtype": "bfloat16"}, []),
        "data": ({"data__train__max_samples": 50}, [{"data__unused__max_samples": 9}]),
        "compressors": ({"compressors__heavy__stride": 4}, [{"compressors__unused__stride": 5}]),
        "schedules": ({"schedules__two__stages": [*STAGES[:1], {"compressor": "wide"}]}, [{"schedules__new": "x"}]),
        "phases": ({"phases__pretrain": ...}, []),
        "evaluate": (None, [{"evaluate": {}}, {"evaluate__more": {"kind": "toy_match", "data": "unused"}}]),
        "matrix": (None, [{"matrix": {"seed": [0, 1]}}]),
        "zip": (None, [{"zip": [{"seed": [0]}]}]),
        "exclude": (None, [{"exclude": [{"seed": 4}]}]),
        "include": (None, [{"include": [{"seed": 4}]}]),
        "cell_name": (None, [{"cell_name": "{seed}"}]),
        "controls": (None, [{"controls": ["seed"]}]),
        "cluster": (None, [{"cluster": {"num_workers": 2}}]),
        "tracking": (None, [{"tracking": {"experiment_name": "x"}}]),
        "report": (None, [{"report": {"mean_over": ["seed"]}}]),
        "search": (None, [{"search": SEARCH}]),
    },
    ModelSpec: {
        "model_name_or_path": ({"model__model_name_or_path": "org/other"}, []),
        "revision": (
            {"model__model_name_or_path": "org/other", "model__revision": "v2"},
            [{"model__revision": "unused-by-a-folder"}],
        ),
        "weights": ({"model__weights": {"projector": "random"}}, []),
        "dtype": ({"model__dtype": "bfloat16"}, []),
        "attn_implementation": (None, [{"model__attn_implementation": "eager"}]),
        "trust_remote_code": (None, [{"model__trust_remote_code": True}]),
    },
    PhasesSpec: {"pretrain": ({"phases__pretrain__max_steps": 11}, []), "finetune": ({F + "max_steps": 22}, [])},
    PhaseSpec: {
        "data": ({F + "data": {"train": 1.0, "test": 0.25}}, [{F + "data": {"test": 0.5, "train": 1.0}}]),
        "train": ({F + "train": ["language_model"]}, [{F + "train": ["language_model", "projector"]}]),
        "lora": ({F + "lora": None}, []),
        "schedule": ({F + "schedule": "wide"}, [{F + "schedule": {"kind": "stages", "stages": STAGES}}]),
        "start_from": ({F + "start_from": "org/start"}, []),
        "seed": ({F + "seed": 3}, [{F + "seed": 0}]),
        "max_steps": ({F + "max_steps": 24}, []),
        "num_train_epochs": (
            {F + "max_steps": ..., F + "num_train_epochs": 2},
            [{F + "max_steps": ..., F + "num_train_epochs": 1.23}],  # 130 rows an epoch, 8 a step: 20 steps again
        ),
        "max_train_tflops": (None, []),
        "match_train_tflops": (None, []),
        "global_batch_size": ({F + "global_batch_size": 16}, []),
        "per_device_train_batch_size": (None, [{F + "per_device_train_batch_size": "auto"}]),
        "learning_rate": (
            {F + "learning_rate__projector": 2e-3},
            [{F + "learning_rate__vision_tower": 1e-6}],  # a part that does not train
        ),
        "lr_scheduler_type": ({F + "lr_scheduler_type": "linear"}, []),
        "warmup_ratio": ({F + "warmup_ratio": 0.1}, []),
        "weight_decay": ({F + "weight_decay": 0.1}, []),
        "max_grad_norm": ({F + "max_grad_norm": 0}, []),
        "model_max_length": ({F + "model_max_length": 512}, []),
        "group_by_modality_length": ({F + "group_by_modality_length": False}, []),
        "gradient_checkpointing": (None, [{F + "gradient_checkpointing": True}]),
        "deepspeed": (None, [{F + "deepspeed": "zero3"}, {F + "deepspeed": {"zero_optimization": {"stage": 1}}}]),
    },
    LoraSpec: {
        "r": ({F + "lora__r": 8}, [{F + "lora__r": 128}]),
        "alpha": ({F + "lora__alpha": 8}, []),
        "dropout": ({F + "lora__dropout": 0.0}, []),
        "target_modules": (
            {F + "lora__target_modules": ["q_proj"]},
            [{F + "lora__target_modules": list(reversed(LoraSpec().target_modules))}],
        ),
    },
    registry.spec_class(registry.COMPRESSORS, "average_pool"): {
        "kind": (None, []),
        "layer": ({"compressors__heavy__layer": 1}, [{"compressors__heavy__layer": "50%"}]),
        "stride": ({"compressors__heavy__stride": 4}, []),
        "keep_tokens": ({"compressors__heavy": {**HEAVY, "stride": None, "keep_tokens": 4}}, []),
        "keep_ratio": ({"compressors__heavy": {**HEAVY, "stride": None, "keep_ratio": "1/4"}}, []),
        "layer_average_tokens": ({"compressors__heavy": {**HEAVY, "stride": None, "layer_average_tokens": 40}}, []),
        "keys_only": ({"compressors__heavy__keys_only": True}, [{"compressors__heavy__keys_only": False}]),
        "positions": ({"compressors__heavy__positions": "first"}, [{"compressors__heavy__positions": "mean"}]),
        "size_bias": ({"compressors__heavy__size_bias": True}, [{"compressors__heavy__size_bias": False}]),
    },
    ClusterSpec: {
        "address": (None, [{"cluster": {"address": "auto"}}]),
        "lanes": (None, [{"cluster": {"lanes": 2}}]),
        "num_workers": (None, [{"cluster": {"num_workers": 2}}]),
        "placement": (None, [{"cluster": {"placement": "spread"}}]),
        "use_gpu": (None, [{"cluster": {"use_gpu": True}}]),
        "resources_per_worker": (None, [{"cluster": {"resources_per_worker": {"CPU": 2}}}]),
        "max_failures": (None, [{"cluster": {"max_failures": 0}}]),
        "checkpoint_every": (None, [{"cluster": {"checkpoint_every": 3}}]),
        "keep": (None, [{"cluster": {"keep": {"leaf": "full"}}}]),
        "storage_path": (None, [{"cluster": {"storage_path": "/elsewhere"}}]),
        "deterministic": (None, [{"cluster": {"deterministic": True}}]),
        "nice": (None, [{"cluster": {"nice": 5}}]),
        "wait_minutes": (None, [{"cluster": {"wait_minutes": 5.0}}]),
        "stall_minutes": (None, [{"cluster": {"stall_minutes": 1.0}}]),
        "device_tflops": (None, [{"cluster": {"device_tflops": 150.0}}]),
        "rehearse": (None, [{"cluster": {"rehearse": False}}]),
    },
    KeepSpec: {"leaf": (None, [{"cluster": {"keep": {"leaf": "none"}}}])},
    TrackingSpec: {
        "tracking_uri": (None, [{"tracking": {"tracking_uri": "http://x"}}]),
        "experiment_name": (None, [{"tracking": {"experiment_name": "x"}}]),
        "also": (None, [{"tracking": {"also": ["tensorboard"]}}]),
    },
    ReportSpec: {
        "baseline": (None, [{"report": {"baseline": {"seed": 0}}}]),
        "mean_over": (None, [{"report": {"mean_over": ["seed"]}}]),
        "rows": (None, [{"report": {"rows": ["seed=*"]}}]),
        "columns": (None, [{"report": {"columns": ["cost/*"]}}]),
        "labels": (None, [{"report": {"labels": {"seed=0": "A"}}}]),
        "decimals": (None, [{"report": {"decimals": {"cost/*": 1}}}]),
        "bold": (None, [{"report": {"bold": "best"}}]),
    },
}
CASES = [
    (cls, name, change, yes)
    for cls, fields in FIELDS.items()
    for name, (reaches, kept) in fields.items()
    for change, yes in ([(reaches, True)] if reaches else []) + [(each, False) for each in kept]
]


@pytest.mark.parametrize("cls", FIELDS, ids=lambda cls: cls.__name__)
def test_no_field_is_forgotten(cls: type[Any]) -> None:
    assert set(FIELDS[cls]) == set(cls.model_fields)


@pytest.mark.parametrize(("cls", "name", "change", "reaches"), CASES, ids=[f"{c[0].__name__}.{c[1]}" for c in CASES])
def test_every_field(lab: Any, cls: type[Any], name: str, change: dict[str, Any], reaches: bool) -> None:
    if name == "schedules" and not reaches:
        change = {"schedules__new": {"kind": "constant", "compressor": "wide"}}
    before = lab.cell(model__model_name_or_path="org/other") if name == "revision" and reaches else lab.cell()
    assert (lab.cell(**change).id != before.id) == reaches


def test_renaming_changes_nothing(lab: Any) -> None:
    before = lab.cell()
    text = json.dumps(lab.tree())
    for old, new in (("heavy", "renamed"), ("two", "zwei"), ("train", "aaa"), ("toy", "toy2")):
        named = f'"{old}"'
        renamed = json.loads(text.replace(named, f'"{new}"')) if old != "train" else _rename_data(lab.tree(), old, new)
        after = expand_cells(lab.loaded(renamed))[0]
        assert after.id == before.id, old
        assert [job.id for job in after.evaluations] == [job.id for job in before.evaluations]


def _rename_data(tree: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    tree["data"][new] = tree["data"].pop(old)
    tree["phases"]["pretrain"]["data"] = new
    tree["phases"]["finetune"]["data"] = {"test": 0.5, new: 1.0}
    return tree


def test_schedules_that_compile_to_the_same_table_are_the_same_cell(lab: Any) -> None:
    cells = lab.schedules("two", ["heavy", "full"], ["heavy", "heavy", "full", "full"], "heavy", ["heavy"])
    assert len({cell.id for cell in cells[:3]}) == 1
    assert cells[3].id == cells[4].id != cells[0].id


def test_a_layer_of_the_vision_tower_counts_by_its_number(lab: Any, tmp_path: Path) -> None:
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["num_hidden_layers"] = 4
    file.write_text(json.dumps(config))
    half, two, one = (
        lab.cell(compressors__heavy={"kind": "average_pool", "layer": layer, "stride": 2})
        for layer in ("tower:50%", "tower:2", "tower:1")
    )
    assert half.id == two.id != one.id
    assert half.phases[1].table[0].points[0]["layer"] == "tower:2"


def test_two_names_of_one_variant_are_one_action(lab: Any) -> None:
    cell = lab.cell(compressors__again=HEAVY, phases__finetune__schedule={"kind": "stages", "stages": [
        {"share": "1/4", "compressor": "heavy"}, {"share": "1/4", "compressor": "again"}, {}]})  # fmt: skip
    assert [(a.first_step, a.last_step, a.variant) for a in cell.phases[1].table] == [
        (0, 10, "heavy"),
        (10, 20, "full"),
    ]
    assert cell.id == lab.cell().id


def test_moving_files_changes_nothing_and_editing_them_does(lab: Any, tmp_path: Path) -> None:
    before = lab.cell()
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("not reached")
    shutil.copy(tmp_path / "rows.json", tmp_path / "rows2.json")
    moved = {"model__model_name_or_path": str(tmp_path / "moved"), "data__train__file": str(tmp_path / "rows2.json")}
    assert lab.cell(**moved).id == before.id
    rows = json.loads((tmp_path / "rows2.json").read_text())
    (tmp_path / "rows2.json").write_text(json.dumps([["What shape?", "circle"], *rows[1:]]))
    assert lab.cell(**moved).id != before.id
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        file = tmp_path / "model" / name
        old = file.read_text()
        file.write_text(old + "\n")
        assert lab.cell().id != before.id, name
        file.write_text(old)
        assert lab.cell().id == before.id


def test_weights_count_where_they_are_used(lab: Any, tmp_path: Path) -> None:
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"one")
    pretrained, random = lab.cell(model__weights="pretrained"), lab.cell()
    weights.write_bytes(b"two")
    assert lab.cell(model__weights="pretrained").id != pretrained.id
    assert lab.cell().id == random.id


def test_a_seed_that_is_not_reached_changes_nothing(lab: Any) -> None:
    fixed = {"phases__finetune__seed": 7, "model__weights": "pretrained"}
    assert lab.cell(**fixed).id == lab.cell(**fixed, seed=1).id
    drawn = {**fixed, "model__weights": "random"}
    assert lab.cell(**drawn).id == lab.cell(**drawn, seed=1).id  # the first phase's fixed seed draws the weights
    drawn["phases__pretrain__seed"] = None
    assert lab.cell(**drawn).id != lab.cell(**drawn, seed=1).id
    one, two = lab.cell(model__weights="pretrained"), lab.cell(model__weights="pretrained", seed=1)
    assert one.phases[0].end == two.phases[0].end  # pretraining has a seed of its own
    assert one.id != two.id


def test_a_plugin_by_path_counts_by_its_source(lab: Any, tmp_path: Path) -> None:
    def cell(source: str, number: int) -> str:
        file = tmp_path / f"pooling{number}.py"
        file.write_text(source)
        registry.load_plugin(file.name, tmp_path)
        return str(lab.cell(compressors__heavy={"kind": f"pooling{number}", "layer": 2, "stride": 8}).id)

    source = (
        "from typing import Literal\nfrom orchestrator.spec.components import CompressorSpec\n"
        "class Pooling(CompressorSpec):\n    kind: Literal['KIND'] = 'KIND'\n"
        "    def kept_tokens(self, grid): return 1\n"
    )
    first = cell(source.replace("KIND", "pooling1"), 1)
    file = tmp_path / "pooling1.py"
    file.write_text(file.read_text() + "# changed\n")
    again = lab.cell(compressors__heavy={"kind": "pooling1", "layer": 2, "stride": 8}).id
    assert again != first


@pytest.mark.parametrize("what", ["rows.json", "model"])
def test_what_merely_cannot_be_read_changes_no_identity(lab: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Data that is not here is known by its path, a folder that is not here may be a hub's model: not by one error."""
    identity = lab.cell().id
    real_read, real_stat = Path.read_bytes, os.stat

    def refuse(path: Any) -> None:
        if str(path).endswith(f"/{what}"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def read(path: Path) -> bytes:
        refuse(path)
        return real_read(path)

    def stat(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        refuse(path)
        return real_stat(path, *arguments, **options)

    with monkeypatch.context() as faults, pytest.raises(PermissionError):
        faults.setattr(Path, "read_bytes", read)
        if what == "model":
            faults.setattr(os, "stat", stat)
        lab.cell()
    assert lab.cell().id == identity

"""`extends`, null, `kind`, relative paths, aliases and `--set`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.loaded import LoadedExperiment
from orchestrator.spec.loader import load_experiment

Write = Callable[..., Path]


def child(write: Write, text: str, *overrides: str) -> LoadedExperiment:
    return load_experiment(write("extends: base.yaml\n" + text), overrides)


def messages(path: Path, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load_experiment(path, overrides)
    return str(caught.value)


def test_mappings_merge_deeply_and_lists_replace(small: str, write: Write) -> None:
    write(small.replace("schedule: two", "schedule: two\n    train: [vision_tower, projector]"), "base.yaml")
    spec = child(write, "name: child\nphases: {finetune: {max_steps: 7, train: [projector]}}\n").spec
    assert spec.name == "child"
    assert spec.phases.finetune is not None
    assert spec.phases.finetune.max_steps == 7
    assert spec.phases.finetune.train == ("projector",)
    assert spec.phases.finetune.schedule == "two"


def test_an_entry_whose_kind_changes_is_replaced_whole(small: str, write: Write) -> None:
    write(small, "base.yaml")
    loaded = child(write, "schedules: {two: {kind: constant, compressor: wide}}\n")
    assert loaded.tree["schedules"]["two"] == {"kind": "constant", "compressor": "wide"}
    same = child(write, "compressors: {heavy: {kind: average_pool, stride: 4}}\n")
    assert same.tree["compressors"]["heavy"] == {"kind": "average_pool", "layer": 2, "stride": 4}


def test_null_puts_a_key_back_to_its_default(small: str, write: Write) -> None:
    write(small + "cluster: {max_failures: 9, num_workers: 4}\n", "base.yaml")
    loaded = child(write, "cluster: {max_failures: null}\nphases: {finetune: {learning_rate: null}}\n")
    assert loaded.spec.cluster.max_failures == 3
    assert loaded.spec.cluster.num_workers == 4
    assert loaded.spec.phases.finetune is not None
    assert loaded.spec.phases.finetune.learning_rate == 2e-5
    assert loaded.sources["cluster.max_failures"] == "default"


def test_null_takes_a_named_entry_out(small: str, write: Write) -> None:
    write(small + "matrix: {seed: [0, 1]}\n", "base.yaml")
    loaded = child(write, "compressors: {wide: null}\nevaluate: {vqa: null}\nmatrix: {seed: null}\n")
    assert set(loaded.spec.compressors) == {"heavy"}
    assert not loaded.spec.evaluate
    assert len(loaded.cells) == 1


def test_one_length_replaces_another_by_null(small: str, write: Write) -> None:
    write(small, "base.yaml")
    text = messages(write("extends: base.yaml\nphases: {finetune: {num_train_epochs: 1}}\n"))
    assert "max_steps: null" in text
    loaded = child(write, "phases: {finetune: {num_train_epochs: 1, max_steps: null}}\n")
    assert loaded.spec.phases.finetune is not None
    assert loaded.spec.phases.finetune.max_steps is None


def test_later_files_of_a_list_win_and_chains_are_followed(small: str, write: Write) -> None:
    write(small, "base.yaml")
    write("extends: base.yaml\nseed: 1\ncluster: {lanes: 2}\n", "one.yaml")
    write("seed: 2\n", "two.yaml")
    loaded = load_experiment(write("extends: [one.yaml, two.yaml]\n"))
    assert loaded.spec.seed == 2
    assert loaded.spec.cluster.lanes == 2
    assert loaded.sources["seed"].endswith("two.yaml:1")
    assert loaded.sources["cluster.lanes"].endswith("one.yaml:3")
    assert loaded.sources["name"].endswith("base.yaml:1")


def test_a_diamond_is_read_once_however_deep(small: str, write: Write) -> None:
    write(small, "f0.yaml")
    for number in range(1, 30):
        write(f"extends: [f{number - 1}.yaml, f{number - 1}.yaml]\n", f"f{number}.yaml")
    assert load_experiment(write("extends: f29.yaml\n")).spec.name == "small"


def test_circles_are_reported_with_their_files(small: str, write: Write) -> None:
    write(small + "extends: b.yaml\n", "a.yaml")
    b = write("extends: a.yaml\n", "b.yaml")
    text = messages(b)
    assert "extends forms a cycle" in text
    assert "a.yaml" in text
    assert "itself.yaml" in messages(write("extends: itself.yaml\nname: x\n", "itself.yaml"))


def test_a_very_long_chain_is_an_error(small: str, write: Write) -> None:
    write(small, "f0.yaml")
    for number in range(1, 50):
        write(f"extends: f{number - 1}.yaml\n", f"f{number}.yaml")
    assert "deeper than 32 files" in messages(write("extends: f49.yaml\n"))


def test_paths_are_relative_to_the_file_that_writes_them(small: str, write: Write, folder: Path) -> None:
    (folder / "sub" / "tiny").mkdir(parents=True)
    (folder / "sub" / "tiny" / "config.json").write_text((folder / "tiny" / "config.json").read_text())
    (folder / "ds.json").write_text("{}")
    write(small + "  more: {kind: exact_match, data: mine}\n", "sub/base.yaml")
    text = (
        "extends: sub/base.yaml\n"
        "data: {mine: {kind: llava_json, data_path: rows.json, num_samples: 5}}\n"
        "phases: {finetune: {deepspeed: ./ds.json}}\ncluster: {storage_path: out}\n"
        "matrix: {model.weights: [random, {vision_tower: tiny, projector: random, language_model: org/name}]}\n"
    )
    loaded = load_experiment(write(text))
    tree = loaded.tree
    assert tree["model"]["model_name_or_path"] == str(folder / "sub" / "tiny")
    assert tree["data"]["mine"]["data_path"] == str(folder / "rows.json")
    assert tree["phases"]["finetune"]["deepspeed"] == str(folder / "ds.json")
    assert tree["cluster"]["storage_path"] == str(folder / "out")
    assert loaded.cells[1].axes["model.weights"]["vision_tower"] == str(folder / "tiny")
    weights = loaded.cells[1].spec.model.weights
    assert weights == {"vision_tower": str(folder / "tiny"), "projector": "random", "language_model": "org/name"}


def test_a_path_below_belongs_to_the_file_that_writes_it_also_when_kind_is_elsewhere(small: str, write: Write) -> None:
    kind = "data: {mine: {kind: llava_json, num_samples: 5, data_path: a.json}}\n"
    write(small, "base.yaml")
    write("extends: base.yaml\n" + kind, "kinds.yaml")
    loaded = load_experiment(write("extends: ../kinds.yaml\ndata: {mine: {data_path: b.json}}\n", "sub/top.yaml"))
    assert loaded.tree["data"]["mine"]["data_path"].endswith(os.path.join("sub", "b.json"))


def test_urls_hub_ids_and_home_are_left_or_expanded(small: str, write: Write) -> None:
    text = small.replace("model_name_or_path: tiny", "model_name_or_path: llava-hf/llava-1.5-7b-hf")
    loaded = load_experiment(write(text + "cluster: {storage_path: s3://bucket/runs}\n"))
    assert loaded.spec.model.model_name_or_path == "llava-hf/llava-1.5-7b-hf"
    assert loaded.spec.cluster.storage_path == "s3://bucket/runs"
    assert any("not known here" in notice for notice in loaded.notices)


def test_a_mistyped_folder_is_no_hub_id(small: str, write: Write, folder: Path) -> None:
    (folder / "models" / "tiny-llava").mkdir(parents=True)
    text = messages(write(small.replace("model_name_or_path: tiny", "model_name_or_path: models/tiny-lava")))
    assert "no model folder" in text
    assert "tiny-llava" in text


def test_aliases_are_renamed_and_reported(small: str, write: Write) -> None:
    text = (
        small.replace("learning_rate:", "lr:")
        .replace("max_steps: 100", "epochs: 1\n    batch_size: 64\n    micro_batch_size: 8")
        .replace("model_name_or_path", "base_model")
        .replace("weights: random", "weights: random, torch_dtype: float32")
    )
    loaded = load_experiment(write(text + "cluster: {save_steps: 5}\n"))
    assert loaded.tree["phases"]["finetune"]["learning_rate"] == 1e-3
    assert "lr" not in loaded.tree["phases"]["finetune"]
    assert loaded.spec.cluster.checkpoint_every == 5
    text = "\n".join(loaded.notices)
    for old, new in [("lr", "learning_rate"), ("epochs", "num_train_epochs"), ("batch_size", "global_batch_size")]:
        assert f"phases.finetune.{old} is read as phases.finetune.{new}" in text
    assert "model.torch_dtype is read as model.dtype" in text


def test_an_alias_above_wins_over_the_canonical_name_below(small: str, write: Write) -> None:
    write(small, "base.yaml")
    loaded = child(write, "phases: {finetune: {lr: 0.5}}\n")
    assert loaded.tree["phases"]["finetune"]["learning_rate"] == 0.5


def test_both_names_at_once_are_an_error(small: str, write: Write) -> None:
    text = messages(write(small.replace("learning_rate: 1e-3", "learning_rate: 1e-3\n    lr: 1e-4")))
    assert ":19:5: phases.finetune.lr: `lr` and `learning_rate` are two names" in text


def test_aliases_work_in_axes_and_overrides(small: str, write: Write) -> None:
    path = write(small + "matrix: {phases.finetune.lr: [1e-3, 1e-4]}\n")
    loaded = load_experiment(path, ["phases.finetune.epochs=2", "phases.finetune.max_steps=null"])
    assert [cell.axes for cell in loaded.cells] == [
        {"phases.finetune.learning_rate": 1e-3},
        {"phases.finetune.learning_rate": 1e-4},
    ]
    assert loaded.tree["phases"]["finetune"]["num_train_epochs"] == 2
    assert sum("is read as" in notice for notice in loaded.notices) == 2
    both = write(small + "matrix: {phases.finetune.lr: [1], phases.finetune.learning_rate: [2]}\n")
    assert "two names for the same key" in messages(both)


def test_set_parses_yaml_and_is_a_source(small: str, write: Write, folder: Path) -> None:
    overrides = ["phases.finetune.learning_rate=2e-5", "compressors.heavy.stride=4", "phases.finetune.lora={r: 8}"]
    overrides += ["schedules.two.stages.0.share=1/4", "seed=3", "seed=4", "cluster.address='10'"]
    loaded = load_experiment(write(small), overrides)
    tree = loaded.tree
    assert tree["phases"]["finetune"]["learning_rate"] == 2e-5
    assert tree["phases"]["finetune"]["lora"] == {"r": 8}
    assert tree["schedules"]["two"]["stages"][0]["share"] == "1/4"
    assert tree["seed"] == 4
    assert loaded.spec.cluster.address == "10"
    assert loaded.sources["compressors.heavy.stride"] == "--set"


def test_set_makes_what_is_missing_and_takes_out(small: str, write: Write) -> None:
    loaded = load_experiment(write(small), ["report.mean_over=[seed]", "evaluate.vqa=null"])
    assert loaded.spec.report.mean_over == ("seed",)
    assert not loaded.spec.evaluate


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "not of the form path=value"),
        ("=3", "not of the form path=value"),
        ("seed=[1", "not valid YAML"),
        ("seed=1", "seed is an axis of the grid"),
        ("phases.finetune.lr_scheduler=cosin", "did you mean cosine?"),
        ("phases.finetune.learning_rat=1", "did you mean learning_rate?"),
        ("phasess.finetune.seed=1", "did you mean phases?"),
        ("compressors.hevy.stride=2", "did you mean heavy?"),
        ("schedules.two.stages.7.share=1/2", "`7` is not known under schedules.two.stages"),
        ("name.x=1", "`x` is not known under name"),
        ("extends=x.yaml", "edit the file"),
        ("phases.finetune.max_steps=-1", "--set: phases.finetune.max_steps: must be at least 1"),
        ("model.model_name_or_path=./gone", "there is no model folder"),
    ],
)
def test_wrong_overrides(override: str, message: str, small: str, write: Write) -> None:
    assert message in messages(write(small + "matrix: {seed: [0, 1]}\n"), override)


def test_an_axis_can_be_narrowed(small: str, write: Write) -> None:
    loaded = load_experiment(write(small + "matrix: {seed: [0, 1]}\n"), ["matrix.seed=[7]"])
    assert [cell.axes for cell in loaded.cells] == [{"seed": 7}]


def test_an_axis_that_null_takes_out_is_none(small: str, write: Write) -> None:
    loaded = load_experiment(write(small + "matrix: {seed: [0, 1]}\n"), ["matrix.seed=null", "seed=7"])
    assert [(cell.axes, cell.spec.seed) for cell in loaded.cells] == [({}, 7)]


def test_a_path_of_set_is_relative_to_the_working_folder(
    small: str, write: Write, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "here" / "other").mkdir(parents=True)
    (folder / "here" / "other" / "config.json").write_text((folder / "tiny" / "config.json").read_text())
    path = write(small)
    monkeypatch.chdir(folder / "here")
    loaded = load_experiment(path, ["model.model_name_or_path=other"])
    assert loaded.tree["model"]["model_name_or_path"] == str(folder / "here" / "other")


PLUGIN = '''\
"""A plug-in of a test."""
from typing import ClassVar, Literal
from orchestrator.spec.components import CompressorSpec, Grid, amount_to_keep

class KeepFirst(CompressorSpec):
    """Keeps the first tokens."""

    implementation: ClassVar[str] = __name__ + ":KeepFirst"
    kind: Literal["keep_first_test"] = "keep_first_test"
    aliases: ClassVar[dict[str, str]] = {"num_tokens": "keep_tokens"}

    def kept_tokens(self, grid: Grid) -> int:
        """As asked."""
        if self.stride is not None:
            raise ValueError("keep_first_test takes no stride")
        return amount_to_keep(self, grid.tokens)
'''


def test_plugins_of_a_lower_file_are_loaded_from_beside_it(small: str, write: Write) -> None:
    write(PLUGIN, "sub/plug.py")
    write(
        small.replace("model_name_or_path: tiny", "model_name_or_path: ../tiny") + "plugins: [plug.py]\n", "sub/b.yaml"
    )
    loaded = load_experiment(
        write("extends: sub/b.yaml\ncompressors: {mine: {kind: keep_first_test, layer: 1, num_tokens: 7}}\n")
    )
    assert loaded.spec.compressors["mine"][0].keep_tokens == 7
    assert Path(loaded.spec.plugins[0]).is_absolute()
    text = messages(
        write("extends: sub/b.yaml\ncompressors: {mine: {kind: keep_first_test, layer: 1, stride: 7}}\n", "c.yaml")
    )
    assert "c.yaml:2:63: compressors.mine.stride: keep_first_test takes no stride" in text


def test_a_description_is_a_files_own(small: str, write: Callable[..., Path]) -> None:
    write("description: what the base is\n" + small, "base.yaml")
    assert load_experiment(write("extends: base.yaml\nname: x\n")).spec.description == ""
    own = write("extends: base.yaml\nname: x\ndescription: mine\n")
    assert load_experiment(own).spec.description == "mine"
    write("extends: base.yaml\nname: y\n", "middle.yaml")
    assert load_experiment(write("extends: [middle.yaml]\nname: x\n")).spec.description == ""

"""`import orchestrator as llv`: the command line's work from Python, many times in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import ROOT

import orchestrator as llv


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_it_loads_nothing_else_and_takes_no_time():
    code = "import sys; before = set(sys.modules); import orchestrator as llv; print(sorted(set(sys.modules) - before))"
    loaded = run_python(code)
    for name in ("torch", "ray", "mlflow", "pydantic", "pandas", "orchestrator.experiment"):
        assert f"'{name}" not in loaded
    code = "import time; begun = time.process_time(); import orchestrator; print(time.process_time() - begun)"
    assert min(float(run_python(code)) for _ in range(3)) < 0.25, "in seconds of processor time"


def test_looking_at_an_experiment_loads_no_framework(tiny_experiment):
    heavy = ("torch", "ray", "mlflow", "transformers", "deepspeed", "pandas", "matplotlib")
    code = (
        f"import sys, orchestrator as llv; x = llv.load({str(tiny_experiment)!r})\n"
        "x.plan(); x.status(); x.table(); x.cells\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


def test_every_public_name_is_there():
    for name in llv._HOMES:
        assert getattr(llv, name) is not None and name in dir(llv)
    with pytest.raises(AttributeError, match="nothing"):
        _ = llv.nothing


def mapping(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.replace("1.0e-3", "0.001"))


def test_a_mapping_is_the_same_experiment_as_its_file(tiny_experiment, tiny_text, monkeypatch):
    monkeypatch.chdir(tiny_experiment.parent)
    tree = mapping(tiny_text)
    tree["model"]["model_name_or_path"] = Path(tree["model"]["model_name_or_path"])
    given, file = llv.load(tree), llv.load(tiny_experiment)
    assert [cell.id for cell in given.cells] == [cell.id for cell in file.cells]
    assert given.loaded.sources["seed"] == "default" and given.loaded.sources["name"] == "<mapping>"


def test_relative_paths_of_a_mapping_start_in_the_current_folder(tiny_text, tmp_path, monkeypatch):
    tree = mapping(tiny_text)
    tree["model"]["model_name_or_path"] = os.path.relpath(tree["model"]["model_name_or_path"], tmp_path)
    (tmp_path / "base.yaml").write_text("seed: 7\n")
    monkeypatch.chdir(tmp_path)
    assert llv.load({**tree, "extends": "base.yaml"}).spec.seed == 7
    deeper = tmp_path / "elsewhere"
    deeper.mkdir()
    monkeypatch.chdir(deeper)
    with pytest.raises(llv.SpecError):
        llv.load(tree)


def test_all_errors_come_at_once_with_their_places(tiny_experiment, tiny_text):
    tree = mapping(tiny_text)
    tree["phases"]["finetune"] |= {"max_steps": -6, "learning_rte": 1e-3}
    with pytest.raises(llv.SpecError) as caught:
        llv.load(tree)
    assert {error.path for error in caught.value.errors} >= {
        "phases.finetune.max_steps",
        "phases.finetune.learning_rte",
    }
    assert str(caught.value).startswith("<mapping>: ")
    with pytest.raises(llv.SpecError, match="a value of type set cannot stand in an experiment"):
        llv.load({**mapping(tiny_text), "seed": {1}})
    for hostile in ({"name": "a\x00"}, {"x\x1b[31m": 1}):
        with pytest.raises(llv.SpecError, match=r"control character U\+00"):
            llv.load(hostile)
    with pytest.raises(llv.SpecError, match="the key 3 is no text"):
        llv.load({3: 4})
    with pytest.raises(llv.SpecError, match="max_steps"):
        llv.load(tiny_experiment, ["phases.finetune.max_stepz=3"])


def test_overrides_and_cells_by_name_id_and_axis(tiny_experiment):
    experiment = llv.load(tiny_experiment, ["seed=3"])
    assert experiment.spec.seed == 3 and [cell.status for cell in experiment.cells] == ["new"] * 3
    cell = experiment.cell("schedule=heavy")
    assert cell.axes == {"phases.finetune.schedule": "heavy"} and cell.spec.seed == 3
    assert experiment.cell(cell.id[:10]).name == cell.name
    with pytest.raises(llv.UsageError, match="did you mean schedule=heavy"):
        experiment.cell("hevy")
    with pytest.raises(llv.UsageError, match="has no log yet"):
        cell.logs()
    assert not cell.weights_path.exists() and cell.history().empty


def test_documents_are_those_of_the_command_line_and_show_themselves(tiny_experiment, llavolta, monkeypatch):
    monkeypatch.chdir(tiny_experiment.parent)
    experiment = llv.load(tiny_experiment)
    for verb, document in (("plan", experiment.plan()), ("status", experiment.status())):
        assert json.loads(json.dumps(document)) == json.loads(llavolta(verb, tiny_experiment, "--json").stdout)
        assert "schedule=two_stage" in document._repr_html_()
        assert str(document).splitlines() == llavolta(verb, tiny_experiment, COLUMNS="10000").stdout.splitlines()
    assert "schedule=two_stage" in experiment._repr_html_()
    assert experiment.storage.folder == tiny_experiment.parent / "runs"


def test_what_is_printed_is_short(tiny_experiment, llavolta, monkeypatch):
    monkeypatch.chdir(tiny_experiment.parent)
    experiment = llv.load(tiny_experiment)
    cell, table, listed = experiment.cells[1], experiment.table(), llv.components()
    assert str(cell) == f"<Cell schedule=heavy of tiny: {cell.id[:12]}>" and str(experiment.cells).count("<Cell ") == 3
    assert str(table).splitlines()[0].split() == ["cell", "status"] and repr(table) == "<Table: 3 rows, 0 metrics>"
    assert str(listed).splitlines() == llavolta("components", COLUMNS="10000").stdout.splitlines()
    assert repr(listed) == f"<Documents: {len(listed)}>" and isinstance(listed, list)
    plan = experiment.plan()
    assert isinstance(plan, dict) and repr(plan).startswith("<Document of experiment, cells, stage_runs,")
    outcome = llv.RunOutcome(experiment.planned(), table, failed={"schedule=full": "why"})
    assert str(outcome) == "<RunOutcome of tiny: 0 jobs executed, 1 cells failed, 0 not finished>"
    for each in (experiment.loaded, experiment.planned(), experiment.storage, cell.record, cell.cell):
        assert len(repr(each)) < 2000


def test_messages_speak_of_arguments(tiny_experiment, tiny_text, monkeypatch):
    monkeypatch.chdir(tiny_experiment.parent)
    tiny_experiment.write_text(tiny_text.replace("matrix:", "matrix:\n  seed: [0, 1]"))
    experiment = llv.load(tiny_experiment)
    with pytest.raises(llv.UsageError, match=r"^cell schedule=heavy fits several cells: "):
        experiment.cell("schedule=heavy")
    with pytest.raises(llv.UsageError, match=r"^row 300: data.train has rows 0 to \d+, 200 in all, and not this one"):
        experiment.data_row(300)
    with pytest.raises(llv.UsageError, match=r"^under light: cell seed=0,schedule=heavy has none of that name"):
        experiment.cell("seed=0,schedule=heavy").predictions("vqa", "light")


def test_a_plugin_file_is_checked_without_values(tmp_path):
    (tmp_path / "even.py").write_text(EVEN)
    seen = []
    results = llv.check_file(tmp_path / "even.py", on_checked=seen.append)
    assert results == seen and [(one.sort, one.kind, one.broken) for one in results] == [("schedules", "even", ())]


EVEN = '''"""A schedule of two halves."""
from typing import Literal

from orchestrator import plugin


class EvenSpec(plugin.ScheduleSpec):
    """Compresses the first half."""

    kind: Literal["even"] = "even"
    compressor: str = "light"

    def variants(self):
        return (self.compressor, "full")

    def compile(self, total_steps, global_batch_size):
        half = total_steps // 2
        actions = [(0, half, self.compressor), (half, total_steps, "full")]
        return plugin.StageTable(plugin.merge_actions([each for each in actions if each[0] < each[1]]), "full")
'''

SPOILED = '''"""A method that fails in the middle of a training step."""
from typing import ClassVar, Literal

from orchestrator_plugins.compressors.average_pool import AveragePool, AveragePoolSpec


class SpoiledSpec(AveragePoolSpec):
    """Fails."""

    implementation: ClassVar[str] = f"{__name__}:Spoiled"
    kind: Literal["spoiled"] = "spoiled"


class Spoiled(AveragePool):
    """Fails."""

    def compress(self, visual_BND, grid, context):
        raise RuntimeError("spoiled on purpose")
'''


def small(tiny_text: str, storage: Path, **changes: Any) -> dict[str, Any]:
    """One cell of two steps, a micro-batch of 8, its own seed."""
    tree = mapping(tiny_text)
    del tree["matrix"], tree["schedules"]
    tree["phases"]["finetune"] |= {"max_steps": 2, "schedule": "full", **changes.pop("finetune", {})}
    return {**tree, "cluster": {"storage_path": str(storage)}, **changes}


@pytest.mark.slow
def test_many_runs_in_one_process(tiny_text, tmp_path):
    """Local ones of every kind of engine, one that fails amid a step, Ray between them."""
    storage = tmp_path / "runs"

    def ends_well(seed: int, *, local: bool = True, **finetune: Any) -> llv.Experiment:
        experiment = llv.load(small(tiny_text, storage, name=f"seed{seed}", seed=seed, finetune=finetune))
        outcome = experiment.run(local=local)
        assert (outcome.failed, outcome.exit_code) == ({}, 0)
        return experiment

    first = ends_well(1)
    ends_well(2, deepspeed="zero3")
    (tmp_path / "spoiled.py").write_text(SPOILED)
    fails = {"deepspeed": "zero3", "schedule": "spoiled"}
    spoiled = {
        "plugins": [tmp_path / "spoiled.py"],
        "compressors": {"spoiled": {"kind": "spoiled", "layer": 1, "stride": 8}},
    }
    failing = llv.load(small(tiny_text, storage, name="fails", seed=3, finetune=fails, **spoiled))
    outcome = failing.run(local=True)
    assert outcome.exit_code == 1 and "spoiled on purpose" in outcome.failed[failing.cells[0].name]
    ends_well(4, deepspeed="zero2")
    ends_well(5, local=False)
    ends_well(6)
    assert first.run(local=True).tried == 0

    (cell,) = first.cells
    assert cell.status == "finished" and (cell.weights_path / "model.safetensors").is_file() and cell.logs()
    assert list(cell.history().index) == [0, 1] and cell.history()["train/loss"].notna().all()
    frame = first.table().to_frame()
    assert frame.loc[cell.name, "status"] == "finished"
    assert frame.loc[cell.name, "eval/vqa/accuracy"] == cell.metrics["eval/vqa/accuracy"]
    assert len(llv.table([first, failing]).to_frame()) == 2


def test_notebooks_are_kept_without_their_outputs():
    notebooks = sorted((ROOT / "examples").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None, path

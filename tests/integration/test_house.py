"""The rules of the house, held by machine: imports go one way, first lines, a light command line."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from repository import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BIN = Path(sys.executable).parent
PACKAGES = ("orchestrator", "plugins")
HEAVY = {"torch", "transformers", "deepspeed", "ray", "mlflow", "peft", "matplotlib", "pandas", "numpy"}

PRODUCT = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SOURCES = sorted([*PRODUCT, *(ROOT / "experiments").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_files_are_found():
    assert len(PRODUCT) > 20 and len(SOURCES) > len(PRODUCT)


def test_imports_go_one_way():
    result = subprocess.run([BIN / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_file_says_what_it_is_for(path):
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, "no docstring"
    assert text.lstrip().startswith(('"""', 'r"""', "#!")), "the first line says what the file is for"


def loaded_by(code: str) -> set[str]:
    """Heavy packages that a fresh interpreter holds after `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return HEAVY & set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", ["orchestrator.cli", "orchestrator.spec.loader", "orchestrator.plan.tree"])
def test_the_light_path_loads_no_framework(module):
    assert loaded_by(f"import {module}") == set()


def test_the_check_for_frameworks_sees_one():
    assert loaded_by("import numpy") == {"numpy"}


def test_validate_loads_no_framework():
    code = (
        "from pathlib import Path\nfrom orchestrator.spec.loader import load_experiment\n"
        "assert len(load_experiment(Path('experiments/quickstart.yaml')).cells) == 3"
    )
    assert loaded_by(code) == set()


def test_every_package_of_the_tree_is_packaged():
    packaged = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts).replace("plugins", "orchestrator_plugins", 1)
        for path in PRODUCT
        if path.name == "__init__.py"
    }
    assert folders == packaged


def test_torch_is_held_and_every_requirement_has_an_exact_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in {"#", ""}
    }
    required = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {
        requirement.split(";")[0].split(">")[0].split("[")[0].strip().lower().replace("_", "-")
        for requirement in required
    }
    assert names <= pinned
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()


def test_pre_commit_hooks_are_valid_and_use_the_environment():
    file = ROOT / ".pre-commit-config.yaml"
    result = subprocess.run([BIN / "pre-commit", "validate-config", file], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    hooks = [hook for repo in yaml.safe_load(file.read_text())["repos"] for hook in repo["hooks"]]
    assert all((BIN / Path(hook["entry"].split()[0]).name).exists() for hook in hooks)


def test_ci_calls_make_test():
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


@pytest.mark.parametrize(
    "target",
    [
        *("test", "test-unit", "test-integration", "test-faults", "test-all", "test-python"),
        *("install", "quickstart", "check", "format", "sbom", "clean", "help"),
    ],
)
def test_make_targets_exist_and_help_lists_them(target):
    assert subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True).returncode == 0
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert target in [line.split()[0] for line in listed.splitlines()]


def test_make_refuses_a_python_it_does_not_support(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["make", "install", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0 and "is not Python 3.10 to 3.13" in result.stderr

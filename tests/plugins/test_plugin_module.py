"""`orchestrator.plugin`: one module for a plug-in's author, which loads torch when a name that needs it is used."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from orchestrator import plugin

BUILT_IN = Path(__file__).parents[2] / "plugins"


def test_specs_of_built_in_methods_load_no_torch():
    code = (
        "import orchestrator.plugin, orchestrator_plugins.compressors.tome, orchestrator_plugins.data.llava_json\n"
        "import orchestrator_plugins.evaluations.exact_match, sys\n"
        "assert not {'torch', 'transformers', 'ray', 'mlflow', 'pyarrow'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_a_name_that_needs_torch_loads_it():
    code = "import orchestrator.plugin, sys; orchestrator.plugin.take; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_is_there_and_is_what_its_module_defines():
    for name in plugin.__all__:
        assert getattr(plugin, name) is not None
    assert dir(plugin) == sorted(plugin.__all__)
    from orchestrator.compression.ops import merge
    from orchestrator.compression.protocol import take

    assert plugin.take is take and plugin.merge is merge


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'orchestrator.plugin' has no attribute 'takes'"):
        plugin.takes  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(plugin.__file__).read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("orchestrator")
        for alias in node.names
    }
    assert imported == set(plugin.__all__)


@pytest.mark.parametrize("path", sorted(BUILT_IN.rglob("*.py")), ids=lambda path: path.stem)
def test_built_in_plugins_import_the_orchestrator_at_the_top_only(path):
    tree = ast.parse(path.read_text())
    nested = [
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("orchestrator")
    ]
    assert not nested

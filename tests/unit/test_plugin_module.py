"""`orchestrator.plugin`: one module for a plug-in's author, which loads torch when a name that needs it is used."""

import ast
from pathlib import Path

import pytest
from repository import ROOT

from orchestrator import plugin

BUILT_IN = ROOT / "plugins"


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

"""Places that cannot be used as what they are named for: clusters, data files, model folders, implementations."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

from orchestrator.errors import Fault
from orchestrator.spec.base import Component
from orchestrator.spec.faults import fault_at
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.node import Node
from orchestrator.spec.variant_checks import Finding

_TABLES = (".parquet", ".csv", ".tsv", ".arrow", ".feather", ".xlsx", ".zip", ".tar", ".gz", ".zst")
# What calls an implementation, and by which methods; each family's face is in DESIGN section 9.
_METHODS = {"data": ("rows",), "evaluate": ("run",)}


def check_cluster(root: Node) -> list[Fault]:
    """Ray Train works from a driver inside the cluster only."""
    node = root.at(("cluster", "address"))
    if node is None or not isinstance(node.value, str) or not node.value.startswith("ray://"):
        return []
    message = "Ray Train does not run over Ray's client (ray://), whose driver stands outside the cluster"
    hint = "run on a machine of the cluster with `address: auto`"
    return [fault_at(root, ("cluster", "address"), message, "null, auto, or HOST:PORT of a cluster", hint)]


def check_data(sets: Mapping[str, Any], notices: list[str]) -> Iterator[Finding]:
    """Files that rows are read from: on this machine, of a format that is read; one that is not here yet is noted."""
    for name, data in sets.items():
        for field in data.path_fields:
            value = getattr(data, field, None)
            if not isinstance(value, str):
                continue
            path = ("data", name, field)
            if "://" in value:
                hint = "download it first, and name the file or folder it lies in"
                yield Finding(path, "rows are read from a file system, not from an address", "a path", hint)
            elif data.kind == "llava_json" and field == "data_path" and value.lower().endswith(_TABLES):
                hint = "write its rows as JSON: a list of records, or a record a line"
                yield Finding(path, f"`{FilePath(value).suffix}` files are not read", "a .json or .jsonl file", hint)
            elif os.path.isdir(value) and field == "data_path":
                yield Finding(path, "a folder stands where a file belongs", "a .json or .jsonl file")
            elif field == "image_folder" and os.path.isfile(value):
                yield Finding(path, "a file stands where a folder belongs", "a folder")
            elif not os.path.exists(value):
                notices.append(f"{'.'.join(path)}: there is no {value} here; it is looked for again when it runs")


def check_model(model: ModelSpec) -> Iterator[Finding]:
    """Folders that look like a model's and are not: an adapter, GGUF, settings without a config."""
    if os.path.isdir(model.model_name_or_path):
        yield from _model_folder(("model", "model_name_or_path"), FilePath(model.model_name_or_path))
    if isinstance(model.weights, dict):
        for part, source in model.weights.items():
            path = ("model", "weights", part)
            if source.lower().endswith(".gguf"):
                yield Finding(path, _GGUF, "safetensors or PyTorch weights", _GGUF_HINT)
            elif part != "projector" and os.path.isdir(source):
                yield from _model_folder(path, FilePath(source))


_GGUF = "GGUF holds quantised weights, which cannot be trained"
_GGUF_HINT = "use the original model that it was made from"


def _model_folder(path: tuple[str, ...], folder: FilePath) -> Iterator[Finding]:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        hint = "merge it first (peft: `model.merge_and_unload().save_pretrained(FOLDER)`) and name that folder"
        yield Finding(path, "this is an adapter's folder (peft), not a model's", "a folder with config.json", hint)
    elif any(folder.glob("*.gguf")):
        yield Finding(path, _GGUF, "a folder with config.json", _GGUF_HINT)
    else:
        yield Finding(path, "the folder has no config.json", "a Hugging Face model's folder, or a hub id")


def check_implementations(section: str, entries: Mapping[str, Any]) -> Iterator[Finding]:
    """Each component's `module:Class` can be found: by the module's source, so that no framework is imported."""
    for name, entry in entries.items():
        for spec in entry if isinstance(entry, tuple) else (entry,):
            if isinstance(spec, Component) and (wrong := implementation_fault(type(spec), _METHODS.get(section, ()))):
                place = f"{type(spec).__module__}.{type(spec).__name__}"
                hint = f'`implementation: ClassVar[str] = __name__ + ":CLASS"` in {place}'
                yield Finding((section, name, "kind"), f"`{spec.kind}` cannot run: {wrong}", None, hint)


def implementation_fault(component: type[Any], methods: tuple[str, ...]) -> str | None:
    """Why what a spec class names as its implementation cannot be used; None where nothing speaks against it."""
    reference = getattr(component, "implementation", "")
    module, colon, name = reference.partition(":")
    if not (module and colon and name):
        return "its `implementation` names nothing" if not reference else f"`{reference}` is not MODULE:CLASS"
    source = _source(module)
    if source is None:
        return f"its implementation `{reference}`: there is no module {module}"
    if not source:
        return None  # a compiled module: told when it runs
    top = ast.parse(source).body
    found = next((node for node in top if isinstance(node, ast.ClassDef) and node.name == name), None)
    if found is None:
        named = {each for node in ast.walk(ast.Module(top, [])) for each in _names(node)}
        return None if name in named else f"its implementation `{reference}`: the module has no {name}"
    own = {node.name for node in found.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    lacks = [method for method in methods if method not in own]
    return f"{name} lacks {', '.join(lacks)}()" if lacks and not found.bases else None


def _source(module: str) -> str | None:
    """Source of a module; empty where it has none, None where there is no such module."""
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    if loaded is None:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        file = spec.origin
    return FilePath(file).read_text(encoding="utf-8") if file and file.endswith(".py") else ""


def _names(node: ast.AST) -> Iterator[str]:
    """Names that a statement may bind: assigned, imported, defined."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.alias):
        yield (node.asname or node.name).partition(".")[0]
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name

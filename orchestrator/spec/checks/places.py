"""Places that cannot be used as what they are named for: clusters, data files, model folders, implementations."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path as FilePath
from typing import Any

from orchestrator import registry
from orchestrator.errors import ErrorDetail
from orchestrator.spec.base import Component
from orchestrator.spec.components import CompressorSpec, adds_for_good
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.model_facts import FAMILIES, read_config
from orchestrator.spec.yaml.node import Node, Path
from orchestrator.spec.yaml.validation_errors import Finding, error_at, unknown_name

_TABLES = (".parquet", ".csv", ".tsv", ".arrow", ".feather", ".xlsx", ".zip", ".tar", ".gz", ".zst")
_TRACKING = {"http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc"}
# What calls an implementation, and by which methods; docs/tutorials/ has one of each.
_METHODS = {"compressors": ("compress",), "data": ("rows",), "evaluate": ("run",)}


def check_cluster(root: Node) -> Iterator[ErrorDetail]:
    """Check the address (Ray Train needs a driver inside the cluster), the storage and the resources' names."""
    cluster = {key: node.plain() for key, node in root.entries("cluster").items()}
    address, resources = cluster.get("address"), cluster.get("resources_per_worker")
    path: Path = ("cluster", "address")
    if isinstance(address, str) and address.startswith("ray://"):
        message = "Ray Train does not run over Ray's client (ray://), whose driver stands outside the cluster"
        hint = "run on a machine of the cluster with `address: auto`"
        yield error_at(root, path, message, "null, auto, or HOST:PORT of a cluster", hint)
    storage, path = cluster.get("storage_path"), ("cluster", "storage_path")
    if isinstance(storage, str) and "://" in storage and not storage.startswith("s3://"):
        yield error_at(root, path, "no such storage", "a folder (local or NFS), or s3://bucket/prefix")
    elif isinstance(storage, str) and os.path.isfile(storage):
        yield error_at(root, path, "expected a folder, got a file", "a folder")
    for name, amount in resources.items() if isinstance(resources, dict) else ():
        path = ("cluster", "resources_per_worker", str(name))
        if (right := str(name).upper()) in ("CPU", "GPU") and name != right:
            message, allowed = f"Ray has no resource `{name}`", "CPU, GPU, or a name your cluster gave"
            yield error_at(root, path, message, allowed, f"write {right}")
        elif name == "GPU" and cluster.get("use_gpu") is False and isinstance(amount, int | float) and amount > 0:
            yield error_at(root, path, "use_gpu is false, and a worker asks for GPU", None, "drop one of the two")


def check_tracking(root: Node) -> Iterator[ErrorDetail]:
    """Check the address and the trackers: else everything would be trained and nothing recorded."""
    yield from _check_tracking_uri(root)
    also, path = root.at(("tracking", "also")), ("tracking", "also")
    named = also.plain() if also is not None and also.is_list else []
    known = registry.kinds(registry.TRACKERS)
    for index, name in enumerate(named):
        if name == "mlflow":
            yield error_at(root, (*path, index), "MLflow records everything anyway", hint="take it out")
        elif isinstance(name, str) and name not in known:
            yield error_at(root, (*path, index), f"there is no tracker `{name}`", *unknown_name(name, known))
        elif name in named[:index]:
            yield error_at(root, (*path, index), f"`{name}` stands here twice", hint="take one out")


def _check_tracking_uri(root: Node) -> Iterator[ErrorDetail]:
    """Check that MLflow supports the address' scheme."""
    path = ("tracking", "tracking_uri")
    node = root.at(path)
    if node is None or not isinstance(node.value, str) or node.value in ("databricks", "databricks-uc", "uc"):
        return
    if node.value.startswith("${env:"):
        return
    scheme = node.value.partition(":")[0].partition("+")[0].lower() if ":" in node.value else "file"
    allowed = "sqlite:///PATH/mlflow.db, http://HOST:PORT, ..."
    if scheme == "file":
        if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
            hint = "sqlite:///PATH/mlflow.db is one file; with MLFLOW_ALLOW_FILE_STORE=true set MLflow uses a folder"
            yield error_at(root, path, "MLflow no longer stores records in plain folders", allowed, hint)
    elif scheme not in _TRACKING and not entry_points(group="mlflow.tracking_store", name=scheme):
        write = f"write http://{node.value}" if "://" not in node.value else None
        yield error_at(root, path, f"MLflow does not support `{scheme}:` addresses", allowed, write)


def check_data(sets: Mapping[str, Any], notices: list[str]) -> Iterator[Finding]:
    """Check that rows are read from local files of a supported format; note files that do not exist yet."""
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
                yield Finding(path, "expected a file, got a folder", "a .json or .jsonl file")
            elif field == "image_folder" and os.path.isfile(value):
                yield Finding(path, "expected a folder, got a file", "a folder")
            elif not os.path.exists(value):
                notices.append(f"{'.'.join(path)}: {value} does not exist yet; it is checked again by `run`")


def check_columns(evaluate: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[Finding]:
    """Check that the data of each evaluation has the columns it needs, where that is known."""
    for name, evaluation in evaluate.items():
        given = data[evaluation.data].column_names() if evaluation.data in data else None
        missing = [] if given is None else [column for column in evaluation.columns if column not in given]
        if missing:
            of = f"data.{evaluation.data}"
            message = f"{evaluation.kind} needs {', '.join(missing)} of every row, which {of} does not give"
            names = ", ".join(evaluation.columns)
            hint = f"add `columns: [{names}]` to {of}, whose records have them; of hf_dataset `columns` maps each"
            yield Finding(("evaluate", name, "data"), message, None, hint)


def check_possible(evaluate: Mapping[str, Any]) -> Iterator[Finding]:
    """Check that this installation can do each evaluation."""
    for name, evaluation in evaluate.items():
        for field, message, hint in evaluation.faults():
            yield Finding(("evaluate", name, field), message, None, hint)


def check_model(model: ModelSpec, notices: list[str]) -> Iterator[Finding]:
    """Find folders that only look like a model's (an adapter, GGUF, a text model), and incomplete weights."""
    name = model.model_name_or_path
    path: tuple[str, ...] = ("model", "model_name_or_path")
    if os.path.isdir(name):
        found = [*_model_folder(path, FilePath(name)), *_not_vision_language(path, FilePath(name))]
        if not found:
            lacks = [what for what, files in _READERS.items() if not any((FilePath(name) / f).is_file() for f in files)]
            if lacks:
                text = f"there is no {' and no '.join(lacks)} in {name}; checked again by `run`"
                notices.append(f"{'.'.join(path)}: {text}")
        if not found and model.weights == "pretrained":
            found += _weight_files(path, FilePath(name), notices)
        yield from found
    if isinstance(model.weights, dict):
        for part, source in model.weights.items():
            path = ("model", "weights", part)
            if source.lower().endswith(".gguf"):
                yield Finding(path, _GGUF, "safetensors or PyTorch weights", _GGUF_HINT)
            elif part != "projector" and os.path.isdir(source):
                found = [*_model_folder(path, FilePath(source)), *_not_that_part(path, FilePath(source))]
                yield from found or _weight_files(path, FilePath(source), notices)


_GGUF = "GGUF holds quantised weights, which cannot be trained"
_GGUF_HINT = "use the original model that it was made from"
_IMAGES = ("vision", "visual", "image", "vq_config", "patch_size")  # in some key of every config that takes images
_READERS = {
    "tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json"),
    "image processor": ("processor_config.json", "preprocessor_config.json"),
}
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_LFS = b"version https://git-lfs"


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


def _not_vision_language(path: tuple[str, ...], folder: FilePath) -> Iterator[Finding]:
    """Find models of another kind by their config: they would fail when they are built."""
    config = read_config(str(folder))
    if config is None or "auto_map" in config:
        return  # unreadable, or code of its own
    kind = config.get("model_type")
    allowed = "an image-text-to-text model of transformers, such as llava-hf/llava-1.5-7b-hf"
    if not kind:
        yield Finding(path, "its config.json names no `model_type`", allowed)
    elif "mm_vision_tower" in config or "mm_projector_type" in config:
        hint = "take its converted weights: llava-hf/... on the hub"
        yield Finding(path, "this model is in LLaVA's own format, not in transformers'", allowed, hint)
    elif kind not in FAMILIES and "vocab_size" in config and not _takes_images(config):
        hint = "as a part it goes in `weights: {vision_tower: ..., projector: random, language_model: ...}`"
        yield Finding(path, f"`{kind}` is a model of text: its config.json has nothing of images", allowed, hint)


def _takes_images(config: Mapping[str, Any]) -> bool:
    return "auto_map" in config or any(word in key for key in config for word in _IMAGES)


def _not_that_part(path: tuple[str, ...], folder: FilePath) -> Iterator[Finding]:
    config = read_config(str(folder)) or {}
    if path[-1] == "vision_tower" and "vocab_size" in config and not _takes_images(config):
        kind = config.get("model_type", "it")
        yield Finding(
            path, f"`{kind}` is no vision tower: its config.json has nothing of images", "a CLIP, SigLIP, ..."
        )
    if path[-1] == "language_model" and config.get("is_encoder_decoder"):
        message = f"`{config.get('model_type')}` has an encoder and a decoder"
        yield Finding(path, message, "a causal language model, which is a decoder alone")


def _weight_files(path: tuple[str, ...], folder: FilePath, notices: list[str]) -> Iterator[Finding]:
    """Check that all weight files of the folder's index are present, and that none is a Git LFS pointer."""
    index = next(
        (folder / f"{name}.index.json" for name in _WEIGHTS if (folder / f"{name}.index.json").is_file()), None
    )
    files = {name for name in _WEIGHTS if (folder / name).is_file()}
    if index is not None and not files:
        try:
            files = set(json.loads(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            yield Finding(path, f"{index.name} cannot be read: it lists the weights by file", None, "download it again")
            return
    if not files:
        notices.append(f"{'.'.join(path)}: there are no weights in {folder}; checked again by `run`")
    if missing := sorted(str(name) for name in files if not (folder / str(name)).is_file()):
        message = f"{len(missing)} of {len(files)} files of its weights are missing: {', '.join(missing[:5])}"
        yield Finding(path, message, None, "finish the download: `hf download ID --local-dir FOLDER` resumes it")
    elif stubs := sorted(name for name in files if _starts(folder / name, _LFS)):
        message = f"{', '.join(stubs[:5])}: a pointer of Git LFS stands in the place of the weights"
        yield Finding(path, message, None, "`git lfs pull` in that folder fetches them")


def _starts(file: FilePath, beginning: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(beginning)) == beginning


def check_implementations(section: str, entries: Mapping[str, Any]) -> Iterator[Finding]:
    """Check that each component's `module:Class` exists, by the module's source, so that no framework is imported."""
    for name, entry in entries.items():
        for spec in entry if isinstance(entry, tuple) else (entry,):
            methods = _METHODS.get(section, ())
            if isinstance(spec, CompressorSpec) and adds_for_good(spec):
                methods = ("enter",)
            if isinstance(spec, Component) and (wrong := implementation_error(type(spec), methods)):
                place = f"{type(spec).__module__}.{type(spec).__name__}"
                hint = f'`implementation: ClassVar[str] = __name__ + ":CLASS"` in {place}'
                yield Finding((section, name, "kind"), f"`{spec.kind}` cannot run: {wrong}", None, hint)


def implementation_error(component: type[Any], methods: tuple[str, ...] = ()) -> str | None:
    """Return why what a spec class names as its implementation cannot be used; None where nothing speaks against it."""
    reference = getattr(component, "implementation", "")
    module, colon, name = reference.partition(":")
    if not (module and colon and name):
        return "its `implementation` names nothing" if not reference else f"`{reference}` is not MODULE:CLASS"
    source = _source(module)
    if source is None:
        return f"its implementation `{reference}`: there is no module {module}"
    if not source:
        return None  # a compiled module: reported when it runs
    top = ast.parse(source).body
    found = next((node for node in top if isinstance(node, ast.ClassDef) and node.name == name), None)
    if found is None:
        named = {each for node in ast.walk(ast.Module(top, [])) for each in _names(node)}
        return None if name in named else f"its implementation `{reference}`: the module has no {name}"
    own = {node.name for node in found.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    lacks = [method for method in methods if method not in own]
    return f"{name} lacks {', '.join(lacks)}()" if lacks and not found.bases else None


def _source(module: str) -> str | None:
    """Return the source of a module; empty where it has none, None where there is no such module."""
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
    """Return the names that a statement may bind: assigned, imported, defined."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.alias):
        yield (node.asname or node.name).partition(".")[0]
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name

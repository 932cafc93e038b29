"""What an experiment reads besides its own files: models and data, in folders or on the Hugging Face hub; its download.

All programs of a machine, or of a cluster with `HF_HOME` on a shared disk, read the hub's one cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import first_line
from orchestrator.spec.checks.places import check_model
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.loaded import LoadedExperiment
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.model_facts import hub_snapshot

READABLE = ("*.json", "*.jinja", "*.model", "*.txt")  # config, tokenizer and processor
# What transformers looks for, in this order; the first that is there is all that it reads.
_WEIGHTS = (
    ("model.safetensors", ("model.safetensors",)),
    ("model.safetensors.index.json", ("model-*.safetensors",)),
    ("pytorch_model.bin", ("pytorch_model.bin",)),
    ("pytorch_model.bin.index.json", ("pytorch_model-*.bin",)),
)


@dataclass(frozen=True)
class Source:
    """Something that an experiment reads.

    Attributes:
        key: The key that names it, `model.model_name_or_path`.
        name: A path or a hub id.
        kind: What it is.
        is_hub: Whether it is on the hub.
        revision: Branch, tag or commit on the hub.
        weights: Whether a model's weights are read, not only its config and processor.
        code: Whether code of the repository may run, which then is fetched too.
    """

    key: str
    name: str
    kind: Literal["model", "dataset"]
    is_hub: bool
    revision: str = "main"
    weights: bool = False
    code: bool = False

    def folder(self) -> Path | None:
        """Return where it lies on this machine, complete or not; None where nothing of it does."""
        if not self.is_hub:
            return Path(self.name) if os.path.exists(self.name) else None
        return hub_snapshot(self.name, self.revision, self.kind)

    def problem(self) -> str | None:
        """Return what of it is not on this machine; None where a run finds all."""
        folder = self.folder()
        if folder is None:
            return "not in the hub's cache" if self.is_hub else f"there is nothing at {self.name}"
        return self._incomplete(folder)

    def _incomplete(self, folder: Path) -> str | None:
        if self.kind == "dataset":
            return _incomplete_dataset(self) if self.is_hub else None
        if not folder.is_dir():
            return None  # one file of weights
        notices: list[str] = []
        findings = list(check_model(_as_folder(self, folder), notices))
        # They begin with the key of the folder.
        notices = [text.partition(": ")[2].partition("; checked again")[0] for text in notices]
        return next(iter([*(each.message for each in findings), *notices]), None)

    def download(self) -> str | None:
        """Fetch what is missing or newer on the hub, and return why that was not possible; None where all is there."""
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            patterns = None
            if self.kind == "model":
                about = HfApi().model_info(self.name, revision=self.revision)
                files = [each.rfilename for each in about.siblings or ()]
                patterns = [
                    *READABLE,
                    *(["*.py"] if self.code else ()),
                    *(_weight_files(files) if self.weights else ()),
                ]
            snapshot_download(self.name, repo_type=self.kind, revision=self.revision, allow_patterns=patterns)
        except (OSError, ValueError, HfHubHTTPError) as error:
            return _reason(self, error)
        except Exception as error:  # of the HTTP library, which differs by version
            if not type(error).__module__.startswith("httpx"):
                raise
            return _reason(self, error)
        return None


def sources_of(loaded: LoadedExperiment) -> list[Source]:
    """Return what the cells of an experiment read, and those of the experiments that it starts from, each once."""
    found: dict[tuple[str, str, str], Source] = {}
    for experiment in (loaded, *loaded.starts.values()):
        for spec in (experiment.spec, *(cell.spec for cell in experiment.cells)):
            for each in _sources(spec):
                place = (each.kind, each.name, each.revision)
                before = found.get(place, each)
                found[place] = replace(before, weights=before.weights or each.weights, code=before.code or each.code)
    return list(found.values())


def _sources(spec: ExperimentSpec) -> Iterator[Source]:
    model = spec.model
    yield _model("model.model_name_or_path", model.model_name_or_path, model, weights=model.weights == "pretrained")
    for part, name in model.weights.items() if isinstance(model.weights, dict) else ():
        if name != "random":
            # A part has no revision of its own.
            yield _model(f"model.weights.{part}", name, model.model_copy(update={"revision": None}), weights=True)
    for name, data in spec.data.items():
        if repo_id := getattr(data, "repo_id", None):
            yield Source(f"data.{name}", repo_id, "dataset", True, getattr(data, "revision", None) or "main")
        for field in data.path_fields:
            if isinstance(path := getattr(data, field, None), str):
                yield Source(f"data.{name}.{field}", path, "dataset", False)


def _model(key: str, name: str, model: ModelSpec, *, weights: bool) -> Source:
    is_hub = not os.path.isabs(name)  # paths were made absolute when the file was read
    return Source(key, name, "model", is_hub, model.revision or "main", weights, model.trust_remote_code)


def _as_folder(source: Source, folder: Path) -> ModelSpec:
    """Return a model section that reads the folder as the source is read."""
    part = source.key.rpartition(".")[2]
    if source.key.startswith("model.weights."):
        return ModelSpec.model_validate({"model_name_or_path": "a/b", "weights": {part: str(folder)}})
    weights = "pretrained" if source.weights else "random"
    return ModelSpec(model_name_or_path=str(folder), weights=weights)


def _incomplete_dataset(source: Source) -> str | None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(source.name, repo_type="dataset", revision=source.revision, local_files_only=True)
    except (OSError, ValueError) as error:
        return first_line(error)
    return None


def _weight_files(files: list[str]) -> list[str]:
    """Return the patterns of the weights that transformers reads of these files."""
    for named, patterns in _WEIGHTS:
        if named in files:
            return [named, *patterns]
    return ["*.safetensors", "*.bin"]


def _reason(source: Source, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    token = "each machine that fetches needs a token of somebody who may read it: HF_TOKEN, or `hf auth login`"
    if isinstance(error, GatedRepoError):
        return f"gated: its terms are to be accepted on its page, and {token}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no such {source.kind}, or it is private: {token}"
    if constants.HF_HUB_OFFLINE:
        return "the hub is not asked, since HF_HUB_OFFLINE is set"
    response: Any = getattr(error, "response", None)
    if response is not None:
        return f"the hub answers {response.status_code}: {first_line(error)}"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return f"the hub ({endpoint}) is not reached: {first_line(error.__cause__ or error)}"


def fetched(loaded: LoadedExperiment, *, download: bool) -> dict[str, Any]:
    """Return what the experiment reads, where it lies, and what of it is missing.

    Args:
        loaded: The experiment.
        download: Fetches what is on the hub first.

    Returns:
        `complete`, and `sources`: each with `key`, `name`, `kind`, `revision` and `commit` (null for a path), `folder`
        and `bytes` (null where nothing is there), `problem` (null where all is there).
    """
    sources = []
    for source in sources_of(loaded):
        refused = source.download() if download and source.is_hub else None
        problem = source.problem()
        folder = source.folder()
        sources.append(
            {
                "key": source.key,
                "name": source.name,
                "kind": source.kind,
                "revision": source.revision if source.is_hub else None,
                "commit": folder.name if folder is not None and source.is_hub else None,
                "folder": None if folder is None else str(folder),
                "bytes": None if folder is None else _size(folder),
                "problem": problem and (refused or problem),
            }
        )
    return {"complete": all(each["problem"] is None for each in sources), "sources": sources}


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(os.stat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(path) for name in names)

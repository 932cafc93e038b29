"""Keys that are valid but whose machinery is not built yet: `run` refuses them by name instead of ignoring them."""

from __future__ import annotations

from typing import Any

from orchestrator.errors import ErrorDetail
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.infrastructure import ClusterSpec
from orchestrator.spec.search import SearchSpec


def unsupported_keys(spec: Any, searching: bool = False) -> list[ErrorDetail]:
    """Return what `run`, or `search`, cannot do yet, one error a key.

    Args:
        spec: An `ExperimentSpec`, or a `LoadedExperiment`, whose cells are looked at as well.
        searching: The search itself is wanted; `run` refuses a file that holds one.
    """
    specs = [spec] if isinstance(spec, ExperimentSpec) else [spec.spec, *(cell.spec for cell in spec.cells)]
    sources: dict[str, str] = getattr(spec, "sources", {})
    found: dict[str, str] = {}
    seen: set[tuple[int, ...]] = set()
    for one in specs:
        key = (id(one.phases), id(one.evaluate))
        if key not in seen:
            seen.add(key)
            found.update(_keys_of(one, searching))
    return [_error(path, why, sources) for path, why in found.items()]


def _error(path: str, why: str, sources: dict[str, str]) -> ErrorDetail:
    place = next((place for key, place in sources.items() if key == path or key.startswith(f"{path}.")), "")
    file, _, line = place.rpartition(":")
    message = f"`{path}` is valid but {'not for this verb' if path == 'search' else 'not built yet'}: {why}"
    if line.isdigit():
        return ErrorDetail(message, file, int(line), 1, path=path)
    return ErrorDetail(message, path=path)


def _keys_of(spec: ExperimentSpec, searching: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    if spec.search is not None and searching:
        found.update({f"search.{key}": why for key, why in _search_keys(spec.search).items()})
    elif spec.search is not None:
        found["search"] = "`run` does grids; use `llavolta search`, or take it out"
    found.update({f"cluster.{key}": why for key, why in _cluster_keys(spec.cluster).items()})
    return found


def _search_keys(search: SearchSpec) -> dict[str, str]:
    found = {}
    if search.scheduler is not None:
        found["scheduler"] = "trials are not stopped early; take it out"
    if search.budget is not None:
        found["budget"] = "give num_trials"
    if search.constraints:
        found["constraints"] = "make it an objective, or choose from the front"
    if search.algorithm.kind == "grid":
        found["algorithm.kind"] = "a grid is a `matrix`, which `run` does"
    if search.algorithm.sampler == "nsga2" or search.algorithm.population_size is not None:
        found["algorithm"] = "generations would be lost when a search resumes; give sampler tpe or random"
    return found


def _cluster_keys(cluster: ClusterSpec) -> dict[str, str]:
    found = {}
    if not isinstance(cluster.num_workers, int):
        found["num_workers"] = "an elastic number of workers; give one number"
    return found

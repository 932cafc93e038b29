"""Keys that are valid but whose machinery is not built yet: `run` refuses them by name instead of ignoring them."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.errors import ErrorDetail
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.loaded import LoadedExperiment
from orchestrator.spec.yaml.node import Mark


def unsupported_keys(loaded: LoadedExperiment, searching: bool = False) -> list[ErrorDetail]:
    """Return what `run`, or `search`, cannot do yet, one error a key.

    Args:
        loaded: The experiment.
        searching: The search itself is wanted; `run` refuses a file that holds one.
    """
    errors = []
    for path, why in _unsupported(loaded.spec, searching):
        places = (place for key, place in loaded.sources.items() if key == path or key.startswith(f"{path}."))
        file, _, line = next(places, "").rpartition(":")
        message = f"`{path}` is valid but {'not for this verb' if path == 'search' else 'not built yet'}: {why}"
        mark = Mark(file, int(line), 1) if line.isdigit() else Mark(None)
        errors.append(ErrorDetail(message, *mark, path))
    return errors


def _unsupported(spec: ExperimentSpec, searching: bool) -> Iterator[tuple[str, str]]:
    search = spec.search
    if search is not None and not searching:
        yield "search", "`run` does grids; use `llavolta search`, or take it out"
    elif search is not None:
        if search.scheduler is not None:
            yield "search.scheduler", "trials are not stopped early; take it out"
        if search.budget is not None:
            yield "search.budget", "give num_trials"
        if search.constraints:
            yield "search.constraints", "make it an objective, or choose from the front"
        if search.algorithm.kind == "grid":
            yield "search.algorithm.kind", "a grid is a `matrix`, which `run` does"
        if search.algorithm.sampler == "nsga2" or search.algorithm.population_size is not None:
            yield "search.algorithm", "generations would be lost when a search resumes; give sampler tpe or random"
    if not isinstance(spec.cluster.num_workers, int):
        yield "cluster.num_workers", "an elastic number of workers; give one number"

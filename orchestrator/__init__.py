"""LLaVolta orchestrator: declarative experiments on stage-wise visual-token compression.

    import orchestrator as llv

    experiment = llv.load("experiments/quickstart.yaml")
    experiment.run()
    experiment.table().to_frame()

Importing it loads nothing else; each name below is imported when it is first used, and no torch, ray or mlflow before
work begins. Inside the package imports go one way, from the top of this list to its end:
cli > starter, llava_scripts, deployment > experiment > storage > search > run, bench > smoke > report > dispatch
> training, evaluation, tracking > models > machine, hub > data > compression > plan > spec > registry > errors.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.deployment import deploy as deploy
    from orchestrator.errors import Interrupted as Interrupted
    from orchestrator.errors import LlavoltaError as LlavoltaError
    from orchestrator.errors import SpecError as SpecError
    from orchestrator.errors import UsageError as UsageError
    from orchestrator.experiment import Cell as Cell
    from orchestrator.experiment import Experiment as Experiment
    from orchestrator.experiment import load as load
    from orchestrator.experiment import table as table
    from orchestrator.llava_scripts import import_llavolta as import_llavolta
    from orchestrator.models.export import load_exported as load_exported
    from orchestrator.report.documents import components as components
    from orchestrator.report.documents import compressors as compressors
    from orchestrator.run import RunOutcome as RunOutcome
    from orchestrator.spec.yaml.schema import experiment_schema as experiment_schema
    from orchestrator.starter import init as init
    from orchestrator.storage import Storage as Storage
    from orchestrator.testing.contract import check_file as check_file

__version__ = "0.1.0"
_HOMES = {
    **dict.fromkeys(("Cell", "Experiment", "load", "table"), "orchestrator.experiment"),
    **dict.fromkeys(("Interrupted", "LlavoltaError", "SpecError", "UsageError"), "orchestrator.errors"),
    **dict.fromkeys(("components", "compressors"), "orchestrator.report.documents"),
    "deploy": "orchestrator.deployment",
    "check_file": "orchestrator.testing.contract",
    "import_llavolta": "orchestrator.llava_scripts",
    "init": "orchestrator.starter",
    "load_exported": "orchestrator.models.export",
    "RunOutcome": "orchestrator.run",
    "Storage": "orchestrator.storage",
    "experiment_schema": "orchestrator.spec.yaml.schema",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

"""What lmms-eval finds by the entry point `lmms_eval.models`.

It looks while its models are imported, so this module imports nothing of it.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Return lmms-eval's `ModelManifest` of the model `llavolta`, an exported folder."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="llavolta", chat_class_path="orchestrator_plugins.benchmarks.model.Exported")

"""Keys that are valid but whose machinery is not built yet: they are refused by name instead of being ignored."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.errors import ErrorDetail
from orchestrator.spec.yaml.node import Node, Path, dotted
from orchestrator.spec.yaml.validation_errors import error_at


def check_unsupported(root: Node) -> Iterator[ErrorDetail]:
    """Check that no key asks for what is not built yet."""
    for path, why in _unsupported(root):
        yield error_at(root, path, f"`{dotted(path)}` is valid but not built yet: {why}")


def _unsupported(root: Node) -> Iterator[tuple[Path, str]]:
    workers = root.at(("cluster", "num_workers"))
    if workers is not None and workers.is_mapping:
        yield ("cluster", "num_workers"), "an elastic number of workers; give one number"

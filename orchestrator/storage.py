"""Storage: what a storage holds, whether it is intact, and what of it can go."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.plan.experiment_plan import prepare, reach_of, storage_path
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.inventory import Collector, damage, discard_damage, ledger_document
from orchestrator.report.console import print_garbage, print_ledger
from orchestrator.report.documents import Document
from orchestrator.spec.loaded import LoadedExperiment


class Storage:
    """The states, evaluations and records of experiments in one folder or bucket.

    Args:
        place: A folder, or `s3://bucket/prefix`; None takes $LLAVOLTA_STORAGE, or `./runs`.
        experiment: An experiment whose storage is meant, and which counts as recorded there.

    Raises:
        UsageError: the folder does not exist, or the address holds a password.
    """

    def __init__(self, place: str | os.PathLike[str] | None = None, experiment: LoadedExperiment | None = None) -> None:
        self._experiment = experiment
        path = storage_path(place if experiment is None else experiment.spec.cluster.storage_path)
        self._ledger = Ledger(path)
        if experiment is None and isinstance(path, Path) and not path.is_dir():
            raise UsageError(f"there is no storage at {self._ledger.storage}; name one, or an experiment file")

    def __repr__(self) -> str:
        return f"<Storage {self.url}>"

    @property
    def url(self) -> str:
        """Its address."""
        return self._ledger.url

    @property
    def folder(self) -> Path:
        """Its folder; of a bucket, the one on this machine that copies and logs lie in."""
        return self._ledger.storage

    def ls(self) -> Document:
        """Return the states, evaluations, failures and running work: size, age, the experiments that reach them.

        Raises:
            StorageError: the storage cannot be read.
        """
        return Document(ledger_document(self._ledger), print_ledger)

    def verify(self, *, discard: bool = False) -> list[dict[str, Any]]:
        """Read every byte of states, in-stage checkpoints and evaluations and return those that are damaged.

        Args:
            discard: Takes them out, so that the next run does them again.

        Raises:
            StorageError: the storage cannot be read or written.
        """
        found = damage(self._ledger)
        if discard:
            discard_damage(self._ledger, found)
        return found

    def gc(self, *, delete: bool = False, forget: Collection[str] = ()) -> Document:
        """Return what no recorded experiment reaches and what dead processes left behind.

        Args:
            delete: Deletes it; without, nothing is touched.
            forget: Names of recorded experiments that no longer count.

        Raises:
            UsageError: a name in `forget` is not recorded.
            StorageError: the storage cannot be read or written.
        """
        also = [reach_of(prepare(self._experiment))] if self._experiment is not None else []
        collector = Collector(self._ledger, also, forget, sure=delete)
        steps: list[dict[str, Any]] = []
        for step in collector.steps():
            gone = step.remove() if delete else False
            steps.append({"kind": step.kind, "name": step.name, "why": step.why, "bytes": step.size, "removed": gone})
        freed = sum(step["bytes"] for step in steps if step["removed"] or not delete)
        return Document(
            {"storage": self.url, "deleted": delete, "bytes": freed, "steps": steps},
            lambda document, console: print_garbage(document, console, has_records=collector.has_records),
        )

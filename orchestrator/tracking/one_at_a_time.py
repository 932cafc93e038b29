"""one_at_a_time(): of several drivers on one storage, one at a time makes the runs of an experiment."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator

from orchestrator.errors import StorageError, TrackingError
from orchestrator.plan.identity import digest
from orchestrator.plan.ledger.leases import Leases
from orchestrator.plan.ledger.store import Store

WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.2


@contextlib.contextmanager
def one_at_a_time(store: Store, experiment_name: str) -> Iterator[None]:
    """Holds a short lease on an experiment: two drivers that find no run of a cell would both make one.

    Args:
        store: Where the lease lies.
        experiment_name: What it is called in MLflow.

    Raises:
        TrackingError: the lease cannot be had, or another driver holds it for too long.
    """
    name = f"track-{digest(experiment_name)}"
    leases = Leases(store, f"tracker-{uuid.uuid4().hex[:12]}")
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while leases.acquire(name) is None:
            if time.monotonic() > deadline:
                raise TrackingError(f"another run is recording {experiment_name}; run again to send what it lacks")
            time.sleep(_POLL_SECONDS)
        try:
            yield
        finally:
            leases.forget(name)
    except StorageError as error:
        raise TrackingError(str(error)) from error
    finally:
        with contextlib.suppress(StorageError):  # it dies with this process
            leases.close()

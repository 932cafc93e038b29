"""Checkpoints inside a stage run: training waits for the copy alone; writing, hashing and sealing go on beside it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from orchestrator.plan.jobs import StageJob
from orchestrator.plan.ledger import Ledger
from orchestrator.training import distributed
from orchestrator.training.checkpoint import joined, take_checkpoint
from orchestrator.training.engine import Session
from orchestrator.training.metrics_log import MetricsLog

_Part = Callable[[], Any]


class CheckpointWriter:
    """Writes the checkpoints of one stage run, one at a time; every rank has one and calls it at the same steps.

    A checkpoint is made in parts that follow one another: each rank writes and hashes its files, one rank of every node
    hands over what lies there, rank 0 seals. A part runs in a thread of its rank. `advance` begins the next one, once
    all ranks know from a step's sums that none is busy: no thread takes part in a collective.

    Args:
        session: The model under training.
        job: The stage run.
        ledger: Takes the checkpoints.
        spool: The steps' metrics, on rank 0.
    """

    def __init__(self, session: Session, job: StageJob, ledger: Ledger, spool: MetricsLog | None) -> None:
        self._session, self._job, self._ledger, self._spool = session, job, ledger, spool
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._parts: Generator[_Part, list[Any], None] | None = None
        self._running: Future[Any] | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank is at work on a part."""
        return self._running is not None and not self._running.done()

    def begin(self, step: int) -> None:
        """Take the state after a step, and begin to write it; the checkpoint before it is finished first.

        Raises:
            StorageError: one of the two cannot be written.
            StaleWriterError: another driver has taken the job over.
        """
        self.finish()
        self._parts = self._written(step)
        self._run(next(self._parts))

    def advance(self) -> None:
        """Begin the next part of what is being written; every rank calls it once none is busy, or waits here.

        Raises:
            StorageError: a rank could not do its part.
            StaleWriterError: another driver has taken the job over.
        """
        if self._parts is None or self._running is None:
            return
        parts, running, self._parts, self._running = self._parts, self._running, None, None
        values = distributed.on_each_rank(running.result)
        try:
            self._run(parts.send(values))
            self._parts = parts
        except StopIteration:
            pass

    def finish(self) -> None:
        """Wait until what is being written is sealed; every rank calls it."""
        while self._parts is not None:
            self.advance()

    def close(self) -> None:
        """Wait for this rank's thread; what is not sealed then is lost. A rank whose training failed calls it alone."""
        self._threads.shutdown()

    def _run(self, part: _Part) -> None:
        self._running = self._threads.submit(part)

    def _written(self, step: int) -> Generator[_Part, list[Any], None]:
        """Yield the parts of one checkpoint; each is sent the values of all ranks."""
        folder = self._ledger.writing_folder(self._job.id) / f"step_{step:06d}"
        files = take_checkpoint(self._session, folder, self._job, step, copies=True)
        if self._spool is not None:
            self._spool.sync()  # the checkpoint relies on the steps before it
        known = joined((yield lambda: files.finish(folder)))
        on_first = distributed.node_rank() == distributed.rank()
        yield (lambda: self._ledger.share(folder, known)) if on_first else _nothing
        ledger, job = self._ledger, self._job.id
        yield (lambda: ledger.seal_checkpoint(job, step, folder, known)) if distributed.rank() == 0 else _nothing


def _nothing() -> None:
    """Do nothing: the part is another rank's."""

"""A search whose work is written into a real ledger without training: its proposals, session and budget are real."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ledger_work import finish
from rich.console import Console

from orchestrator.errors import TrackingError
from orchestrator.plan.experiment_plan import ExperimentPlan, prepare
from orchestrator.plan.jobs import EvaluationJob
from orchestrator.plan.trials import Trial, TrialNotes, search_id
from orchestrator.search.budget import most_trials
from orchestrator.search.search import SearchSession, updated
from orchestrator.search.tuning import LocalTuning
from orchestrator.tracking.upload_queue import UploadQueue


def by_state(job: EvaluationJob) -> float:
    """An accuracy that a state has, whoever asks: between 0 and 1, and as good as drawn at random."""
    return int(job.state[:8], 16) / 2**32


class Searched:
    """Does a search in a folder, as often as it is asked to.

    Args:
        file: The search.
        score: The accuracy of an evaluation; None where it measures none.

    Attributes:
        done: How often each job was done, by all drivers.
        said: What the last driver told its user.
    """

    def __init__(self, file: Path, score: Callable[[EvaluationJob], float | None] = by_state) -> None:
        self.file, self._score = file, score
        self.done: Counter[str] = Counter()
        self.said: list[str] = []

    def walk(self) -> ExperimentPlan:
        """The search as a new process finds it."""
        return prepare(self.file)

    def trials(self) -> list[Trial]:
        """What the ledger notes."""
        walk = self.walk()
        return TrialNotes(walk.ledger.store, search_id(walk.loaded)).read()

    def run(self, most_jobs: float = math.inf) -> ExperimentPlan:
        """Drives the search until it ends, or is killed after so many jobs; gives the plan it had then."""
        walk = self.walk()
        notes = TrialNotes(walk.ledger.store, search_id(walk.loaded))
        session = SearchSession(updated(walk, notes, self.said.append), notes, Console(quiet=True))
        session.view.say = self.said.append
        session._num_trials = max(0, most_trials(walk.loaded.spec) - session.num_ended)
        session.begin(LocalTuning(session.walk, session._num_trials))
        with UploadQueue(_no_tracking) as session._recorder:
            while not session.is_closed() and session.unmeasured is None:
                for job in session.newer_work() or ():
                    if most_jobs == 0:
                        return session.walk
                    most_jobs -= 1
                    self.done[job.id] += 1
                    if isinstance(job, EvaluationJob):
                        score = self._score(job)
                        metrics = {} if score is None else {"accuracy": score}
                        session.walk.ledger.write_evaluation(job.id, {"metrics": metrics, "seconds": 1.0})
                    else:
                        finish(session.walk.ledger, job)
                    session.on_event({"event": "finished", "id": job.id, "type": "", "attempt": 1})
        return session.walk


def _no_tracking() -> None:
    raise TrackingError("no server answers")

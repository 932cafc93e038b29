"""Ray Tune in a thread of the driver: it proposes trials and learns from their answers; the lanes train."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestrator.errors import StageRunError
from orchestrator.plan.walk import Walk
from orchestrator.search.desk import WAITING_RESOURCES, Desk, wait_for_answer

CLOSE_SECONDS = 30.0
# What Tune would otherwise print, or write for others to read; a snapshot of the experiment is of no use here.
_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "31536000",
    "TUNE_WARN_THRESHOLD_S": "31536000",
}


class Tuning:
    """A Tune experiment on the Ray this process is connected to, from `with` to the end of its block.

    Args:
        walk: The search with the trials known so far.
        num_trials: Trials to be proposed.
        concurrency: Trials that may wait side by side.
        folder: Tune's own folder; removed at the end, and what a killed driver left there before.
    """

    def __init__(self, walk: Walk, num_trials: int, concurrency: int, folder: Path) -> None:
        import ray

        from orchestrator.search.proposer import Proposer

        self._desk = ray.remote(num_cpus=0)(Desk).remote()
        self._proposer = Proposer(walk.loaded.spec, walk.trials, self._desk)
        self._num_trials, self._concurrency, self._folder = num_trials, concurrency, folder
        self._thread = threading.Thread(target=self._fit, name="tune", daemon=True)
        self._error: BaseException | None = None
        self._added: list[str] = []

    @property
    def ended(self) -> bool:
        """Whether every trial is answered.

        Raises:
            StageRunError: Tune itself gave up.
        """
        if self._error is not None:
            raise StageRunError(f"Ray Tune gave up: {type(self._error).__name__}: {self._error}") from self._error
        return not self._thread.is_alive()

    def take(self) -> list[dict[str, Any]]:
        """Trials proposed since the last call: `number`, `params`, `values`."""
        import ray

        found: list[dict[str, Any]] = ray.get(self._desk.take.remote())
        return found

    def answer(self, number: int, answer: Mapping[str, Any]) -> None:
        """Ends a trial: with its objectives, or with `failed` and the reason."""
        import ray

        ray.get(self._desk.answer.remote(number, dict(answer)))

    def __enter__(self) -> Tuning:
        from orchestrator.dispatch.ray_compat import keep_credentials_from_trials

        shutil.rmtree(self._folder, ignore_errors=True)
        self._added = [name for name in _ENVIRONMENT if name not in os.environ]
        os.environ.update({name: _ENVIRONMENT[name] for name in self._added})
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        keep_credentials_from_trials()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets the trials that wait go, so that Tune ends by itself while Ray is still there."""
        import ray

        self._proposer.closed = True
        ray.get(self._desk.close.remote())
        self._thread.join(CLOSE_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)
        for name in self._added:
            os.environ.pop(name, None)

    def _fit(self) -> None:
        try:
            self._tuner().fit()
        except BaseException as error:
            self._error = error

    def _tuner(self) -> Any:
        from ray import tune

        return tune.Tuner(
            tune.with_resources(wait_for_answer, WAITING_RESOURCES),
            tune_config=tune.TuneConfig(
                search_alg=self._proposer,
                num_samples=self._num_trials,
                max_concurrent_trials=self._concurrency,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(name="tune", storage_path=str(self._folder), verbose=0),
        )

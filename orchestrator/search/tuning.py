"""Ray Tune in a thread of the driver: it proposes trials and learns from their answers; the lanes train."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import optuna
import ray
from optuna.trial import FixedTrial, TrialState, create_trial
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from orchestrator.dispatch.driver import environment
from orchestrator.dispatch.ray.compat import keep_credentials_from_trials
from orchestrator.errors import StageRunError
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.plan.identity import canonical_json, digest
from orchestrator.plan.trials import Trial
from orchestrator.search.shared_work import SharedWork
from orchestrator.search.trial_mailbox import (
    EXCESS,
    FAILED,
    PROPOSAL,
    RUNG,
    WAITING_RESOURCES,
    Mailbox,
    wait_for_answer,
)
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.search_space import draw, grid, variant_layer_tokens

DRAWS = 64
"""Draws for one trial at most, where each was proposed before."""

CANDIDATES = 8
"""Recipes that are drawn for one trial where one of them is preferred."""

_WITH_VALUES = (TrialState.COMPLETE, TrialState.PRUNED)
_FIXED = "fixed_params"
"""Optuna's key for the parameters of an enqueued trial."""


class Proposer(OptunaSearch):
    """Proposes recipes, each a function of the seed, its number and the trials that ended before it.

    So a search that was stopped resumes as if it had not been. Trials that were proposed but not ended are
    proposed again first. A recipe that was proposed before is drawn anew, some times: a small space may have no other.

    Args:
        spec: The experiment, with its search.
        trials: What the ledger notes, by number.
        mailbox: Handle that every proposal carries.
        shared: Prices recipes, where the one that shares most is preferred.
    """

    def __init__(
        self, spec: ExperimentSpec, trials: Sequence[Trial], mailbox: Any, shared: SharedWork | None = None
    ) -> None:
        search = spec.search
        assert search is not None
        self._shared = shared
        self._search, self._layer_tokens = search, variant_layer_tokens(spec)
        self._sampler_seed = spec.seed if search.algorithm.seed is None else search.algorithm.seed
        self._mailbox = mailbox
        self._known: dict[str, int] = {}
        self.closed = False
        self._grid: list[tuple[dict[str, Any], dict[str, Any]]] | None = None
        if search.algorithm.kind == "grid":
            self._grid = list(grid(search, self._layer_tokens))
            Random(self._sampler_seed).shuffle(self._grid)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        super().__init__(
            self._propose,
            metric=list(search.objectives),
            mode=list(search.objectives.values()),
            sampler=self._sampler_for(0),
        )
        self._rebuild(trials)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next recipe, or Tune's word for an ended search."""
        if self.closed:
            return str(Searcher.FINISHED)
        waiting = self._ot_study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if waiting:
            self._ot_study.sampler = self._sampler_for(waiting[0].number)
        elif (drawn := self._drawn()) is not None:
            self._enqueue(*drawn)
        else:
            return str(Searcher.FINISHED)
        return super().suggest(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study; a trial that failed has no values there, one that was stopped has those at its rungs."""
        failed = error or not result or FAILED in result
        trial, stopped = self._ot_trials[trial_id], False
        for key, value in ({} if failed or result is None else result).items():
            if key.startswith(EXCESS):
                trial.set_constraint(key.removeprefix(EXCESS), value)
            elif key.startswith(RUNG):
                trial.report(value, int(key.removeprefix(RUNG)))
                stopped = True
        super().on_trial_complete(trial_id, None if failed or stopped else result, error=failed)

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: a search resumes from the ledger's notes."""

    def _propose(self, trial: Any) -> dict[str, Any]:
        values = draw(trial, self._search, self._layer_tokens)
        self._known.setdefault(canonical_json(values), trial.number)
        noted = self._ot_study.get_trials(deepcopy=False)[trial.number].system_attrs
        state = {key: value for key, value in noted.items() if key != _FIXED}
        found = {"number": trial.number, "params": dict(trial.params), "values": values, "sampler_state": state}
        return {**found, "mailbox": self._mailbox}

    def _enqueue(self, params: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Let the study ask for these parameters next: as `enqueue_trial`, which cannot take what a sampler noted."""
        self._ot_study.add_trial(create_trial(state=TrialState.WAITING, system_attrs={_FIXED: params, **state}))

    def _drawn(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return the parameters of the next trial and what the sampler noted; None where a grid has no other."""
        if self._grid is not None:
            left = (params for params, values in self._grid if canonical_json(values) not in self._known)
            return next(((params, {}) for params in left), None)
        if self._shared is None:
            return self._draw()[:2]
        states = {trial.number: trial.state for trial in self._ot_study.get_trials(deepcopy=False)}
        gone = (TrialState.FAIL, TrialState.PRUNED)  # what they would have trained is not there
        trained = [recipe for recipe, number in self._known.items() if states.get(number) not in gone]
        drawn = [self._draw(candidate) for candidate in range(CANDIDATES)]
        # One that was proposed before adds nothing, and would always be the cheapest.
        prices = [(recipe in self._known, self._shared.added(recipe, trained)) for *_, recipe in drawn]
        return drawn[prices.index(min(prices))][:2]

    def _draw(self, candidate: int = 0) -> tuple[dict[str, Any], dict[str, Any], str]:
        """Return the parameters of a recipe, what the sampler noted, and the recipe; a new one, if one is found."""
        trials = self._ot_study.get_trials(deepcopy=False)
        # Asked of a copy: what a study has drawn it keeps, also where it is not wanted.
        study = optuna.create_study(directions=self._ot_study.directions)
        study.add_trials(trials)
        for attempt in range(DRAWS):
            study.sampler = self._sampler_for(len(trials), attempt, candidate)
            trial = study.ask()
            recipe = canonical_json(draw(trial, self._search, self._layer_tokens))
            known = self._known.get(recipe)
            if known is None:
                break
            # It is told what came of that recipe, or it would insist on a part of the space that is used up.
            same = trials[known]
            # A generation counts its trials: to nsga2 one that failed is none.
            is_told = same.state in _WITH_VALUES and not self._search.algorithm.is_nsga2
            for name, excess in same.constraints.items() if is_told else ():
                trial.set_constraint(name, excess)
            for step, value in same.intermediate_values.items() if is_told else ():
                trial.report(value, step)
            values = same.values if same.state == TrialState.COMPLETE and is_told else None
            study.tell(trial, values, same.state if is_told else TrialState.FAIL)
        # Every attempt was of the same generation.
        first = study.get_trials(deepcopy=False)[len(trials)]
        return dict(trial.params), dict(first.system_attrs) if self._search.algorithm.is_nsga2 else {}, recipe

    def _sampler_for(self, number: int, attempt: int = 0, candidate: int = 0) -> Any:
        drawn = {"seed": self._sampler_seed, "number": number, "attempt": attempt}
        seed = int(digest({**drawn, "candidate": candidate} if candidate else drawn)[:8], 16)
        algorithm = self._search.algorithm
        if "random" in (algorithm.kind, algorithm.sampler) or attempt >= DRAWS // 2:
            return optuna.samplers.RandomSampler(seed=seed)
        if algorithm.is_nsga2:
            size = {} if algorithm.population_size is None else {"population_size": algorithm.population_size}
            return optuna.samplers.NSGAIISampler(seed=seed, **size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `group`, which conditional spaces need, is called experimental
            return optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed)

    def _rebuild(self, trials: Sequence[Trial]) -> None:
        """Rebuild the study under the notes' numbers; one without a note (a driver died in between) is drawn anew."""
        noted = {trial.number: trial for trial in trials}
        for number in range(max(noted, default=-1) + 1):
            trial = noted.get(number)
            if trial is not None:
                self._known.setdefault(canonical_json(trial.values), number)
            if trial is None:
                self._enqueue({}, {})
            elif trial.state == "proposed":
                self._enqueue(trial.params, trial.sampler_state)
            else:
                self._ot_study.add_trial(self._ended(trial))

    def _ended(self, trial: Trial) -> Any:
        again = FixedTrial(trial.params)
        draw(again, self._search, self._layer_tokens)
        told = {"params": trial.params, "distributions": again.distributions, "system_attrs": trial.sampler_state}
        if trial.state == "failed":
            return create_trial(state=TrialState.FAIL, **told)
        if trial.state == "stopped":
            steps = trial.rung_steps()
            return create_trial(state=TrialState.PRUNED, values=[steps[max(steps)]], intermediate_values=steps, **told)
        values = [trial.objectives[name] for name in self._search.objectives]
        return create_trial(values=values, constraints=trial.excess, **told)


def _proposer(walk: ExperimentPlan, mailbox: Any) -> Proposer:
    spec = walk.loaded.spec
    assert spec.search is not None
    shared = SharedWork(walk.loaded) if spec.search.algorithm.prefer_shared else None
    return Proposer(spec, walk.trials, mailbox, shared)


CLOSE_SECONDS = 30.0
# What Tune would otherwise print, or write for others to read; a snapshot of the experiment is of no use here.
_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "31536000",
    "TUNE_WARN_THRESHOLD_S": "31536000",
}


@contextlib.contextmanager
def run_tuning(walk: ExperimentPlan, num_trials: int, concurrency: int, folder: Path) -> Iterator[Tuning]:
    """Run a Tune experiment, on the Ray this process is connected to, for the length of a `with` block.

    Args:
        walk: The search with the trials known so far.
        num_trials: Trials to be proposed.
        concurrency: Trials that may wait side by side.
        folder: Tune's own folder; removed at the end, and what a killed driver left there before.
    """
    shutil.rmtree(folder, ignore_errors=True)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    keep_credentials_from_trials()
    with environment(_ENVIRONMENT, keep=True):
        tuning = Tuning(walk, num_trials, concurrency, folder)
        try:
            yield tuning
        finally:
            tuning.close()
            shutil.rmtree(folder, ignore_errors=True)


class LocalTuning:
    """The same proposals without Ray, one after the other, in the driver's own thread.

    Args:
        walk: The search with the trials known so far.
        num_trials: Trials to be proposed.
    """

    def __init__(self, walk: ExperimentPlan, num_trials: int) -> None:
        self._proposer = _proposer(walk, None)
        self._left = num_trials
        self._open: dict[int, str] = {}

    @property
    def ended(self) -> bool:
        """Whether every trial is answered, and none will come."""
        return not self._open and self._left == 0

    def take(self) -> list[dict[str, Any]]:
        """Return the next proposal once the last one is answered."""
        if self._open or self._left == 0:
            return []
        self._left -= 1
        name = str(self._left)
        proposal = self._proposer.suggest(name)
        if not isinstance(proposal, dict):
            self._left = 0
            return []
        self._open[proposal["number"]] = name
        return [{key: proposal[key] for key in PROPOSAL}]

    def answer(self, number: int, answer: Mapping[str, Any]) -> None:
        """End a trial, as `Tuning.answer` does."""
        self._proposer.on_trial_complete(self._open.pop(number), dict(answer))

    def stop(self) -> None:
        """Propose nothing more."""
        self._left = 0


class Tuning:
    """A Tune experiment in a thread; arguments are those of `run_tuning`."""

    def __init__(self, walk: ExperimentPlan, num_trials: int, concurrency: int, folder: Path) -> None:
        self._mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
        self._proposer = _proposer(walk, self._mailbox)
        self._num_trials, self._concurrency, self._folder = num_trials, concurrency, folder
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, name="tune", daemon=True)
        self._thread.start()

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
        """Return the trials proposed since the last call: the keys of `PROPOSAL`."""
        found: list[dict[str, Any]] = ray.get(self._mailbox.take.remote())
        return found

    def answer(self, number: int, answer: Mapping[str, Any]) -> None:
        """End a trial: with its objectives, or with `failed` and the reason."""
        ray.get(self._mailbox.answer.remote(number, dict(answer)))

    def stop(self) -> None:
        """Propose nothing more; what was proposed may still be answered."""
        self._proposer.closed = True

    def close(self) -> None:
        """Let the trials that wait go, so that Tune ends by itself while Ray is still there."""
        self.stop()
        ray.get(self._mailbox.close.remote())
        self._thread.join(CLOSE_SECONDS)

    def _fit(self) -> None:
        try:
            self._tuner().fit()
        except BaseException as error:
            self._error = error

    def _tuner(self) -> Any:
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

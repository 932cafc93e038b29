"""One task of lmms-eval on a model: its evaluator asks, every rank answers, its code scores."""

from __future__ import annotations

import json
import math
import os
import random
import re
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from orchestrator_plugins.benchmarks import tasks, templates
from orchestrator_plugins.benchmarks.model import Answers, Model, SimpleModel, Stopped, reading_of
from orchestrator_plugins.benchmarks.spec import LmmsEvalSpec
from orchestrator_plugins.benchmarks.suites import SCORES, Score

from orchestrator import plugin

_CHOICES = {"multiple_choice", "loglikelihood"}
_UNJUDGED = ("", "Failed Request")
"""What lmms-eval's tasks write in place of the judge's name where it did not reply."""
_KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY")
_TIME = re.compile(r"[-_]?\d{4}-?\d{2}-?\d{2}[-_T]?\d{2}-?\d{2}-?\d{2}")
_ILLEGAL = re.compile(r"[^A-Za-z0-9_. /-]")


class LmmsEval:
    """Runs a task through lmms-eval's `simple_evaluate`."""

    def __init__(self, spec: LmmsEvalSpec) -> None:
        self._spec = spec

    def run(self, model: Any, data: plugin.EvaluationData, workers: plugin.Workers) -> plugin.Outcome:
        """Return lmms-eval's metrics under its names, its records of all questions, and the files that it wrote.

        The first rank runs the evaluator; all ranks answer, so that the result does not depend on their number.

        Raises:
            StageRunError: the task cannot be evaluated: its data is not there, its judge does not reply.
        """
        spec = self._spec
        encoder = plugin.Encoder(data.processor, str(spec.conversation_template), data.encoder.model_max_length)
        reading = reading_of(spec.image_aspect_ratio)
        answers = Answers(model, replace(data, encoder=encoder), reading, spec.batch_size, workers)
        if workers.rank > 0:
            found: plugin.Outcome = answers.serve()
            return found
        ended: Any
        try:
            with _apart(answers), TemporaryDirectory(prefix="llavolta-lmms-eval-") as folder:
                ended = self._evaluated(answers, Path(folder), data)
        except Stopped:
            ended = plugin.Outcome({}, 0)
        except (Exception, SystemExit) as error:  # tasks end the process where a file is missing
            ended = error if isinstance(error, plugin.StageRunError) else self._error(error)
            ended.__cause__ = error if ended is not error else error.__cause__
        answers.end(ended if isinstance(ended, BaseException) else replace(ended, predictions=[], files={}))
        outcome: plugin.Outcome = ended
        return outcome

    def _error(self, error: BaseException) -> plugin.StageRunError:
        """Return why a task failed: what was behind lmms-eval's own retries."""
        attempt = getattr(error, "last_attempt", None)
        cause = attempt.exception() if attempt is not None else error
        text = " ".join(str(cause).split()) or type(cause).__name__
        hint = ""
        if isinstance(cause, OSError):
            hint = "; its data is looked for in the working directory, then in Hugging Face's cache and hub"
        return plugin.StageRunError(
            f"lmms-eval, task {self._spec.tasks[0]}: {type(cause).__name__}: {text[:600]}{hint}"
        )

    def _evaluated(self, answers: Any, folder: Path, data: plugin.EvaluationData) -> plugin.Outcome:
        from lmms_eval import evaluator

        spec, name = self._spec, self._spec.tasks[0]
        score = SCORES.get(name, Score(""))
        if score.judged and not any(map(os.environ.get, _KEYS)):
            raise plugin.StageRunError(
                f"lmms-eval, task {name}: a language model scores its answers, and {' and '.join(_KEYS)} are not set; "
                "without one every answer would count as wrong"
            )
        places, added = tasks.sources([name], spec.include_path, folder / "tasks")
        manager = _manager(places, score.left_out)
        adapter = _model_class(manager, name)(answers)
        if data.trial:
            return _tried(adapter, manager, name)
        output = folder / "output"
        output.mkdir()
        for name_of_call in ("get_git_commit_hash", "get_git_branch_name", "get_lmms_eval_version_string"):
            setattr(evaluator, name_of_call, lambda: None)  # they start git in the working directory
        found = evaluator.simple_evaluate(
            model=adapter, tasks=[name], task_manager=manager, batch_size=spec.batch_size, limit=spec.limit,
            bootstrap_iters=0, log_samples=True, random_seed=None, numpy_random_seed=None, torch_random_seed=None,
            cli_args=Namespace(output_path=str(output), process_with_media=False, reasoning_tags=None),
        )  # fmt: skip
        records = _records(found["samples"], adapter.pictures)
        _check_judged(records, name)
        files = {_TIME.sub("", path.name): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}
        metrics = _metrics(found["results"], name)
        if not metrics and files:
            metrics = {"submitted": float(len(records))}
        if not metrics or (score.metric not in ("", "accuracy") and score.metric not in metrics):
            wanted = f"{score.metric}" if score.metric else "any score"
            raise plugin.StageRunError(f"lmms-eval, task {name}: it did not give {wanted}; its log says why")
        fingerprint = {
            "toolkit": tasks.toolkit(),
            "task": ", ".join(f"{task} {number}" for task, number in sorted(found["versions"].items())),
            "definitions": f"llavolta {templates.VERSION}" if added else "lmms-eval",
        }
        outcome = plugin.outcome_of(metrics, records)
        return replace(outcome, files=files, fingerprint=fingerprint)


def _manager(places: list[str], left_out: Iterable[str]) -> Any:
    """Return lmms-eval's index of the tasks in some folders, without metrics that are not taken."""
    from lmms_eval.tasks import TaskManager

    class Tasks(TaskManager):
        def _get_config(self, name: str) -> Any:
            config = super()._get_config(name)
            if metrics := config.get("metric_list"):
                config["metric_list"] = [each for each in metrics if each.get("metric") not in left_out]
            return config

    return Tasks("ERROR", include_path=places, include_defaults=False, model_name="llavolta")


def _model_class(manager: Any, name: str) -> Any:
    """Return the class for a task's requests: lmms-eval compares given answers in its older form only."""
    kinds = _output_types(manager, name)
    if not kinds & _CHOICES:
        return Model
    if kinds <= _CHOICES:
        return SimpleModel
    raise plugin.StageRunError(
        f"lmms-eval, group {name}: it holds tasks that generate and tasks that compare given answers; name them one by "
        "one"
    )


def _output_types(manager: Any, name: str) -> set[str]:
    config = manager._get_config(name)
    members = config.get("task")
    if not isinstance(members, list):
        return {str(config.get("output_type", "generate_until"))}
    names = [str(each["task"] if isinstance(each, dict) else each) for each in members]
    return {kind for each in names if each != name for kind in _output_types(manager, each)}


def _tried(adapter: Any, manager: Any, name: str) -> plugin.Outcome:
    """Answer a task's first question, and score nothing."""
    from lmms_eval.evaluator_utils import get_task_list
    from lmms_eval.tasks import get_task_dict

    kind = "simple" if adapter.is_simple else "chat"
    task = get_task_list(get_task_dict([name], manager, kind))[0].task
    adapter.task_dict[task.config.task] = task.dataset
    task.build_all_requests(limit=1, rank=0, world_size=1)
    getattr(adapter, task.instances[0].request_type)(task.instances[:1])
    return plugin.Outcome({"tried": 1.0}, 1)


def _metrics(results: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, float]:
    """Return the figures of a task, and of a group's members under `MEMBER/`, without lmms-eval's standard errors.

    NaN stays, so that the evaluation fails by it.
    """
    found: dict[str, float] = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or "_stderr" in metric:
                continue
            label = ("" if task == name else f"{task}/") + (metric if kind == "none" else f"{metric}_{kind}")
            parts = value if isinstance(value, dict) else {"": value}
            for part, number in parts.items():
                if isinstance(number, bool | int | float | np.number):
                    found[_ILLEGAL.sub("_", f"{label}_{part}" if part else label)] = float(number)
    return found


def _records(
    samples: Mapping[str, list[dict[str, Any]]], pictures: Mapping[tuple[str, int], tuple[str, ...]]
) -> list[dict[str, Any]]:
    """Return what is kept of every question: the answer, what lmms-eval made of it, and which pictures it is about."""
    found: list[dict[str, Any]] = []
    for task, records in samples.items():
        for record in sorted(records, key=lambda each: each["doc_id"]):
            known = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash"}
            scores = {key: value for key, value in record.items() if key not in known | {"input_media"}}
            single = next((number for value in scores.values() if (number := _number(value)) is not None), None)
            answer = record["filtered_resps"][0] if record["filtered_resps"] else ""
            texts = [each for each in record["arguments"] if isinstance(each, str)]
            found.append(
                {
                    "row": len(found), "task": task, "question": texts[0] if texts else "",
                    "expected": record["target"] if isinstance(record["target"], str) else str(record["target"]),
                    "answer": answer if isinstance(answer, str) else str(answer),
                    **({} if single is None else {"score": single}),
                    "images": list(pictures.get((task, record["doc_id"]), ())),
                    "doc_id": record["doc_id"], "doc_hash": record["doc_hash"],
                    "scores": json.loads(json.dumps(scores, default=str)),
                }
            )  # fmt: skip
    return found


def _number(value: Any) -> float | None:
    """Return a question's score: a number, or a mapping's `score`."""
    if isinstance(value, Mapping):
        value = value.get("score")
    is_number = isinstance(value, bool | int | float | np.number) and math.isfinite(value)
    return float(value) if is_number else None


def _check_judged(records: list[dict[str, Any]], name: str) -> None:
    """Check that a judge replied to every question.

    Raises:
        StageRunError: it did not; lmms-eval counts such answers as wrong.
    """
    unjudged = [
        record["row"]
        for record in records
        if any(
            isinstance(each, dict) and each.get("eval_model", "?") in _UNJUDGED for each in record["scores"].values()
        )
    ]
    if unjudged:
        some = ", ".join(map(str, unjudged[:5]))
        raise plugin.StageRunError(
            f"lmms-eval, task {name}: the judge did not reply to {len(unjudged)} of {len(records)} answers (row {some}"
            "), which would count as wrong; see to its key and address (OPENAI_API_KEY, OPENAI_API_URL) and run again"
        )


@contextmanager
def _apart(answers: Any) -> Iterator[None]:
    """Keep what lmms-eval changes in the process from what runs after it.

    Importing it lets Pillow read truncated images and raises the time limit of process groups; it seeds nothing here,
    but tasks may draw. It asks the environment for ranks, of which it sees one, and no process group.
    """
    from PIL import ImageFile
    from torch.distributed import distributed_c10d

    truncated, patience = ImageFile.LOAD_TRUNCATED_IMAGES, distributed_c10d.default_pg_timeout
    drawn = random.getstate(), np.random.get_state(), torch.get_rng_state()
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    before = {key: os.environ.get(key) for key in ranks}
    initialized = torch.distributed.is_initialized
    os.environ.update(ranks)
    torch.distributed.is_initialized = lambda: answers.is_busy and initialized()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        torch.distributed.is_initialized = initialized
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
        ImageFile.LOAD_TRUNCATED_IMAGES, distributed_c10d.default_pg_timeout = truncated, patience
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        torch.set_rng_state(drawn[2])

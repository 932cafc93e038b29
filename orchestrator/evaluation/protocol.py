"""The interface of evaluations: what an implementation gets and returns."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from orchestrator.data.processing.encode import Encoder
from orchestrator.data.processing.processor import VisionTextProcessor
from orchestrator.data.records.row_index import num_words
from orchestrator.data.rows import Row
from orchestrator.errors import DataError
from orchestrator.spec.components import EvaluationSpec

_Result = TypeVar("_Result")
EXAMPLES = 20
_LEGAL = re.compile(r"[A-Za-z0-9_. /-]+")
"""What MLflow allows in the name of a metric; `:` is left out, which Windows cannot store."""


@dataclass(frozen=True)
class Workers:
    """The ranks that share an evaluation; one where there is no process group.

    Attributes:
        rank: This one.
        count: How many there are.
        in_step: Each holds a share of the model, so that all of them run it on the same rows at the same time.
    """

    rank: int = 0
    count: int = 1
    in_step: bool = False

    @classmethod
    def here(cls) -> Workers:
        """Return this process's rank and world size in the default process group, or a single worker."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def device(self) -> torch.device:
        """This rank's device; `cluster.use_gpu: false` means a group without NCCL, or `DS_ACCELERATOR=cpu`."""
        in_group = dist.is_available() and dist.is_initialized()
        without = os.environ.get("DS_ACCELERATOR") == "cpu" or (in_group and "nccl" not in dist.get_backend())
        if without or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    @property
    def leads_node(self) -> bool:
        """Whether this is the first rank of its node."""
        return int(os.environ.get("LOCAL_RANK", self.rank)) == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the ranks, on every rank."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: list[Any]) -> list[Any]:
        """Return the joined lists of all ranks, on every rank."""
        if self.count == 1:
            return values
        lists: list[list[Any]] = [[] for _ in range(self.count)]
        dist.all_gather_object(lists, values)
        return [value for one in lists for value in one]

    def divide(self, rows: Sequence[Row], work: Callable[[list[Row]], Sequence[_Result]]) -> list[_Result]:
        """Return what `work` gives for each row, in the order of the rows, on every rank.

        Every rank calls it, and works on every n-th of the rows by length, so that all end at about the same time.
        Where they run the model in step, each works on all rows, and what the first one found counts.

        Args:
            rows: All rows.
            work: Returns a result for each of the rows it gets, in their order.

        Raises:
            Exception: of any kind, on every rank: the first that `work` raised on one.
        """
        mine = num_words(rows).argsort(kind="stable").tolist()
        if not self.in_step:
            mine = mine[self.rank :: self.count]
        failed: list[Exception] = []
        found: list[tuple[int, _Result]] = []
        try:
            found = list(zip(mine, work([rows[i] for i in mine]), strict=True))
        except Exception as error:  # of any kind: no rank may wait for one that failed
            failed.append(error)
        if all_failed := self.gather(failed):
            raise failed[0] if failed else all_failed[0]
        counts = found if self.rank == 0 or not self.in_step else []
        return [result for _, result in sorted(self.gather(counts), key=lambda pair: pair[0])]


@dataclass(frozen=True)
class EvaluationData:
    """Held-out rows, and the encoder and processor for their prompts.

    Attributes:
        rows: The rows.
        encoder: Encodes rows as prompts.
        processor: The model's processor.
        should_stop: Asked between batches; once true, an evaluation may skip the remaining rows and return: its outcome
            is discarded, and the next run evaluates again.
        trial: A try on a single row before training, whose outcome is discarded: what only a whole set has (both
            questions of a pair, rows of each answer) may be missing.
        identity: What tells this evaluation of this state from all others; what an attempt cannot have again for
            nothing may be kept under it, until it is done. Empty in a trial.
        in_step: All ranks run the model at the same time, as `Workers.in_step` says.
    """

    rows: Sequence[Row]
    encoder: Encoder
    processor: VisionTextProcessor
    should_stop: Callable[[], bool] = lambda: False
    trial: bool = False
    identity: str = ""
    in_step: bool = False

    def ends_here(self) -> bool:
        """Return `should_stop`, of any rank where they run in step; asked by all of them before each batch."""
        asked = self.should_stop()
        if self.in_step:
            workers = Workers.here()
            asked = bool(workers.sum(torch.tensor([int(asked)], device=workers.device)).item())
        return asked


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found, the same on every rank.

    Attributes:
        metrics: Name to value; tracked as `eval/<name>/<metric>`.
        num_samples: Rows tested.
        examples: A few predictions, kept beside the metrics.
        predictions: All of them, in the order of the rows: `prediction` makes one, further keys are kept as well.
        fingerprint: What of the evaluation's fingerprint is otherwise than usual, or more: `toolkit`, `task`, `prompt`
            of another toolkit. JSON values; a table flags cells in which one differs.
        notices: What a reader of the scores should know, in sentences: a table shows them with the cells' names.
        files: What goes elsewhere, such as a benchmark's submission: file name to content; artifacts of the run.
    """

    metrics: dict[str, float]
    num_samples: int
    examples: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    files: dict[str, bytes] = field(default_factory=dict)


def metric_problem(metrics: Any) -> str | None:
    """Return what is wrong with an outcome's metrics, which go to the ledger as JSON and to MLflow; None if nothing."""
    if not isinstance(metrics, dict) or not metrics:
        return f"metrics is {metrics!r:.80}; give at least one, the headline first"
    for name, value in metrics.items():
        if not isinstance(name, str) or not _LEGAL.fullmatch(name):
            return f"{name!r} is no name of a metric; use letters, digits, `_`, `-`, `.`, `/` and blanks"
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return f"{name} is {value!r}; give a finite Python number (leave out what has no rows: 0 / 0)"
    return None


def headline_problem(spec: type[EvaluationSpec], metrics: Mapping[str, float]) -> str | None:
    """Return which names of an evaluation's own headline are no metric of it, as far as its metrics say; else None."""
    if spec.headline == EvaluationSpec.headline:
        return None
    known = [*metrics, *(spec.metric_names or ())]
    missing = [name for name in spec.headline if not any(fnmatchcase(name, one) for one in known)]
    return f"headline names {', '.join(missing)}; its metrics are {', '.join(known)}" if missing else None


def prediction(row: Row, answer: str, expected: str, right: bool) -> dict[str, Any]:
    """Return an answer beside its row's last question, the right answer and the row's pictures (`pictures_of`)."""
    question = next((turn.text for turn in reversed(row.turns) if turn.role == "user"), "")
    said = {"row": row.index, "question": question, "expected": expected, "answer": answer, "right": right}
    return {**said, **pictures_of(row)}


def pictures_of(row: Row) -> dict[str, Any]:
    """Return `images`, the paths of a row's images, and `videos` where it has some: of each `path`, and `num_frames`
    and `fps` by which its frames are taken.
    """
    found: dict[str, Any] = {"images": [image.path for image in row.images if not image.video]}
    videos = [
        {"path": image.path, "num_frames": image.reading.num_frames, "fps": image.reading.fps}
        for image in row.images
        if image.video
    ]
    return found | ({"videos": videos} if videos else {})


def outcome_of(metrics: dict[str, float], predictions: list[dict[str, Any]]) -> Outcome:
    """Return the outcome of predictions of all rows: the first 20 are its examples, without the paths of pictures."""
    examples = [{key: each[key] for key in each if key not in ("images", "videos")} for each in predictions[:EXAMPLES]]
    return Outcome(metrics, len(predictions), examples, predictions)


def mean_scores(name: str, scores: Sequence[float], rows: Sequence[Row]) -> dict[str, float]:
    """Return the mean of the rows' scores as `name`, and as `name_TYPE` those of the rows of each answer type."""
    groups: dict[str, list[float]] = {name: list(scores)}
    for row_type in sorted({row.answer_type for row in rows if row.answer_type is not None}):
        of_type = [score for row, score in zip(rows, scores, strict=True) if row.answer_type == row_type]
        groups[f"{name}_{row_type}"] = of_type
    return {name: math.fsum(some) / len(some) for name, some in groups.items() if some}


def last_answer(row: Row) -> str:
    """Return the right answer of a row: its assistant's last turn.

    Raises:
        DataError: it has none.
    """
    for turn in reversed(row.turns):
        if turn.role == "assistant":
            return turn.text
    raise DataError(f"row {row.index}: no answer to compare with")


def text_column(row: Row, name: str) -> list[str]:
    """Return a column that is a list of texts, or as in VQA's annotations of mappings with an `answer`.

    Raises:
        DataError: the row does not have it, or it is something else.
    """
    value = row.columns.get(name)
    if isinstance(value, list) and value:
        texts = [one.get("answer") if isinstance(one, dict) else one for one in value]
        if len(found := [text for text in texts if isinstance(text, str)]) == len(texts):
            return found
    told = "is missing" if value is None else f"is {str(value)[:60]!r}"
    raise DataError(f"row {row.index}: `{name}` {told}; it is a list of texts, which the data's `columns` names")


class Evaluation(Protocol):
    """What `EvaluationSpec.implementation` names: a class built with the spec. Every rank calls `run`.

    Where not any row will do (answers are yes or no, rows come in pairs), it also has a static method `example_rows`,
    which makes rows that it takes of the contract kit's.
    """

    def __init__(self, spec: EvaluationSpec) -> None: ...

    def run(self, model: Any, data: EvaluationData, workers: Workers) -> Outcome:
        """Test a model in evaluation mode, its compressor attached, on this rank's share of the rows."""
        ...

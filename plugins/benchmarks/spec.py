"""`lmms_eval`: any task of lmms-eval, or a suite of them, through its own evaluator."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from orchestrator_plugins.benchmarks import tasks
from orchestrator_plugins.benchmarks.suites import AVERAGES, SCORES, SUITES, average, retained
from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from orchestrator import plugin

Template = Literal["plain", "vicuna_v1", "chat_template"]


class LmmsEvalSpec(plugin.EvaluationSpec):
    """Tasks of lmms-eval on its own data, scored by its own code, under the cell's compressor.

    Each task is an evaluation of its own: kept, resumed and repeated alone. Its metrics have lmms-eval's names, after
    the task's: `eval/NAME/gqa/exact_match`. Answers are greedy; a task that asks for sampling is refused. Where a
    server scores, the submission becomes an artifact of the run, and `llavolta record` takes the score.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.benchmarks.evaluation:LmmsEval"
    path_fields: ClassVar[tuple[str, ...]] = ("include_path",)
    not_identity: ClassVar[frozenset[str]] = frozenset({"batch_size", "suite", "average"})

    kind: Literal["lmms_eval"] = "lmms_eval"
    # Narrower than the base's name of a data set, which mypy takes for a mistake: there is none to name here.
    data: None = Field(default=None)  # type: ignore[assignment]
    """Nothing: a task brings its own data."""
    tasks: Annotated[tuple[str, ...], Field(examples=[["gqa", "pope"]])] = ()
    """Names of tasks and groups of lmms-eval, or of those under `include_path`."""
    suite: Literal["llavolta13"] | None = None
    """A suite in place of `tasks`. `llavolta13`: the image benchmarks of LLaVolta's Table 2."""
    average: Literal["raw", "retained"] | None = None
    """One figure for all tasks, once each has its score. `raw`: the mean in per cent of the largest score (MME's
    perception over 2000), the paper's average; `retained`: the mean of the score over the baseline's under `final`.
    """
    include_path: str | None = Field(default=None, examples=["my_tasks"])
    """Folder with tasks of your own. Its Python files are run; null runs none."""
    limit: plugin.Count | None = None
    """Most questions of each task, the first ones; for trials. null takes all."""
    conversation_template: Template | None = None
    """How questions become prompts; null takes that of the last phase's data, else the tokenizer's own."""
    image_aspect_ratio: Literal["pad", "none"] | None = None
    """How an image becomes square: `pad`, as LLaVA-1.5, or `none`, the processor's own way; null takes that of the last
    phase's data.
    """
    batch_size: plugin.Count = 16
    """Prompts generated for at once on each worker; in float32 it changes no answer."""

    @field_validator("suite", mode="before")
    @classmethod
    def _check_suite(cls, value: Any) -> Any:
        if value == "llavolta_video3":
            raise ValueError(
                "lmms-eval 0.7.2 has neither MSVD-QA nor MSRVTT-QA, and scores 0 where ActivityNet-QA's judge does not "
                "answer; the paper's three video sets are scored by `kind: judge` (experiments/llava15_7b/video.yaml)"
            )
        return value

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        if bool(self.tasks) == (self.suite is not None):
            raise ValueError("give either `tasks` or a `suite`")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("a task is named twice")
        if self.average is not None and (unknown := [name for name in self._names if name not in SCORES]):
            raise ValueError(f"no average is defined with {', '.join(unknown)}; it is for {', '.join(SCORES)}")
        if self.average == "retained" and "final" not in self.tested_variants:
            raise ValueError("average `retained` divides by the baseline's score under `final`; add it to `under`")
        return self

    @property
    def _names(self) -> tuple[str, ...]:
        return self.tasks if self.suite is None else SUITES[self.suite]

    @property
    def shown(self) -> tuple[str, ...]:
        """The average, and of each task its score in tables; of one without a known one all it has."""
        of_tasks = (f"{name}/{SCORES[name].metric}" if name in SCORES else f"{name}/*" for name in self._names)
        return (*([] if self.average is None else [AVERAGES[self.average]]), *of_tasks)

    @property
    def needs_baseline(self) -> bool:
        """Whether it divides by the baseline's scores."""
        return self.average == "retained"

    def faults(self) -> Iterable[tuple[str, str, str | None]]:
        """Return what this installation lacks, tasks that do not exist, and tasks whose definition is incomplete."""
        if missing := tasks.lacking():
            yield "kind", f"lmms-eval cannot be used here: not installed: {', '.join(missing)}", tasks.INSTALL
            return
        if self.include_path is not None and not Path(self.include_path).is_dir():
            yield "include_path", f"there is no folder {self.include_path}", None
            return
        known, field = tasks.definitions(self.include_path), "tasks" if self.suite is None else "suite"
        for name in self._names:
            if name not in known:
                near = plugin.nearest(name, tuple(known))
                hint = f"did you mean {near}?" if near else "python -m lmms_eval --tasks list prints their names"
                yield field, f"{tasks.toolkit()} has no task {name}", hint
            elif files := tasks.unfilled(known[name]):
                message = f"the task {name} includes {files[0].name}, which the installed lmms-eval lacks"
                yield field, message, f"PyPI's package is incomplete; take its sources: {tasks.FROM_SOURCE}"

    def parts(self, trained_on: Sequence[plugin.DataSpec]) -> Mapping[str, plugin.EvaluationSpec]:
        """Return each task alone, its prompts and images as in training where nothing else is said.

        Raises:
            ValueError: the data sets of training differ in one of them.
        """
        template, pad = self.conversation_template, self.image_aspect_ratio
        if template is None:
            template = _common("conversation_template", trained_on, "chat_template")
        if pad is None:
            pad = _common("image_aspect_ratio", trained_on, None) or "none"
        same = {"suite": None, "average": None, "conversation_template": template, "image_aspect_ratio": pad}
        return {name: self.model_copy(update={**same, "tasks": (name,)}) for name in self._names}

    def source_digest(self) -> str | None:
        """Return the digest of all files under `include_path`; None without it."""
        if self.include_path is None:
            return None
        digest, root = hashlib.sha256(), Path(self.include_path)
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(root).as_posix()}\0{plugin.content_digest(path)}\0".encode())
        return digest.hexdigest()

    def summary(self, scores: Mapping[str, float], baseline: Mapping[str, float] | None) -> dict[str, float]:
        """Return `average` or `retained`, where every task has its score."""
        if self.average is None:
            return {}
        if self.average == "raw":
            found = average(self._names, scores)
        else:
            found = None if baseline is None else retained(self._names, scores, baseline)
        return {} if found is None else {AVERAGES[self.average]: found}


def _common(field: str, sets: Sequence[plugin.DataSpec], otherwise: Any) -> Any:
    """Return what all data sets say of a field."""
    found = {getattr(data, field, otherwise) for data in sets} or {otherwise}
    if len(found) > 1:
        raise ValueError(f"the data sets of training differ in {field}; set it here")
    return found.pop()

"""`judge`: answers graded by another language model behind an OpenAI-compatible chat endpoint."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from orchestrator import plugin
from orchestrator.plan.identity import digest, shared_cache_folder
from orchestrator.redaction import HIDDEN, is_secret_variable

PROMPT = """\
Question: {question}
Correct answer: {expected}
Predicted answer: {answer}

Does the predicted answer mean the same as the correct answer? Paraphrases and synonyms count as the same. Reply with \
JSON alone: {"pred": "yes" or "no", "score": a whole number from 0 (nothing matches) to 5 (the same meaning)}."""
SYSTEM = "You grade answers to questions about pictures and videos by how well they match the correct answer."


def _endpoint(url: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#]+[^\s?#]*", url):
        raise ValueError("it begins with http:// or https:// and ends before any ? or #, as http://localhost:8000/v1")
    return url.rstrip("/")


def _variable(name: str | None) -> str | None:
    if name is not None and not (re.fullmatch(r"[A-Za-z_]\w*", name) and is_secret_variable(name)):
        raise ValueError("it is the name of an environment variable that ends with KEY, TOKEN or SECRET, not the key")
    return name


def _prompt(text: str) -> str:
    if missing := [name for name in ("{question}", "{expected}", "{answer}") if name not in text]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return text


class JudgeSpec(plugin.GenerationSpec):
    """Greedy answers graded by a judge: right or not, and a score from 0 to 5, beside the question and right answer.

    The form of the judgement is that of Video-ChatGPT's questions (Maaz et al., arXiv:2306.05424), by
    which Video-LLaVA and LLaVolta score MSVD-QA, MSRVTT-QA and ActivityNet-QA; their wording goes into `prompt`. Scores
    of two judges, or of two prompts, do not compare. Every judgement is kept beside its answer.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.evaluations.judge:Judge"
    metric_names: ClassVar[tuple[str, ...] | None] = ("accuracy", "accuracy_*", "score", "score_*")
    headline: ClassVar[tuple[str, ...]] = ("accuracy", "score")
    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"batch_size", "api_key_variable", "timeout_seconds", "max_retries", "backoff_seconds", "num_requests"}
    )

    kind: Literal["judge"] = "judge"
    url: Annotated[str, AfterValidator(_endpoint), Field(examples=["http://localhost:8000/v1"])]
    """Address of the endpoint, up to and without `/chat/completions`."""
    model: str = Field(examples=["gpt-4o-mini-2024-07-18"])
    """Name of the judge's model; with a date or version where there is one, since names are moved to newer ones."""
    api_key_variable: Annotated[str | None, AfterValidator(_variable)] = Field(
        default=None, examples=["OPENAI_API_KEY"]
    )
    """Environment variable that holds the key, on every machine that evaluates; null asks without one. The key itself
    is never written anywhere.
    """
    system: str = SYSTEM
    """System text of the request."""
    prompt: Annotated[str, AfterValidator(_prompt)] = PROMPT
    """The request; `{question}`, `{expected}` and `{answer}` are put in. It asks for `pred` (yes or no) and `score` as
    JSON, or as Python writes a mapping.
    """
    max_new_tokens: plugin.Count = 128
    """Longest answer of the model under test, in tokens."""
    max_judge_tokens: plugin.Count = 256
    """Longest judgement in tokens."""
    timeout_seconds: plugin.Positive = 60.0
    """Longest wait for one judgement."""
    max_retries: plugin.Whole = 5
    """Further attempts at a judgement that did not come (no connection, a busy server, no JSON)."""
    backoff_seconds: plugin.Positive = 1.0
    """Wait before the second attempt; it doubles with each, up to a minute, unless the server names another one."""
    num_requests: plugin.Count = 8
    """Requests at a time of each worker."""


class Judge:
    """Has answers graded."""

    def __init__(self, spec: JudgeSpec) -> None:
        self._spec = spec

    def run(self, model: Any, data: plugin.EvaluationData, workers: plugin.Workers) -> plugin.Outcome:
        """Return the metrics `accuracy` (0 to 1) and `score` (0 to 5), overall and by type.

        A trial before training asks the model under test and not the judge, which may be up by the time it is needed.

        Raises:
            DataError: a row has no answer to compare with, or cannot be read.
            StageRunError: the key is not in the environment, or the judge gives no judgement.
        """
        spec, rows = self._spec, list(data.rows)
        expected = {row.index: plugin.last_answer(row) for row in rows}

        kept = shared_cache_folder() / "judgements" / data.identity if data.identity else None

        def judged(mine: list[plugin.Row]) -> list[tuple[str, dict[str, Any]]]:
            key = _key(spec)  # here, since one machine may lack what the others have
            answers = plugin.greedy_answers(model, mine, data, spec.batch_size, spec.max_new_tokens)
            if data.trial:
                return [(answer, {"pred": "no", "score": 0}) for answer in answers]
            asked = [
                plugin.prediction(row, answer, expected[row.index], False)
                for row, answer in zip(mine, answers, strict=True)
            ]
            if workers.in_step and workers.rank > 0:  # what the first rank is told counts
                return [(answer, {}) for answer in answers]
            return list(zip(answers, _judgements(spec, asked, key, data.should_stop, kept), strict=True))

        found = workers.divide(rows, judged)
        if kept is not None and not data.should_stop():  # all ranks have them all
            shutil.rmtree(kept, ignore_errors=True)
        right = [one["pred"] == "yes" for _, one in found]
        scores = [float(one["score"]) for _, one in found]
        predictions = [
            {**plugin.prediction(row, answer, expected[row.index], ok), "score": score, "judgement": one}
            for row, (answer, one), ok, score in zip(rows, found, right, scores, strict=True)
        ]
        metrics = {**plugin.mean_scores("accuracy", right, rows), **plugin.mean_scores("score", scores, rows)}
        return plugin.outcome_of(metrics, predictions)


def _key(spec: JudgeSpec) -> str | None:
    if spec.api_key_variable is None:
        return None
    key = os.environ.get(spec.api_key_variable, "").strip()
    if not key:
        raise plugin.StageRunError(
            f"judge: the environment variable {spec.api_key_variable}, which holds the judge's key, is not set where "
            "this evaluation runs; set it there, then --retry-failed"
        )
    return key


def _judgements(
    spec: JudgeSpec,
    asked: Sequence[dict[str, Any]],
    key: str | None,
    should_stop: Callable[[], bool],
    kept: Path | None,
) -> list[dict[str, Any]]:
    """Return a judgement of each answer; a failure ends what has not begun.

    Args:
        spec: The judge.
        asked: What it is asked of.
        key: Its key.
        should_stop: Whether to ask no more.
        kept: Folder of what earlier attempts at the same evaluation were told; each new judgement is added at once.
    """
    failed: list[plugin.StageRunError] = []
    told = {} if kept is None else _told(kept)

    def judge(one: dict[str, Any]) -> dict[str, Any]:
        if failed or should_stop():
            return {"pred": "no", "score": 0}  # the outcome is discarded
        request = _request(spec, one)
        name = digest([spec.url, request])
        if name in told:
            return told[name]
        try:
            found = _judgement(spec, request, one["row"], key)
            if kept is not None:
                _keep(kept / f"{name}.json", found)
            return found
        except plugin.StageRunError as error:
            failed.append(error)
            return {"pred": "no", "score": 0}

    with ThreadPoolExecutor(spec.num_requests) as pool:
        found = list(pool.map(judge, asked))
    if failed:
        raise failed[0]
    return found


def _told(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the judgements in a folder by the digest of what was asked; one that was cut off is asked for again."""
    found = {}
    for file in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            found[file.stem] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _keep(file: Path, judgement: dict[str, Any]) -> None:
    """Write a judgement under another name, then rename it; where that fails the evaluation goes on without."""
    part = file.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(judgement), encoding="utf-8")
        part.replace(file)


def _request(spec: JudgeSpec, one: dict[str, Any]) -> dict[str, Any]:
    """Return the body of the request about one answer."""
    text = spec.prompt
    values = {**one, "question": one["question"].replace(plugin.IMAGE_MARK, "").strip()}
    # One pass, so that braces in a question or an answer stay what they are.
    text = re.sub(r"\{(question|expected|answer)\}", lambda found: str(values[found[1]]), text)
    return {
        "model": spec.model,
        "messages": [{"role": "system", "content": spec.system}, {"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": spec.max_judge_tokens,
    }


def _judgement(spec: JudgeSpec, request: dict[str, Any], row: int, key: str | None) -> dict[str, Any]:
    """Return `pred`, `score` and the judge's whole `reply` to a request.

    Raises:
        StageRunError: there is none after all attempts.
    """
    reason = ""
    for attempt in range(spec.max_retries + 1):
        wait: float | None = None
        try:
            reply = _post(f"{spec.url}/chat/completions", request, key, spec.timeout_seconds)
            if (verdict := read_verdict(reply)) is not None:
                return {**verdict, "reply": reply}
            reason = f"it said {reply[:200]!r}, where pred (yes or no) and score (0 to 5) were asked for"
        except _Refused as error:
            reason, wait = str(error), error.wait_seconds
            if error.final:
                break
        except (OSError, HTTPException, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
        if attempt < spec.max_retries:
            time.sleep(min(60.0, spec.backoff_seconds * 2**attempt if wait is None else wait))
    raise plugin.StageRunError(
        f"judge: no judgement of row {row} from {spec.url} ({spec.model}) after {attempt + 1} "
        f"attempt{'s' * (attempt > 0)}: {reason}; training is kept: when the judge is there, --retry-failed"
    )


class _Refused(Exception):
    """The server's answer is an error; `final` where another attempt would get the same."""

    def __init__(self, status: int, text: str, headers: Message) -> None:
        super().__init__(f"HTTP {status}: {text[:300]}")
        self.final = status not in (408, 409, 425, 429) and status < 500
        after = headers.get("Retry-After", "")
        self.wait_seconds = float(after) if re.fullmatch(r"\d+(\.\d+)?", after) else None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key would go with it to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _post(url: str, request: dict[str, Any], key: str | None, timeout_seconds: float) -> str:
    """Return the text of the first choice."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    asked = urllib.request.Request(url, json.dumps(request).encode(), headers)
    try:
        with _OPENER.open(asked, timeout=timeout_seconds) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise _Refused(error.code, error.read(4096).decode("utf-8", "replace"), error.headers) from None
    try:
        text = str(answer["choices"][0]["message"]["content"])
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"the reply has no choices[0].message.content: {json.dumps(answer)[:200]}") from None
    return text.replace(key, HIDDEN) if key else text  # whatever a server echoes


def read_verdict(reply: str) -> dict[str, Any] | None:
    """Return `pred` and `score` of a judgement in JSON or as Python writes it; None where it has none."""
    for text in re.findall(r"\{[^{}]*\}", reply):
        pred = re.search(r"""["']pred["']\s*:\s*["'](yes|no)["']""", text, re.IGNORECASE)
        score = re.search(r"""["']score["']\s*:\s*["']?(\d+(?:\.\d+)?)["']?\s*[,}]""", text)
        if pred and score and float(score[1]) <= 5:
            return {"pred": pred[1].lower(), "score": float(score[1])}
    return None

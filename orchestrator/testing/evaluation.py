"""`check_evaluation`: an evaluation gives finite metrics with legal names, whatever a model answers."""

from __future__ import annotations

import json
import random
import string
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from orchestrator import registry
from orchestrator.compression.testing.families import TINY
from orchestrator.data.processing.encode import Encoder
from orchestrator.data.processing.processor import VisionTextProcessor, load_processor
from orchestrator.data.rows import IMAGE_MARK, ImageRef, Row, Turn
from orchestrator.evaluation.evaluate import evaluation_mode
from orchestrator.evaluation.protocol import EvaluationData, Outcome, Workers, headline_problem, metric_problem
from orchestrator.spec.components import EvaluationSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.testing.contract import (
    Broken,
    Contract,
    ContractReport,
    Reference,
    check_spec,
    component_of,
    shown,
)

_ANSWERS = ("yes", "No.", "", "  a   red\ncircle ", "3.14", "éü 漢字 🙂", "x" * 200, "it's 1/2")
_TEMPLATE = (
    "{%- for message in messages %}{%- if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{%- endfor %}{% endif %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
    "{%- endfor %}"
)


def check_evaluation(evaluation: Reference) -> ContractReport:
    """Prove that an evaluation keeps its contract: one line in a plug-in's tests.

    On a tiny random model with a processor of its own, rows with an image and without, and right answers of every odd
    form: `run` gives an `Outcome` whose metrics are finite numbers with names that MLflow allows, the same when it runs
    again, with one row too, and from a model whose every answer is empty. All rows are counted, examples are JSON, and
    the model's weights are as they were. Where the implementation has `example_rows`, the rows are those it makes.

    Args:
        evaluation: A spec, a spec class (required fields take their `Field(examples=[...])`, `data` is the kit's), a
            mapping with a `kind`, or a plug-in file that defines one evaluation.

    Returns:
        What was checked.

    Raises:
        ContractError: an AssertionError; a promise is broken. The message lists all that are, and what to do.
        UsageError: it is no evaluation.

    Example:
        >>> check_evaluation({"kind": "exact_match", "max_new_tokens": 4})
    """
    spec = component_of(evaluation, EvaluationSpec, "check_evaluation", {"data": "test"})
    contract = Contract(spec.kind)
    check_spec(contract, spec, ("run",))
    if contract.broken:
        return contract.report()
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of_every_form(Path(folder))
        with contract.promise("example_rows, where there is one, makes rows with all columns that it needs"):
            rows = _taken_rows(spec, rows)
        if not contract.broken:
            _check_runs(contract, spec, rows)
    return contract.report()


def _taken_rows(spec: EvaluationSpec, rows: list[Row]) -> list[Row]:
    """Return the kit's rows as the evaluation takes them."""
    make = getattr(registry.load_object(spec.implementation), "example_rows", None)
    rows = list(make(rows)) if make is not None else rows
    missing = [name for name in spec.columns if not rows or any(name not in row.columns for row in rows)]
    if missing:
        raise Broken(
            f"columns names {', '.join(missing)}, which the kit's rows do not have; add them in a static method "
            "example_rows(rows) of the implementation"
        )
    return rows


def _check_runs(contract: Contract, spec: EvaluationSpec, rows: list[Row]) -> None:
    implementation = registry.load_object(spec.implementation)
    processor = tiny_processor()
    data = EvaluationData(rows, Encoder(processor, "chat_template", 4096), processor)
    model = TINY["llava"].build("sdpa", 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    outcomes: list[Outcome] = []

    def run(data: EvaluationData) -> Outcome:
        with evaluation_mode(model):
            found: Outcome = implementation(spec).run(model, data, Workers())
        return found

    with contract.promise("run() gives an Outcome"):
        outcomes.append(run(data))
        if not isinstance(outcomes[0], Outcome):
            raise Broken(f"it returned {shown(outcomes[0])}; return plugin.Outcome(metrics, num_samples, examples)")
    if contract.broken:
        return
    with contract.promise("metrics are finite numbers with names that MLflow allows, at least one, the headline first"):
        _check_metrics(outcomes[0])
    with contract.promise("metric_names, where given, names every metric, and the headline is among them"):
        if (names := spec.metric_names) is not None:
            unknown = [m for m in (*outcomes[0].metrics, *spec.headline) if not any(fnmatchcase(m, n) for n in names)]
            if unknown:
                raise Broken(f"it is {', '.join(names)}, and does not have {', '.join(dict.fromkeys(unknown))}; add it")
    with contract.promise("the headline names metrics that it reports"):
        if problem := headline_problem(type(spec), outcomes[0].metrics):
            raise Broken(problem)
    with contract.promise("num_samples counts the rows"):
        if outcomes[0].num_samples != len(rows) and not spec.is_measurement:
            raise Broken(f"it is {outcomes[0].num_samples} of {len(rows)} rows; count every rank's (workers.sum)")
    with contract.promise("examples and predictions are mappings of JSON values"):
        for kept in (outcomes[0].examples, outcomes[0].predictions):
            if not all(isinstance(one, dict) for one in kept):
                raise Broken(f"they are {shown(kept)}; give a list of dicts, e.g. of plugin.prediction")
            json.dumps(kept, allow_nan=False)
    with contract.promise("there is a prediction of every row, in the order of the rows, or none at all"):
        found = [one.get("row") for one in outcomes[0].predictions]
        if found and found != [row.index for row in rows]:
            raise Broken(f"they are of the rows {shown(found)}, the data has {[row.index for row in rows]}")
    with contract.promise("run again it gives the same"):
        random.seed(1)
        torch.manual_seed(1)
        again = run(data)
        if again.metrics.keys() != outcomes[0].metrics.keys():
            raise Broken(f"first {', '.join(outcomes[0].metrics)}, then {', '.join(again.metrics)}")
        if again.metrics != outcomes[0].metrics and not spec.is_measurement:
            raise Broken(f"first {outcomes[0].metrics}, then {again.metrics}; draw from a seed of the spec, if at all")
    with contract.promise("the model is as it was"):
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        if changed or any(one.grad is not None for one in model.parameters()):
            raise Broken(f"{changed[0] if changed else 'a gradient'} is another; an evaluation only looks")
    without = [row for row in rows if not row.images]
    for text, some in (("one row", rows[:1]), ("a row without an image", without[:1])):
        if some:
            with contract.promise(f"{text} alone can be tested"):
                _check_metrics(run(replace(data, rows=some, trial=True)))
    with contract.promise("a model whose every answer is empty can be tested"), _silent(model, processor):
        _check_metrics(run(data))


def _check_metrics(outcome: Outcome) -> None:
    if problem := metric_problem(outcome.metrics):
        raise Broken(problem)


@contextmanager
def _silent(model: Any, processor: VisionTextProcessor) -> Iterator[None]:
    """Make a model end every answer at once: all logits are equal, and the first token ends an answer."""
    head, end = model.get_output_embeddings().weight, model.generation_config.eos_token_id
    kept = head.detach().clone()
    with torch.no_grad():
        head.zero_()
    model.generation_config.eos_token_id = 0
    try:
        yield
    finally:
        with torch.no_grad():
            head.copy_(kept)
        model.generation_config.eos_token_id = end


def rows_of_every_form(folder: Path) -> list[Row]:
    """Return rows with an image, two, and none, whose right answers are plain, empty, long, and not Latin.

    Args:
        folder: Takes the images.
    """
    rows = []
    for number, answer in enumerate(_ANSWERS):
        images = []
        for image in range(number % 3):
            path = folder / f"{number}_{image}.png"
            Image.new("RGB", (24, 24), (40 * number % 256, 80 * image, 120)).save(path)
            images.append(ImageRef(str(path)))
        turns = (Turn("user", f"{IMAGE_MARK}\n" * len(images) + f"what is {number}?"), Turn("assistant", answer))
        rows.append(Row(number, tuple(images), turns, "yes_no" if number < 2 else None))
    return rows


@cache
def tiny_processor() -> VisionTextProcessor:
    """Return a processor of single characters for the tiny LLaVA of the kit: 64 tokens, images of 3 x 3 patches."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    special = ("<pad>", "<unk>", "<s>", "</s>")
    letters = [*special, *string.ascii_lowercase, *string.digits, *" \n.,?!'/:-+=()[]*&%#$@;"][:63]
    fast = Tokenizer(WordLevel({token: number for number, token in enumerate([*letters, "<image>"])}, "<unk>"))
    fast.pre_tokenizer = Split(Regex("."), "isolated")
    fast.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )
    size = {"height": 24, "width": 24}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
    with tempfile.TemporaryDirectory() as folder:
        model: Any = TINY["llava"].build("eager", 0)
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        return load_processor(ModelSpec(model_name_or_path=folder))

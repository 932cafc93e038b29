"""What one sample of a phase holds on average: the data's measured lengths, mixed as the phase mixes its sets."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator import registry
from orchestrator.errors import LlavoltaError
from orchestrator.plan.cells.identity_fields import data_identity
from orchestrator.plan.cost import Sample
from orchestrator.plan.identity import cache_folder, content_digest, digest
from orchestrator.plan.io_retry import ABSENT, retry_io
from orchestrator.plan.ledger.files import read_json, write_json
from orchestrator.spec.components import DataSpec
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.model_facts import ModelFacts
from orchestrator.spec.phase import PhaseSpec

ROWS_READ = 2000
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
# Found by name like a component's implementation: the data layer lies above this one, and needs no torch for this.
_TEMPLATES = "orchestrator.data.processing.templates"


@dataclass(frozen=True)
class Lengths:
    """Means per row: text tokens (template included, images not), label tokens, images."""

    text_tokens: float
    label_tokens: float
    images: float


def measure_lengths(
    data: DataSpec, data_id: str, model_folder: str, model_max_length: int, tokens_per_image: int
) -> Lengths | None:
    """Return the mean lengths over up to 2,000 rows at equal distances; cached by content.

    Args:
        data: The data set.
        data_id: Digest of its content and fields.
        model_folder: Folder with `tokenizer.json`.
        model_max_length: Longer rows are cut, as in training.
        tokens_per_image: Visual tokens of one image before compression.

    Returns:
        None where the tokenizer or the rows are missing.
    """
    tokenizer = Path(model_folder) / "tokenizer.json"
    if not data.implementation:
        return None
    try:
        key = digest([data_id, content_digest(tokenizer), _chat_template(Path(model_folder)), model_max_length])
    except (OSError, LlavoltaError):
        return None
    file = cache_folder() / "lengths" / f"{key}.json"
    if (found := _cached(file)) is not None:
        return found
    try:
        lengths = _measure(data, Path(model_folder), model_max_length, tokens_per_image)
    except (ImportError, AttributeError, LlavoltaError, OSError, ValueError, KeyError):
        return None  # An estimate must not stop a plan; `run` reads every row and reports what is wrong.
    with contextlib.suppress(LlavoltaError):  # A cache that cannot be written costs only time.
        write_json(file, asdict(lengths))
    return lengths


def _cached(file: Path) -> Lengths | None:
    try:
        return Lengths(**(read_json(file) or {}))
    except (TypeError, LlavoltaError):
        return None


def _measure(data: DataSpec, folder: Path, model_max_length: int, tokens_per_image: int) -> Lengths:
    from tokenizers import Tokenizer

    rows = registry.load_object(data.implementation)(data).rows()
    count = min(len(rows), ROWS_READ)
    if not count:
        raise ValueError("no rows")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    render = registry.load_object(f"{_TEMPLATES}:render")
    chat, template = _chat_format(folder), getattr(data, "conversation_template", "chat_template")
    bos = _special(folder)[0]
    text = labels = images = 0
    for position in range(count):
        row = rows[position * len(rows) // count]
        rendered = render(template, row, chat)
        encoded = tokenizer.encode(rendered.text, add_special_tokens=not rendered.text.startswith(bos))
        spoken = sum(
            any(last > first and last > a and first < b for a, b in rendered.answers) for first, last in encoded.offsets
        )
        most = max(0, model_max_length - len(row.images) * tokens_per_image)
        length = len(encoded.ids) - len(row.images)  # the placeholder stands where the visual tokens go
        # A row that is cut loses its end, which is an answer.
        text += min(length, most)
        labels += max(0, spoken - max(0, length - most))
        images += len(row.images)
    return Lengths(text / count, labels / count, images / count)


def _special(folder: Path) -> tuple[str, str, str]:
    """Return the first token, end token and image placeholder as texts."""
    config = read_json(folder / "tokenizer_config.json") or {}

    def text(name: str, otherwise: str) -> str:
        value = config.get(name, otherwise)
        return str(value.get("content", otherwise)) if isinstance(value, Mapping) else str(value or otherwise)

    processor = read_json(folder / "processor_config.json") or {}
    image = text("image_token", str(processor.get("image_token") or "<image>"))
    return text("bos_token", "\0"), text("eos_token", ""), image


def _chat_template(folder: Path) -> str | None:
    try:
        return retry_io((folder / "chat_template.jinja").read_text)
    except ABSENT:  # any other error must not have another template measured
        pass
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = (read_json(folder / name) or {}).get("chat_template")
        if isinstance(template, str):
            return template
    return None


def _chat_format(folder: Path) -> Any:
    bos, eos, image = _special(folder)
    return registry.load_object(f"{_TEMPLATES}:ChatFormat")(image, eos, _renderer(_chat_template(folder), bos, eos))


def _renderer(template: str | None, bos: str, eos: str) -> Callable[[Sequence[dict[str, Any]], bool], str]:
    """Return the chat templates as transformers renders them: a sandbox, no blank lines of blocks."""
    if template is None:
        return lambda messages, add_generation_prompt: "".join(json.dumps(m) for m in messages)
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    compiled = environment.from_string(_GENERATION.sub("", template))

    def render(messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        return str(
            compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt, bos_token=bos, eos_token=eos
            )
        )

    return render


class Samples:
    """Measures each data set once.

    Attributes:
        missing: Data sets whose lengths are not known, by the phase that uses them.
    """

    def __init__(self) -> None:
        self.missing: dict[tuple[str, str], None] = {}
        self._means: dict[tuple[str, str, int], Lengths | None] = {}

    def mean(
        self, spec: ExperimentSpec, phase: str, recipe: PhaseSpec, sets: Mapping[str, float], facts: ModelFacts
    ) -> Sample | None:
        """Return the mean sample of a phase, sets weighted by rows; None where a set's lengths are not known.

        Args:
            spec: Holds the data sets and the model.
            phase: Name of the phase.
            recipe: Its `model_max_length` cuts texts.
            sets: Name of each set to its share.
            facts: The model's; an image counts as its visual tokens.
        """
        weighed: list[tuple[float, Lengths]] = []
        for name, share in sets.items():
            found = self._lengths(spec, recipe, spec.data[name], facts)
            if found is None:
                self.missing[name, phase] = None
                return None
            weighed.append(((spec.data[name].num_rows() or 1) * share, found))
        total = sum(weight for weight, _ in weighed)

        def mean(of: Callable[[Lengths], float]) -> float:
            return sum(weight * of(lengths) for weight, lengths in weighed) / total

        return Sample(mean(lambda x: x.text_tokens), mean(lambda x: x.label_tokens), mean(lambda x: x.images))

    def _lengths(self, spec: ExperimentSpec, recipe: PhaseSpec, data: DataSpec, facts: ModelFacts) -> Lengths | None:
        folder, longest = spec.model.model_name_or_path, recipe.model_max_length
        key = (data.model_dump_json(), folder, longest)
        if key not in self._means:
            identity, notice = data_identity(data)
            tokens = facts.image_grid.tokens
            self._means[key] = None if notice else measure_lengths(data, digest(identity), folder, longest, tokens)
        return self._means[key]

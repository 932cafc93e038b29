"""What one sample of a phase holds on average: the data's measured lengths, mixed as the phase mixes its sets.

Where images vary in size, the mean would say too little (attention is quadratic): then the measured rows stay apart.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator import registry
from orchestrator.errors import LlavoltaError
from orchestrator.plan.cells.identity_fields import data_identity
from orchestrator.plan.cost import MeasuredRow, MeasuredRows, Sample
from orchestrator.plan.identity import cache_folder, content_digest, digest, source_code
from orchestrator.plan.io_retry import ABSENT, retry_io
from orchestrator.plan.ledger.files import read_json, write_json
from orchestrator.spec.components import DataSpec, Grid
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.image_units import ImageUnits
from orchestrator.spec.model_facts import ModelFacts, UnitRules, find_config
from orchestrator.spec.phase import PhaseSpec

ROWS_READ = 2000
# What stands for an image in a text, where the processor puts other tokens in its place.
_READ_AS = {"aya_vision": "<image>", "ovis2": "<image>", "llama4": "<|image|>", "molmo2": "<|image|>"}
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
_MODEL_FILES = (
    "config.json", "tokenizer.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
# Found by name like a component's implementation: the data layer lies above this one, and needs no torch for this.
_TEMPLATES = "orchestrator.data.processing.templates"
_IMAGE_SIZE = "orchestrator.data.records.image_files:image_size"
_CLIP_OF, _FRAMES_OF = (f"orchestrator.data.records.video_files:{name}" for name in ("clip_of", "frames_of"))


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
    text = labels = images = count = 0
    for row, tokens in _encoded_rows(_rows(data), data, folder):
        shown, spoken = len(row.images), sum(map(bool, tokens))
        most = max(0, model_max_length - shown * tokens_per_image)
        length = len(tokens) - shown  # the placeholder stands where the visual tokens go
        # A row that is cut loses its end, which is an answer.
        text += min(length, most)
        labels += max(0, spoken - max(0, length - most))
        images += shown
        count += 1
    return Lengths(text / count, labels / count, images / count)


def _rows(data: DataSpec) -> Sequence[Any]:
    rows: Sequence[Any] = registry.load_object(data.implementation)(data).rows()
    if not len(rows):
        raise ValueError("no rows")
    return rows


def _encoded_rows(rows: Sequence[Any], data: DataSpec, folder: Path) -> Iterator[tuple[Any, list[bool | None]]]:
    """Yield up to 2,000 rows, and of each token whether it is spoken; None: the placeholder of an image or a video."""
    from tokenizers import Tokenizer

    count = min(len(rows), ROWS_READ)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    render = registry.load_object(f"{_TEMPLATES}:render")
    chat, template = _chat_format(folder), getattr(data, "conversation_template", "chat_template")
    bos = _special(folder)[0]
    image_id, video_id = (tokenizer.token_to_id(token) for token in (chat.image_token, chat.video_token))
    for position in range(count):
        row = rows[position * len(rows) // count]
        rendered = render(template, row, chat)
        encoded = tokenizer.encode(rendered.text, add_special_tokens=not rendered.text.startswith(bos))
        places = {image_id, video_id} if any(image.video for image in row.images) else {image_id}
        yield (
            row,
            [
                None if token in places else any(last > first and last > a and first < b for a, b in rendered.answers)
                for token, (first, last) in zip(encoded.ids, encoded.offsets, strict=True)
            ],
        )


def measure_rows(data: DataSpec, data_id: str, model_folder: Path, model_max_length: int) -> MeasuredRows | str:
    """Return up to 2,000 rows at equal distances with what their images become in the model; cached by content.

    Args:
        data: The data set.
        data_id: Digest of its content and fields.
        model_folder: Folder with the config, `tokenizer.json` and the processor's settings.
        model_max_length: Longer rows are cut before an image or in a text, as in training.

    Returns:
        The reason where they cannot be measured.
    """
    if not data.implementation:
        return "its kind of data has no implementation"
    try:
        rules = UnitRules(model_folder)
        parts = [content_digest(file) for name in _MODEL_FILES if (file := model_folder / name).is_file()]
        made_by = source_code(__name__, "orchestrator.spec.image_units", "orchestrator.spec.model_facts")
        key = digest([data_id, parts, _chat_template(model_folder), model_max_length, made_by])
        file = cache_folder() / "lengths" / f"{key}.json"
        if (found := _cached_rows(file)) is not None:
            return found
        rows = Counter(_fitting_rows(data, model_folder, model_max_length, rules))
    except (ImportError, AttributeError, LlavoltaError, OSError, ValueError, KeyError) as error:
        return " ".join(str(error).split()) or type(error).__name__  # an estimate must not stop a plan
    if not rows:
        return f"no row of those read fits into model_max_length {model_max_length}"
    total = sum(rows.values())
    found = MeasuredRows(tuple(MeasuredRow(count / total, *row) for row, count in rows.items()))
    with contextlib.suppress(LlavoltaError):  # A cache that cannot be written costs only time.
        write_json(file, {"rows": [asdict(row) for row in found.rows]})
    return found


def _cached_rows(file: Path) -> MeasuredRows | None:
    try:
        found = read_json(file)
        return None if found is None else MeasuredRows(tuple(map(_row_of, found["rows"])))
    except (TypeError, KeyError, LlavoltaError):
        return None


def _row_of(fields: Mapping[str, Any]) -> MeasuredRow:
    images = tuple(
        ImageUnits(
            tuple(Grid(grid["height"], grid["width"], frame=grid["frame"]) for grid in image["grids"]),
            tuple(image["tower"]), image["features"], image["markers"], tuple(image["windows"]), image["frames"],
        )
        for image in fields["images"]
    )  # fmt: skip
    return MeasuredRow(fields["share"], fields["text_tokens"], fields["label_tokens"], images)


def _fitting_rows(
    data: DataSpec, folder: Path, limit: int, rules: UnitRules
) -> Iterator[tuple[int, int, tuple[ImageUnits, ...]]]:
    """Yield text tokens, label tokens and images of each row, cut to `limit` tokens."""
    rows = _rows(data)
    images = getattr(getattr(rows, "origin", None), "images", None)
    sizes: dict[str, tuple[int, int]] = {} if images is None else dict(images.sizes)  # of the row index
    clips: dict[str, Any] = {} if images is None else dict(images.clips)

    def shape_of(image: Any) -> tuple[int, int, int]:
        if not image.video:
            if image.path not in sizes:
                sizes[image.path] = registry.load_object(_IMAGE_SIZE)(image.path, image.reading)
            return (0, *sizes[image.path])
        if image.path not in clips:
            clips[image.path] = registry.load_object(_CLIP_OF)(image.path)
        clip = clips[image.path]
        return len(registry.load_object(_FRAMES_OF)(clip, image.reading)), clip.height, clip.width

    for row, tokens in _encoded_rows(rows, data, folder):
        if tokens.count(None) != len(row.images):
            raise ValueError(
                f"row {row.index} has {len(row.images)} images, and its text {tokens.count(None)} placeholders"
            )
        shown, units = [shape_of(image) for image in row.images], []
        while True:
            alone = sum(not frames for frames, *_ in shown) == 1
            units = [rules.units(shape, alone) for shape in shown]
            if any(image.tokens + image.markers >= limit for image in units):
                break  # `run` refuses such a row
            text, labels, kept = _fit(tokens, units, limit)
            if kept == len(units):
                yield text, labels, tuple(units)
                break
            shown, tokens = shown[:kept], tokens[: _place(tokens, kept)]  # what is left is read anew, as in training


def _fit(tokens: Sequence[bool | None], units: Sequence[ImageUnits], limit: int) -> tuple[int, int, int]:
    """Return the text tokens, label tokens and images before the first token, or image, that does not fit."""
    text = labels = kept = total = 0
    for spoken in tokens:
        length = 1 if spoken is not None else units[kept].tokens + units[kept].markers
        if total + length > limit:
            break
        total += length
        text += length if spoken is not None else units[kept].markers
        labels += spoken is True
        kept += spoken is None
    return text, labels, kept


def _place(tokens: Sequence[bool | None], number: int) -> int:
    """Return the position of an image's placeholder."""
    return [position for position, spoken in enumerate(tokens) if spoken is None][number]


def _special(folder: Path) -> tuple[str, str, str]:
    """Return the first token, end token and image placeholder as texts."""
    config = read_json(folder / "tokenizer_config.json") or {}

    def text(name: str, otherwise: str) -> str:
        value = config.get(name, otherwise)
        return str(value.get("content", otherwise)) if isinstance(value, Mapping) else str(value or otherwise)

    processor = read_json(folder / "processor_config.json") or {}
    image = text("image_token", str(processor.get("image_token") or _placeholder(folder, config)))
    return text("bos_token", "\0"), text("eos_token", ""), image


def _placeholder(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the placeholder of an image where the files do not name it: the token of the model's own placeholder."""
    named = config.get("extra_special_tokens")
    named = {**config, **named} if isinstance(named, Mapping) else config
    model = read_json(folder / "config.json") or {}
    for name in ("image_token", "context_image_token"):
        if isinstance(named.get(name), str):
            return str(named[name])
    if model.get("model_type") in _READ_AS:
        return _READ_AS[model["model_type"]]
    wanted = model.get("image_token_id", model.get("image_token_index"))
    added = (read_json(folder / "tokenizer.json") or {}).get("added_tokens", ())
    return next((str(token["content"]) for token in added if token.get("id") == wanted), "<image>")


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
    renderer = _renderer(_chat_template(folder), bos, eos)
    return registry.load_object(f"{_TEMPLATES}:ChatFormat")(image, eos, renderer, None, _video_placeholder(folder))


def _video_placeholder(folder: Path) -> str:
    """Return the placeholder of a video: as the processor or the tokenizer names it, or the model's own by its id."""
    config, model = read_json(folder / "tokenizer_config.json") or {}, read_json(folder / "config.json") or {}
    named = config.get("extra_special_tokens")
    for source in (read_json(folder / "processor_config.json") or {}, named, config):
        if isinstance(source, Mapping) and isinstance(source.get("video_token"), str):
            return str(source["video_token"])
    wanted = model.get("video_token_id", model.get("video_token_index"))
    added = (read_json(folder / "tokenizer.json") or {}).get("added_tokens", ())
    return next((str(token["content"]) for token in added if token.get("id") == wanted), "<video>")


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
        missing: Data sets whose lengths are not known, by the phase that uses them, with the reason where it is known.
    """

    def __init__(self) -> None:
        self.missing: dict[tuple[str, str], str] = {}
        self._means: dict[tuple[str, str, int], Lengths | None] = {}
        self._rows: dict[tuple[str, str, int], MeasuredRows | str] = {}
        self._mixed: dict[tuple[tuple[float, int], ...], Sample] = {}
        self._with_videos: dict[str, bool | None] = {}

    def mean(
        self, spec: ExperimentSpec, phase: str, recipe: PhaseSpec, sets: Mapping[str, float], facts: ModelFacts
    ) -> Sample | None:
        """Return the mean sample of a phase, sets weighted by rows; None where a set's lengths are not known.

        Args:
            spec: Holds the data sets and the model.
            phase: Name of the phase.
            recipe: Its `model_max_length` cuts texts.
            sets: Name of each set to its share.
            facts: The model's; an image counts as its visual tokens, or as what its own size becomes; so do videos.
        """
        if not facts.priced or any(self.has_videos(spec.data[name]) for name in sets):
            sample = self._measured(spec, recipe, sets)
            if isinstance(sample, tuple):
                self.missing[sample[0], phase] = sample[1]
                return None
            return sample
        weighed: list[tuple[float, Lengths]] = []
        for name, share in sets.items():
            found = self._lengths(spec, recipe, spec.data[name], facts)
            if found is None:
                self.missing[name, phase] = ""
                return None
            weighed.append(((spec.data[name].num_rows() or 1) * share, found))
        total = sum(weight for weight, _ in weighed)

        def mean(of: Callable[[Lengths], float]) -> float:
            return sum(weight * of(lengths) for weight, lengths in weighed) / total

        return Sample(mean(lambda x: x.text_tokens), mean(lambda x: x.label_tokens), mean(lambda x: x.images))

    def has_videos(self, data: DataSpec) -> bool | None:
        """Return whether a data set has videos, asked once."""
        key = data.model_dump_json()
        if key not in self._with_videos:
            self._with_videos[key] = data.has_videos()
        return self._with_videos[key]

    def _lengths(self, spec: ExperimentSpec, recipe: PhaseSpec, data: DataSpec, facts: ModelFacts) -> Lengths | None:
        folder, longest = spec.model.model_name_or_path, recipe.model_max_length
        key = (data.model_dump_json(), folder, longest)
        if key not in self._means:
            identity, notice = data_identity(data)
            tokens = facts.image_grid.tokens
            self._means[key] = None if notice else measure_lengths(data, digest(identity), folder, longest, tokens)
        return self._means[key]

    def measured(self, spec: ExperimentSpec, recipe: PhaseSpec, sets: Mapping[str, float]) -> MeasuredRows | str:
        """Return the rows of some sets as they are mixed, with what their images become; or why that is not known."""
        sample = self._measured(spec, recipe, sets)
        return sample[1] if isinstance(sample, tuple) else sample.rows or "no rows"

    def _measured(self, spec: ExperimentSpec, recipe: PhaseSpec, sets: Mapping[str, float]) -> Sample | tuple[str, str]:
        """Return the sample, or the name of a set and why its rows are not known."""
        weighed: list[tuple[float, MeasuredRows]] = []
        for name, share in sets.items():
            found = self._rows_of(spec, recipe, spec.data[name])
            if isinstance(found, str):
                return name, found
            weighed.append(((spec.data[name].num_rows() or 1) * share, found))
        # Cells of other seeds mix the very same rows, and costs are known by the object.
        key = tuple((weight, id(found)) for weight, found in weighed)
        if key not in self._mixed:
            self._mixed[key] = _mixed(weighed)
        return self._mixed[key]

    def _rows_of(self, spec: ExperimentSpec, recipe: PhaseSpec, data: DataSpec) -> MeasuredRows | str:
        name, longest = spec.model.model_name_or_path, recipe.model_max_length
        key = (data.model_dump_json(), f"{name}@{spec.model.revision}", longest)
        if key not in self._rows:
            identity, notice = data_identity(data)
            config = find_config(name, spec.model.revision)
            if notice or config is None:
                self._rows[key] = notice or f"{name} is not here"
            else:
                self._rows[key] = measure_rows(data, digest(identity), config.parent, longest)
        return self._rows[key]


def _mixed(weighed: Sequence[tuple[float, MeasuredRows]]) -> Sample:
    total = sum(weight for weight, _ in weighed)
    rows = tuple(
        replace(row, share=row.share * weight / total) for weight, measured in weighed for row in measured.rows
    )

    def mean(of: Callable[[MeasuredRow], float]) -> float:
        return sum(row.share * of(row) for row in rows)

    return Sample(
        mean(lambda row: row.text_tokens),
        mean(lambda row: row.label_tokens),
        mean(lambda row: len(row.images)),
        MeasuredRows(rows),
    )

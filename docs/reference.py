"""Generates the reference pages from the code: every key of an experiment file, every method, every verb.

mkdocs-gen-files runs it while the site is built; `python docs/reference.py FOLDER` writes the same pages to a folder.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from fractions import Fraction
from inspect import getdoc
from pathlib import Path
from types import FunctionType
from typing import Any, get_args

import typer
import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from orchestrator import plugin, registry
from orchestrator.cli import app
from orchestrator.spec.base import Component, Spec
from orchestrator.spec.components import AMOUNTS, CompressorSpec
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.yaml.schema import Shape, experiment_schema, first_sentence, shape_of

GRID = ("matrix", "zip", "exclude", "include", "controls", "cell_name")
# (page, title, what stands at its head, the top-level keys it holds)
PAGES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("index", "The experiment file", "One YAML file is one experiment. Unknown keys are errors; `null` puts a key back "
     "to its default. Sections have pages of their own.",
     ("schema_version", "name", "description", "extends", "plugins", "seed")),
    ("model", "model", "Which vision-language model is trained, and where its weights come from.", ("model",)),
    ("data", "data", "Named data sets. `kind` chooses the format.", ("data",)),
    ("compressors", "compressors", "Named variants: one point `{kind: ..., layer: ..., AMOUNT}`, or a list of several "
     "along the depth, acting one after the other. `full` and `final` are reserved names.", ("compressors",)),
    ("schedules", "schedules", "Named schedules: how a phase is divided into stages. `kind` chooses the policy.",
     ("schedules",)),
    ("phases", "phases", "The training phases. `PHASE` is `pretrain` or `finetune`.", ("phases",)),
    ("evaluate", "evaluate", "Named evaluations. `kind` chooses the method.", ("evaluate",)),
    ("grid", "The grid", "The cells of an experiment are `matrix` x each group of `zip` - `exclude` + `include`. An "
     "axis is a dotted path of the file.", GRID),
    ("cluster", "cluster", "Where and how the experiment runs. Nothing here changes a result.", ("cluster",)),
    ("tracking", "tracking", "Where results are recorded.", ("tracking",)),
    ("report", "report", "What the table of results compares.", ("report",)),
    ("search", "search", "A search of schedules and hyperparameters, for `llavolta search`.", ("search",)),
)  # fmt: skip
UNITS = (
    (r"^device_tflops$", "10^12 operations a second"),
    (r"tflops$", "10^12 operations"),
    (r"minutes$", "minutes"),
    (r"hours$", "hours"),
    (r"epochs$", "passes over the data"),
    (r"^max_steps$|^steps$|^checkpoint_every$", "optimizer steps"),
    (r"_samples$|^samples$|batch_size$", "samples"),
    (r"tokens$|_length$|^stride$", "tokens"),
    (r"ratio$|share$|^boundaries$|^dropout$|^rungs$", "share, 0 to 1"),
)
# (heading, what stands below it, the names of `orchestrator.plugin`)
PLUGIN: tuple[tuple[str, str, str], ...] = (
    ("Compressors", "[A compressor of your own](../tutorials/own-compressor.md) begins with `CompressorSpec`, `take` "
     "and `top_tokens`.", "CompressorSpec BlockCompressorSpec Compressor Context Kept Grid Learns Enters Resizes take "
     "take_windows amount_to_keep block_to_keep"),
    ("Choices and sums over tokens", "B images, N tokens each, M kept, width D. Of scores that are equal up to "
     "rounding the first in order is chosen, so that a choice is the same on every machine.",
     "top_tokens is_top ranked argmax argmin TOLERANCE cosines distances merge sum_members tokens_at places_of "
     "evenly_spaced Windows windows_over window_bounds along_both_axes at_least_float32 full_precision"),
    ("Schedules", "See [a schedule of your own](../tutorials/own-schedule.md).",
     "ScheduleSpec StageTable merge_actions DistillSpec Teaching Students teachers_of"),
    ("Data kinds", "See [a data kind of your own](../tutorials/own-data-kind.md).", "DataSpec DataSet Row Turn "
     "IMAGE_MARK VIDEO_MARK ImageRef ImageReading evenly_spread file_exists content_digest num_words raise_for_errors"),
    ("Trackers", "See [beside MLflow](metrics.md#beside-mlflow).", "Tracker CellRecord"),
    ("Evaluations", "See [an evaluation of your own](../tutorials/own-evaluation.md).",
     "EvaluationSpec GenerationSpec Evaluation EvaluationData Workers Outcome prediction greedy_answers answer_losses "
     "AnswerLoss outcome_of pictures_of mean_scores last_answer text_column prompt_batch PromptBatch generate Load "
     "device_name peak_bytes"),
    ("Contract kits", "What `llavolta check FILE.py` runs, for tests of your own.",
     "check_compressor check_schedule check_data check_evaluation"),
    ("Fields of a spec", "Types for the fields of a spec, beside Python's own and `Literal`. A wrong value is reported "
     "at its line of the experiment file.", "Spec Count Whole Integer Positive NonNegative Share Flag parse_share"),
    ("Errors", "See [exit codes](exit-codes.md).", "DataError StageRunError UsageError"),
)  # fmt: skip
FIELD_TYPES = {
    "Count": "A whole number, 1 or more.",
    "Whole": "A whole number, 0 or more.",
    "Integer": "A whole number.",
    "Positive": "A number above 0.",
    "NonNegative": "A number, 0 or more.",
    "Share": "A share from 0 to 1, exact: `1/4`, `25%` or `0.25`.",
    "Flag": "A choice: `true` or `false`.",
    "IMAGE_MARK": "What stands in a turn's text at the place of an image.",
    "VIDEO_MARK": "What stands in a turn's text at the place of a video, in a row that has one.",
    "TOLERANCE": "Scores that differ by no more than this share of their scale are equal.",
}
_LLAVOLTA = "2406.20092"
_SEGMENT = {"pretrain": "PHASE", "finetune": "PHASE"}


def pages() -> dict[str, str]:
    """Return every page, its path under docs/ to its Markdown."""
    schema = experiment_schema()
    found = {f"reference/keys/{name}.md": _page(schema, name, title, head, keys) for name, title, head, keys in PAGES}
    return {**found, "reference/commands.md": _commands(), "reference/plugin.md": _plugin()}


def _page(schema: dict[str, Any], name: str, title: str, head: str, keys: tuple[str, ...]) -> str:
    lines = [f"# {title}", "", head, ""]
    if name == "index":
        lines += ["| section | what it holds |", "|---|---|"]
        lines += [f"| [{other[1]}]({other[0]}.md) | {other[2].split('. ')[0].rstrip('.')} |" for other in PAGES[1:]] + [
            ""
        ]
    if name == "compressors":
        lines += _methods()
    for key in keys:
        field = ExperimentSpec.model_fields.get(key)
        lines += _key(schema["properties"][key], ExperimentSpec, key, key)
        for path, cls, names in _blocks(shape_of(field.annotation), key, set()) if field is not None else ():
            lines += _block(schema["$defs"], path, cls, names)
    return "\n".join(lines).rstrip() + "\n"


def _blocks(shape: Shape, path: str, seen: set[str]) -> Iterator[tuple[str, type[Spec], list[str]]]:
    """Return each model below a path once, with the fields that it adds: a family's kinds add to their base class."""
    if (values := shape.value_shape()) is not None:
        yield from _blocks(values, f"{path}.NAME", seen)
    if (items := shape.item_shape()) is not None:
        is_variant = any(isinstance(one, type) and issubclass(one, Component) for one in items.choices)
        yield from _blocks(items, path if is_variant else f"{path}.N", seen)
    for cls in shape.choices:
        if not (isinstance(cls, type) and issubclass(cls, Spec)) or cls.__name__ in seen:
            continue
        if issubclass(cls, Component) and not path.endswith(".NAME"):
            continue  # written in place of a name: the family has a page of its own
        seen.add(cls.__name__)
        yield path, cls, list(cls.model_fields)
        yield from _inner(cls, list(cls.model_fields), path, seen)
        for kind in registry.kinds(cls.registry_group) if issubclass(cls, Component) else ():
            one = registry.spec_class(cls.registry_group, kind)
            own = [name for name in one.model_fields if name not in cls.model_fields]
            yield path, one, own
            yield from _inner(one, own, path, seen)


def _inner(cls: type[Spec], names: list[str], path: str, seen: set[str]) -> Iterator[tuple[str, type[Spec], list[str]]]:
    for name in names:
        yield from _blocks(shape_of(cls.model_fields[name].annotation), f"{path}.{_SEGMENT.get(name, name)}", seen)


def _block(definitions: dict[str, Any], path: str, cls: type[Spec], names: list[str]) -> list[str]:
    """Return the keys of one model under a heading."""
    is_family = issubclass(cls, Component) and cls.model_fields["kind"].is_required()
    if issubclass(cls, Component):
        kind = None if is_family else cls.kind_name()
        kinds = registry.kinds(cls.registry_group)
        properties = definitions[registry.spec_class(cls.registry_group, kind or kinds[0]).__name__]["properties"]
        title = "Keys of every kind" if kind is None else f"`kind: {kind}`"
    else:
        properties, title = definitions[cls.__name__]["properties"], f"Keys of `{path}`"
        if values := get_args(cls.model_fields["kind"].annotation) if "kind" in cls.model_fields else ():
            title += f", `kind: {' | '.join(values)}`" if path.endswith(".NAME") else ""
    lines = [f"## {title}", "", *([] if is_family else [_doc(cls), ""])]
    if is_family:
        lines += [f"### `{path}.kind`", "", f"One of {', '.join(f'`{kind}`' for kind in kinds)}, or a plug-in's.", ""]
    for name in names:
        if name != "kind" or not issubclass(cls, Component):
            lines += _key(properties[name], cls, name, f"{path}.{name}")
    return lines


def _key(prop: dict[str, Any], cls: type[Spec], name: str, path: str) -> list[str]:
    """Return one key: its path, description, type, default, allowed values, unit, other names and an example."""
    field = cls.model_fields.get(name)
    kind, allowed = _type_and_allowed(prop)
    if field is not None and field.is_required():
        default = "required"
    else:
        default = _value(field.get_default(call_default_factory=True)) if field is not None else "`null`"
    unit = next((text for pattern, text in UNITS if re.search(pattern, name)), "")
    aliases = ", ".join(f"`{alias}`" for alias, canonical in cls.aliases.items() if canonical == name)
    row = {"type": kind, "default": default, "allowed": allowed, "unit": unit, "also written": aliases}
    shown = {title: text.replace("|", "\\|") for title, text in row.items() if text}
    lines = [f"### `{path}`", "", str(prop["description"]), ""]
    lines += [f"| {' | '.join(shown)} |", f"|{'---|' * len(shown)}", f"| {' | '.join(shown.values())} |", ""]
    if field is not None and field.examples:
        examples = [yaml.safe_dump({name: one}, sort_keys=False, width=100) for one in field.examples]
        lines += ["```yaml", "# or\n".join(examples).rstrip(), "```", ""]
    return lines


def _type_and_allowed(prop: dict[str, Any]) -> tuple[str, str]:
    """Return the type of a property in words, and the values or the range it is restricted to."""
    if "$ref" in prop:
        return "mapping", ""
    if choices := prop.get("anyOf") or prop.get("oneOf"):
        parts = [_type_and_allowed(one) for one in choices if one != {"type": "null"}]
        kinds = " or ".join(dict.fromkeys(kind for kind, _ in parts))
        return kinds, ", ".join(dict.fromkeys(text for _, text in parts if text))
    if "const" in prop:
        return "text" if isinstance(prop["const"], str) else "whole number", f"`{prop['const']}`"
    if "enum" in prop:
        return "text", ", ".join(f"`{value}`" for value in prop["enum"])
    if prop.get("type") == "array":
        kind, allowed = _type_and_allowed(prop.get("items", {}))
        return f"list of {kind}", allowed
    if prop.get("type") == "object":
        values = prop.get("additionalProperties") or next(iter(prop.get("patternProperties", {}).values()), {})
        keys = ", ".join(f"`{name}`" for name in prop.get("propertyNames", {}).get("enum", ()))
        kind, allowed = _type_and_allowed(values if isinstance(values, dict) else {})
        return f"mapping to {kind}", f"keys {keys}" if keys else allowed
    words = (("minimum", "at least"), ("exclusiveMinimum", "more than"), ("maximum", "at most"),
             ("exclusiveMaximum", "less than"))  # fmt: skip
    bounds = " and ".join(f"{word} {prop[key]:g}" for key, word in words if key in prop)
    names = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
    return names.get(str(prop.get("type")), "any value"), bounds


def _value(value: Any) -> str:
    if isinstance(value, BaseModel) or value is PydanticUndefined:
        return "the defaults of its keys"
    plain = str(value) if isinstance(value, Fraction) else list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=10**9)
    return f"`{text.strip().removesuffix('...').strip()}`"


def _doc(cls: type[Any]) -> str:
    return re.sub(r"arXiv:? ?(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", getdoc(cls) or "")


def _methods() -> list[str]:
    """Return the table of the methods: where each acts, whether it learns, what it needs, its amounts, its paper."""
    lines = ["| kind | what it does | acts at | learns | needs | amounts | source |", "|---|---|---|---|---|---|---|"]
    for kind in registry.kinds(registry.COMPRESSORS):
        cls: type[CompressorSpec] = registry.spec_class(registry.COMPRESSORS, kind)
        amounts = ", ".join(f"`{name}`" for name in AMOUNTS if _takes(cls, name))
        texts = f"{sys.modules[cls.__module__].__doc__}\n{getdoc(cls)}"
        numbers = dict.fromkeys([*([_LLAVOLTA] if "LLaVolta" in texts else []), *re.findall(r"\d{4}\.\d{5}", texts)])
        source = ", ".join(f"[arXiv:{number}](https://arxiv.org/abs/{number})" for number in numbers)
        does = first_sentence((getdoc(cls) or "").partition("\n\n")[0])
        row = (
            f"`{kind}`",
            does,
            ", ".join(cls.points),
            "yes" if cls.learns else "no",
            ", ".join(cls.needs) or "nothing",
        )
        lines.append("| " + " | ".join((*row, amounts, source or "a control")) + " |")
    return [*lines, ""]


def _takes(cls: type[CompressorSpec], amount: str) -> bool:
    place = "projector" if "decoder" not in cls.points else 1
    try:
        cls.model_validate({"kind": cls.kind_name(), "layer": place, amount: "1/4" if amount == "keep_ratio" else 4})
    except ValidationError:
        return False
    return True


def _commands() -> str:
    """Return the page of the verbs: usage, arguments and options of each, as the command line itself shows them."""
    lines = ["# Commands", "", str(app.info.help), "", str(app.info.epilog), ""]
    for name, command in sorted(typer.main.get_command(app).commands.items()):  # type: ignore[attr-defined]
        for inner, one in sorted(getattr(command, "commands", {"": command}).items()):
            lines += _command(f"{name} {inner}".strip(), one)
    return "\n".join(lines).rstrip() + "\n"


def _command(name: str, command: Any) -> list[str]:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    usage = " ".join(["llavolta", name, *(_argument(one) for one in arguments)])
    text = " ".join((command.help or "").split())
    lines = [f"## `{name}`", "", text, "", "```console", f"$ {usage}{' [OPTIONS]' if options else ''}", "```", ""]
    if command.params:
        lines += ["| argument or option | default | what it does |", "|---|---|---|"]
    for one in (*arguments, *options):
        names = _argument(one) if one in arguments else ", ".join(one.opts)
        value = "" if one in arguments or one.is_flag else f" {one.metavar or one.name.upper()}"
        default = "required" if one.required else "" if one.default in (None, False, ()) else f"`{one.default}`"
        lines.append(
            f"| `{names}{value}` | {default} | {' '.join((one.help or '').split()).replace('|', chr(92) + '|')} |"
        )
    return [*lines, ""]


def _argument(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _plugin() -> str:
    """Return the page of `orchestrator.plugin`: every name that a plug-in's author may import, from its docstring."""
    lines = ["# The plug-in module", "", "All that a plug-in imports: `from orchestrator import plugin`. What needs "
             "torch in it is loaded when it is first used, which is when an implementation runs.", ""]  # fmt: skip
    for title, head, names in PLUGIN:
        lines += [f"## {title}", "", head, ""]
        for name in names.split():
            lines += _plugin_name(name, getattr(plugin, name))
    return "\n".join(lines).rstrip() + "\n"


def _plugin_name(name: str, value: Any) -> list[str]:
    if name in FIELD_TYPES:
        shown = f" It is `{value!r}`." if isinstance(value, str | float) else ""
        return [f"### `{name}`", "", f"{FIELD_TYPES[name]}{shown}", ""]
    call = _call(value)
    lines = [f"### `{name}`", "", *([f"`{name}{call}`", ""] if call else []), *_sections(getdoc(value) or "")]
    if not inspect.isclass(value) or issubclass(value, Exception):
        return lines
    methods = {
        key: getattr(value, key)
        for key, one in vars(value).items()
        if not key.startswith("_") and isinstance(one, FunctionType | classmethod) and getdoc(one)
    }
    texts = [
        f"* `{key}{_call(one)}`: {' '.join((getdoc(one) or '').partition(chr(10) * 2)[0].split())}"
        for key, one in methods.items()
    ]
    return [*lines, *(["**Methods**", "", *texts, ""] if texts else [])]


def _call(value: Any) -> str:
    """Return the parameters of a function, or of a class that is called as one, without their types."""
    if inspect.isclass(value) and (not hasattr(value, "__dataclass_fields__") or issubclass(value, Exception)):
        return ""
    shown = [
        f"{one.name}={one.default!r}" if isinstance(one.default, str | int | float | tuple | None) else one.name
        for one in inspect.signature(value).parameters.values()
        if one.name != "self"
    ]
    return f"({', '.join(shown)})"


def _sections(text: str) -> list[str]:
    """Return a Google-style docstring as Markdown: its sections as lists."""
    lines: list[str] = []
    parts = re.split(r"^(Args|Attributes|Returns|Raises|Example):\n", text, flags=re.MULTILINE)
    lines += [parts[0].strip(), ""]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        if title == "Example":
            lines += ["```python", inspect.cleandoc(body).replace(">>> ", ""), "```", ""]
            continue
        entries = [" ".join(one.split()) for one in re.split(r"\n    (?=\S)", f"\n{body.rstrip()}")[1:]]
        named = [re.sub(r"^(\w+): ", r"`\1`: ", one) for one in entries] if title != "Returns" else [" ".join(entries)]
        lines += [f"**{title}**", "", *(f"* {one}" for one in named), ""]
    return lines


def write(folder: Path) -> None:
    """Write every page under a folder."""
    for name, text in pages().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
elif __name__ == "<run_path>":  # as mkdocs-gen-files runs it
    import mkdocs_gen_files

    for _name, _text in pages().items():
        with mkdocs_gen_files.open(_name, "w") as _file:
            _file.write(_text)

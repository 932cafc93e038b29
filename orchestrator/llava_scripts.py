"""import_llavolta(): the training scripts of LLaVA and LLaVolta as an experiment."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import ErrorDetail, SpecError, UsageError
from orchestrator.experiment import Experiment, load

_CONFIGS = {
    ("lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"): ("llava-hf/llava-1.5-7b-hf", 32),
    ("lmsys/vicuna-13b-v1.5", "openai/clip-vit-large-patch14-336"): ("llava-hf/llava-1.5-13b-hf", 40),
}
"""Models of transformers and their decoder layers, by the language model and the vision tower of a script."""
_ROWS = {"blip_laion_cc_sbu_558k.json": 558_128, "llava_v1_5_mix665k.json": 665_298}
_TEMPLATES = {"plain": "plain", "v1": "vicuna_v1", "vicuna_v1": "vicuna_v1"}
_ZERO = {"zero2.json": "zero2", "zero3.json": "zero3", "zero3_offload.json": "zero3_offload"}
# What a call means where it does not say: the fields' defaults in llava/train/train.py and transformers' Trainer.
_DEFAULTS = {
    "version": "v0", "freeze_backbone": "False", "tune_mm_mlp_adapter": "False", "freeze_mm_mlp_adapter": "False",
    "image_aspect_ratio": "square", "model_max_length": "512", "group_by_modality_length": "False",
    "gradient_checkpointing": "False", "bf16": "False", "fp16": "False", "num_train_epochs": "3", "max_steps": "-1",
    "per_device_train_batch_size": "8", "gradient_accumulation_steps": "1", "learning_rate": "5e-5",
    "weight_decay": "0", "warmup_ratio": "0", "lr_scheduler_type": "linear", "max_grad_norm": "1", "seed": "42",
    "lora_enable": "False", "lora_r": "64", "lora_alpha": "16", "lora_dropout": "0.05",
    "layers": "33", "strides": "1", "pivots": "2600", "grouping": "none", "progressive": "False",
}  # fmt: skip
_NAMED = {
    "deepspeed", "model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter", "data_path", "image_folder",
    "output_dir", "mm_projector_lr",
}  # fmt: skip
# Fields with one value that has a counterpart here, first what they are where a script does not say.
_FIXED = {
    "mm_vision_select_layer": ("-1", "-2"), "mm_projector_type": ("linear", "mlp2x_gelu"),
    "mm_vision_select_feature": ("patch", "patch"), "mm_use_im_start_end": ("False", "False"),
    "mm_patch_merge_type": ("flat", "flat"), "lora_bias": ("none", "none"), "lora_weight_path": ("", ""),
    "bits": ("16", "16"), "halfpool": ("False", "False"), "unified_vpe": ("False", "False"), "citer": ("1", "1"),
    "pretrain_abstractor": ("False", "False"), "tune_abstractor": ("False", "False"),
}  # fmt: skip
_OF_THE_CONFIG = ("mm_vision_select_layer", "mm_projector_type", "mm_vision_select_feature")
# Of no consequence for what is learned, or decided by the orchestrator.
_LEFT_OUT = {
    "per_device_eval_batch_size", "evaluation_strategy", "eval_strategy", "save_strategy", "save_steps",
    "save_total_limit", "logging_steps", "tf32", "dataloader_num_workers", "lazy_preprocess", "is_multimodal",
    "report_to", "run_name", "cache_dir", "mm_use_im_patch_token", "local_rank", "ddp_timeout",
}  # fmt: skip
_HARMLESS = {"echo", "set", "mkdir", "source", ".", "conda", "module", "date", "wandb", "exit", "wait"}
_TRAINS = re.compile(r"(^|/)train(_mem|_xformers)?\.py$")
_ASSIGNMENT = re.compile(r"^([A-Za-z_]\w*)=(.*)$", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_NUMBER = re.compile(r"^(-1|[0-9]+)$")


def import_llavolta(
    scripts: Sequence[str | os.PathLike[str]],
    file: str | os.PathLike[str],
    *,
    model: str | None = None,
    gpus: int = 8,
    define: Mapping[str, str] | None = None,
    drop_unreachable: bool = False,
) -> tuple[Experiment, list[str]]:
    """Write the experiment that training scripts of LLaVA or LLaVolta describe, and load it.

    A call of `llava/train/train*.py` with `--tune_mm_mlp_adapter True` is the phase `pretrain`, another one `finetune`.
    LLaVolta's lists `--layers`, `--strides` and `--pivots` become stages. Its pivots count forward passes from the
    phase's start (`llava_llama.py`, `step_stride`), so accumulation divides them. What has no counterpart is refused,
    all of it at once; relative paths are taken from the current folder, as the scripts take them.

    Args:
        scripts: Shell scripts, read as one; they are not run.
        file: YAML file to write; it must not exist.
        model: A folder or hub id with the config and processor of the LLaVA that the scripts put together; null knows
            LLaVA-1.5's.
        gpus: GPUs that the scripts run on, where they do not say.
        define: Values of variables, in place of those in the scripts; `1` is the first argument of a script.
        drop_unreachable: Leave out stages that a script never reaches, which are refused otherwise.

    Returns:
        The experiment, and what a reader should know: flags that were left out, what was assumed.

    Raises:
        SpecError: the scripts hold what cannot be taken over, each with its line.
        UsageError: a script cannot be read, or the file exists or is no `.yaml`.
    """
    target = Path(file)
    if target.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{target}: name a .yaml file")
    faults: list[ErrorDetail] = []
    calls = [call for script in scripts for call in _calls(Path(script), dict(define or {}), faults)]
    reading = _Reading(faults, gpus, drop_unreachable)
    document = reading.experiment(calls, model, target.stem) if calls else {}
    if not calls and not faults:
        names = ", ".join(map(str, scripts))
        raise UsageError(f"{names}: there is no call of llava/train/train.py or train_mem.py")
    if faults:
        raise SpecError(faults)
    notes = reading.notes()
    head = [f"# From {', '.join(Path(script).name for script in scripts)}, by `llavolta import-llavolta`.", "#"]
    head += [f"# Plan:   llavolta plan {target.name}", f"# Run:    llavolta run {target.name}"]
    head += [f"# {line}" for line in ("", *notes)] if notes else []
    text = yaml.safe_dump(document, sort_keys=False, width=116, allow_unicode=True)
    try:
        with target.open("x", encoding="utf-8") as stream:
            stream.write("\n".join([*(line.rstrip() for line in head), text]))
    except FileExistsError:
        raise UsageError(f"{target} exists; import-llavolta overwrites nothing, so name another file") from None
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error}") from error
    try:
        return load(target), notes
    except SpecError:
        target.unlink()
        raise


@dataclass(frozen=True)
class _Word:
    """A word of a script as it is after expansion, and the line that decides it: a variable's own."""

    text: str
    file: str
    line: int


@dataclass(frozen=True)
class _Call:
    """A call of the training program.

    Attributes:
        at: Its first word.
        launcher: Words before the program.
        flags: Value of each flag; `True` for one without.
    """

    at: _Word
    launcher: tuple[_Word, ...]
    flags: dict[str, _Word]

    def __getitem__(self, name: str) -> str:
        return self.flags[name].text if name in self.flags else _DEFAULTS.get(name, "")

    def is_true(self, name: str) -> bool:
        return self[name].lower() in ("true", "1", "yes")


def _fault(
    word: _Word, message: str, path: str = "", hint: str | None = None, allowed: str | None = None
) -> ErrorDetail:
    value = word.text if path else None
    return ErrorDetail(
        message, file=word.file, line=word.line, column=1, path=path, value=value, hint=hint, allowed=allowed
    )


def _calls(script: Path, define: dict[str, str], faults: list[ErrorDetail]) -> Iterator[_Call]:
    """Yield the calls of a script, in order; everything else of it is a variable, harmless, or a fault."""
    try:
        lines = script.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{script} cannot be read: {error}") from error
    variables = {name: _Word(text, "--define", 1) for name, text in define.items()}
    for words in _commands(script, lines, faults):
        words = words[1:] if words[0].text == "export" else words
        assigned = 0
        while assigned < len(words) and (found := _ASSIGNMENT.match(words[assigned].text)):
            word = _expanded(_Word(found[2], words[assigned].file, words[assigned].line), variables, faults)
            if found[1] not in define:
                variables[found[1]] = word
            assigned += 1
        command = [_expanded(word, variables, faults) for word in words[assigned:]]
        program = next((at for at, word in enumerate(command) if _TRAINS.search(word.text)), None)
        if program is not None:
            yield _Call(command[0], tuple(command[:program]), _flags(command[program + 1 :], faults))
        elif command and command[0].text not in _HARMLESS:
            message = f"`{command[0].text}` is not read: only variables and calls of llava/train/train*.py are"
            faults.append(_fault(command[0], message, hint="take the line out, or write what it does in its place"))


def _commands(script: Path, lines: Sequence[str], faults: list[ErrorDetail]) -> Iterator[list[_Word]]:
    """Yield the commands of a script, each as its words, up to where its output is sent elsewhere."""
    words: list[_Word] = []
    for number, line in enumerate(lines, 1):
        continued = line.rstrip().endswith("\\") and not line.lstrip().startswith("#")
        try:
            found = shlex.split(line.rstrip()[:-1] if continued else line, comments=True)
        except ValueError as error:
            faults.append(_fault(_Word(line, str(script), number), f"the line cannot be read: {error}"))
            found = []
        words += [_Word(text, str(script), number) for text in found]
        if not continued and words:
            ends = next((at for at, word in enumerate(words) if re.match(r"^(\d?>|\||&$)", word.text)), len(words))
            yield words[:ends] or words
            words = []
    if words:
        yield words


def _expanded(word: _Word, variables: Mapping[str, _Word], faults: list[ErrorDetail]) -> _Word:
    """Return a word with its variables' values; one that is a variable and nothing else stands where that is set."""
    if "$(" in word.text or "`" in word.text or re.search(r"(^|\w)(;|&&)", word.text):
        faults.append(_fault(word, f"`{word.text}` runs a command, and scripts are read, not run"))
        return word

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name in variables:
            return variables[name].text
        faults.append(_fault(word, f"${name} is not set", hint=f"--define {name}=..."))
        return ""

    alone = _VARIABLE.fullmatch(word.text)
    if alone and (found := variables.get(alone[1] or alone[2])):
        return found
    return replace(word, text=_VARIABLE.sub(value, word.text))


def _flags(words: Sequence[_Word], faults: list[ErrorDetail]) -> dict[str, _Word]:
    flags: dict[str, _Word] = {}
    at = 0
    known = {*_DEFAULTS, *_NAMED, *_FIXED, *_LEFT_OUT}
    while at < len(words):
        word = words[at]
        at += 1
        if not word.text.startswith("--"):
            faults.append(_fault(word, f"`{word.text}` is no flag"))
            continue
        name, equals, text = word.text[2:].replace("-", "_").partition("=")
        if equals:
            value = _Word(text, word.file, word.line)
        elif at < len(words) and not words[at].text.startswith("--"):
            value = words[at]
            at += 1
        else:
            value = _Word("True", word.file, word.line)
        if name not in known:
            faults.append(_fault(word, f"--{name} is not known, so that what it changes would be lost"))
        flags[name] = value
    return flags


@dataclass
class _Reading:
    """What the calls mean; faults and notes are gathered on the way."""

    faults: list[ErrorDetail]
    gpus: int
    drop_unreachable: bool
    _notes: list[str] = field(default_factory=list)
    _left_out: set[str] = field(default_factory=set)
    _compressors: dict[str, dict[str, Any]] = field(default_factory=dict)
    _schedules: dict[str, dict[str, Any]] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """Return what was assumed and left out, a sentence each."""
        left = f"left out: {', '.join(f'--{name}' for name in sorted(self._left_out))}"
        return [*self._notes, *([left] if self._left_out else [])]

    def experiment(self, calls: Sequence[_Call], model: str | None, name: str) -> dict[str, Any]:
        """Return the experiment as it is written."""
        by_phase: dict[str, _Call] = {}
        for call in calls:
            phase = "pretrain" if call.is_true("tune_mm_mlp_adapter") else "finetune"
            if phase in by_phase:
                hint = "import them one by one, or make them cells of one grid by hand"
                self.faults.append(_fault(call.at, f"a second call for the phase {phase}", hint=hint))
            by_phase.setdefault(phase, call)
        by_phase = {phase: by_phase[phase] for phase in ("pretrain", "finetune") if phase in by_phase}
        for call in by_phase.values():
            self._check(call, model)
            self._left_out |= _LEFT_OUT & call.flags.keys()
        last = list(by_phase.values())[-1]
        gpus = self._gpus(last)
        document = {
            "schema_version": 1,
            "name": re.sub(r"[^A-Za-z0-9_.-]+", "-", name),
            "seed": self._whole(last, "seed"),
            "model": self._model(by_phase, model),
            "data": {phase: self._data(call) for phase, call in by_phase.items()},
            "compressors": self._compressors,
            "schedules": self._schedules,
            "phases": {phase: self._phase(phase, call, gpus) for phase, call in by_phase.items()},
            "cluster": {
                "num_workers": gpus, "use_gpu": True, "resources_per_worker": {"CPU": 4, "GPU": 1},
                "checkpoint_every": 500,
            },
        }  # fmt: skip
        return {key: value for key, value in document.items() if value != {}}

    def _check(self, call: _Call, model: str | None) -> None:
        for flag, (default, only) in _FIXED.items():
            given = call.flags.get(flag, _Word(default, call.at.file, call.at.line))
            if given.text == only:
                continue
            if flag in _OF_THE_CONFIG and model is not None:
                self._notes.append(
                    f"--{flag} {given.text} is a matter of the config of {model}, which is taken as it is"
                )
                continue
            message = "has no counterpart here" if flag in call.flags else f"is {default!r} where a call does not say"
            hint = "give --model, a LLaVA whose config says it" if flag in _OF_THE_CONFIG else None
            self.faults.append(_fault(given, message, f"--{flag}", hint, only or "''"))

    def _model(self, by_phase: Mapping[str, _Call], model: str | None) -> dict[str, Any]:
        last = list(by_phase.values())[-1]
        parts = []
        for flag in ("model_name_or_path", "vision_tower"):
            found = {call[flag] for call in by_phase.values()}
            if "" in found:
                self.faults.append(_fault(last.at, f"the call names no --{flag}"))
            elif len(found) > 1:
                self.faults.append(_fault(last.flags[flag], "the calls of the two phases differ", f"--{flag}"))
            parts.append(last[flag])
        language_model, tower = parts
        known = model or _CONFIGS.get((language_model, tower), (None, 0))[0]
        if known is None and all(parts):
            self.faults.append(_fault(
                last.flags["model_name_or_path"], "which LLaVA this is with its vision tower is not known",
                "--model_name_or_path", "give --model, a folder or hub id with its config and processor",
            ))  # fmt: skip
        return {
            "model_name_or_path": known,
            "weights": {
                "vision_tower": tower, "language_model": language_model, "projector": self._projector(by_phase)
            },
            "dtype": "bfloat16" if last.is_true("bf16") else "float16" if last.is_true("fp16") else "float32",
        }  # fmt: skip

    def _projector(self, by_phase: Mapping[str, _Call]) -> str:
        """Return where the projector comes from; the finetuning must start from what the pretraining writes."""
        given = None if "finetune" not in by_phase else by_phase["finetune"].flags.get("pretrain_mm_mlp_adapter")
        if "pretrain" not in by_phase:
            return "random" if given is None else _path(given.text)
        first = by_phase["pretrain"]
        written = os.path.normpath(f"{first['output_dir']}/mm_projector.bin")
        if "finetune" in by_phase and (given is None or os.path.normpath(given.text) != written):
            word = given or by_phase["finetune"].at
            message = f"the finetuning does not start from what line {first.at.line} trains, {written}"
            hint = "correct the script, or import the finetuning alone"
            self.faults.append(_fault(word, message, "--pretrain_mm_mlp_adapter", hint))
        return "random"

    def _data(self, call: _Call) -> dict[str, Any]:
        for flag in ("data_path", "image_folder"):
            if not call[flag]:
                self.faults.append(_fault(call.at, f"the call names no --{flag}"))
        version = call.flags.get("version", _Word("v0", call.at.file, call.at.line))
        if version.text not in _TEMPLATES:
            allowed = ", ".join(_TEMPLATES)
            self.faults.append(
                _fault(version, "there is no such conversation template here", "--version", None, allowed)
            )
        ratio = call.flags.get("image_aspect_ratio", _Word("square", call.at.file, call.at.line))
        if ratio.text not in ("pad", "square"):
            self.faults.append(_fault(ratio, "has no counterpart", "--image_aspect_ratio", None, "pad, square"))
        data = {
            "kind": "llava_json",
            "data_path": _path(call["data_path"]),
            "image_folder": _path(call["image_folder"]),
            "conversation_template": _TEMPLATES.get(version.text),
            "ambiguous_images": "load_image",
        }
        rows = _ROWS.get(os.path.basename(call["data_path"]))
        return (
            data
            | ({"image_aspect_ratio": "pad"} if ratio.text == "pad" else {})
            | ({} if rows is None else {"num_samples": rows})
        )

    def _phase(self, phase: str, call: _Call, gpus: int) -> dict[str, Any]:
        each = self._whole(call, "per_device_train_batch_size")
        batch = each * self._whole(call, "gradient_accumulation_steps") * gpus
        steps, epochs = self._whole(call, "max_steps"), self._number(call, "num_train_epochs")
        rows = _ROWS.get(os.path.basename(call["data_path"]))
        if steps > 0:
            length: dict[str, Any] = {"max_steps": steps}
            total: int | None = steps
        else:
            length = {"num_train_epochs": int(epochs) if epochs == int(epochs) else epochs}
            total = None if rows is None or batch < 1 else math.ceil(rows * epochs / batch)
        trained = ["projector"]
        if phase == "finetune":
            trained = [] if call.is_true("freeze_mm_mlp_adapter") else ["projector"]
            trained += [] if call.is_true("freeze_backbone") else ["language_model"]
        if not trained:
            self.faults.append(_fault(call.at, "the call trains nothing", hint="--freeze_backbone False"))
        rate: Any = self._number(call, "learning_rate")
        if call["mm_projector_lr"]:
            rate = {part: self._number(call, "mm_projector_lr") if part == "projector" else rate for part in trained}
        lora = {}
        if call.is_true("lora_enable"):
            lora = {"lora": {
                "r": self._whole(call, "lora_r"), "alpha": self._whole(call, "lora_alpha"),
                "dropout": self._number(call, "lora_dropout"),
            }}  # fmt: skip
        return {
            "data": phase,
            "train": trained,
            **lora,
            "schedule": self._schedule(phase, call, total),
            **length,
            "global_batch_size": batch,
            "per_device_train_batch_size": each,
            "learning_rate": rate,
            "lr_scheduler_type": call["lr_scheduler_type"],
            "warmup_ratio": self._number(call, "warmup_ratio"),
            "weight_decay": self._number(call, "weight_decay"),
            "max_grad_norm": self._number(call, "max_grad_norm"),
            "model_max_length": self._whole(call, "model_max_length"),
            "group_by_modality_length": call.is_true("group_by_modality_length"),
            "gradient_checkpointing": call.is_true("gradient_checkpointing"),
            "deepspeed": self._deepspeed(call),
        }

    def _deepspeed(self, call: _Call) -> str:
        given = call["deepspeed"]
        if not given:
            self._notes.append(f"line {call.at.line} names no --deepspeed: zero0 is taken")
            return "zero0"
        return _ZERO.get(os.path.basename(given)) or _path(given)

    def _schedule(self, phase: str, call: _Call, total: int | None) -> str:
        """Return the name of the schedule that LLaVolta's lists describe."""
        grouping = call.flags.get("grouping", _Word("none", call.at.file, call.at.line))
        if grouping.text == "none":
            return "full"
        if grouping.text != "avgpool1d":
            self.faults.append(_fault(grouping, "is not in LLaVolta's release", "--grouping", None, "avgpool1d, none"))
            return "full"
        layers, strides = self._list(call, "layers"), self._list(call, "strides")
        if layers is None or strides is None:
            return "full"
        if len(layers) != len(strides):
            message = f"{len(strides)} strides for {len(layers)} layers"
            self.faults.append(_fault(call.flags.get("strides", call.at), message, "--strides"))
            return "full"
        if min(strides) < 1 or min(layers) < -1:
            message = "a stride is at least 1 and a layer at least -1, the projector's output"
            self.faults.append(_fault(call.flags.get("strides", call.at), message, "--strides"))
            return "full"
        depth = _CONFIGS.get((call["model_name_or_path"], call["vision_tower"]), (None, None))[1]
        variants = [self._variant(*pair, depth) for pair in zip(layers, strides, strict=True)]
        if not call.is_true("progressive"):
            if len(variants) > 1:
                word = call.flags.get("progressive", call.flags.get("layers", call.at))
                message = f"the lists have {len(variants)} stages, of which there is one without `--progressive True`"
                self.faults.append(_fault(word, message, "--progressive"))
            return variants[0]
        return self._stages(phase, call, variants, strides, total)

    def _stages(self, phase: str, call: _Call, variants: list[str], strides: Sequence[int], total: int | None) -> str:
        pivots, word = self._list(call, "pivots"), call.flags.get("pivots", call.at)
        if pivots is None:
            return "full"
        if len(pivots) != len(variants) - 1 and not (len(variants) == 1 and "pivots" not in call.flags):
            message = f"{len(pivots)} pivots for {len(variants)} stages; there is one between two stages"
            self.faults.append(_fault(word, message, "--pivots"))
            return "full"
        pivots = pivots[: len(variants) - 1]
        if any(after <= before for before, after in pairwise([0, *pivots])):
            message = "pivots count from the start of the phase, so each is larger than the one before"
            self.faults.append(_fault(word, message, "--pivots"))
            return "full"
        if 1 in strides[:-1]:
            message = (
                "a stage of stride 1 is never left (`stride > 1` in step_stride), so that what follows never starts"
            )
            self.faults.append(_fault(call.flags.get("strides", call.at), message, "--strides"))
            return "full"
        accumulation = self._whole(call, "gradient_accumulation_steps")
        if any(pivot % accumulation for pivot in pivots):
            message = (
                f"pivots count forward passes; with {accumulation} of them a step, a stage would end inside a step"
            )
            self.faults.append(_fault(word, message, "--pivots", f"multiples of {accumulation}"))
            return "full"
        ends = [pivot // accumulation for pivot in pivots]
        late = [end for end in ends if total is not None and end >= total]
        if late and not self.drop_unreachable:
            message = f"{late[0] * accumulation} is never reached: the phase has {total} steps"
            self.faults.append(_fault(word, message, "--pivots", "--drop-unreachable leaves out what follows it"))
            return "full"
        kept = len(ends) - len(late)
        if late:
            self._notes.append(f"{phase}: what follows pivot {pivots[kept]} is never reached and left out")
        if total is None and ends:
            self._notes.append(f"{phase}: whether every pivot is reached is checked once the data is there")
        if not kept:
            return variants[0]
        lengths = [{"steps": after - before} for before, after in pairwise([0, *ends[:kept]])]
        stages = [
            {**length, **({} if variant == "full" else {"compressor": variant})}
            for length, variant in zip([*lengths, {}], variants, strict=False)
        ]
        self._schedules[f"{phase}_stages"] = {"kind": "stages", "stages": stages}
        return f"{phase}_stages"

    def _variant(self, layer: int, stride: int, depth: int | None) -> str:
        """Return the name of average pooling before a layer; -1 pools what the projector gives, before it joins the
        text, so that the text's positions close up; a layer that the decoder does not have never pools.
        """
        if stride == 1 or (depth is not None and layer >= depth):
            return "full"
        name = f"k{layer}_s{stride}" if layer >= 0 else f"projector_s{stride}"
        point = {"kind": "average_pool", "layer": max(layer, 0), "stride": stride}
        self._compressors[name] = point | ({"positions": "renumber"} if layer < 0 else {})
        return name

    def _list(self, call: _Call, flag: str) -> list[int] | None:
        word = call.flags.get(flag, _Word(_DEFAULTS[flag], call.at.file, call.at.line))
        numbers = [part.strip() for part in word.text.split(",")]
        if not all(map(_NUMBER.match, numbers)):
            self.faults.append(_fault(word, "is no list of whole numbers", f"--{flag}"))
            return None
        return [int(number) for number in numbers]

    def _whole(self, call: _Call, flag: str) -> int:
        number = self._number(call, flag)
        if number != int(number):
            self.faults.append(_fault(call.flags[flag], "is no whole number", f"--{flag}"))
        return int(number)

    def _number(self, call: _Call, flag: str) -> float:
        try:
            number = float(call[flag])
            if math.isfinite(number):
                return number
        except ValueError:
            pass
        self.faults.append(_fault(call.flags.get(flag, call.at), "is no number", f"--{flag}"))
        return 1.0

    def _gpus(self, call: _Call) -> int:
        """Return the GPUs that a launcher names, else those that are said to be."""
        words = [part for word in call.launcher for part in word.text.split("=", 1)]
        counts = {}
        for flag, value in pairwise(words):
            name = flag.lstrip("-").replace("-", "_")
            if name in ("num_gpus", "nproc_per_node", "num_nodes", "nnodes"):
                if not value.isdecimal():
                    self.faults.append(_fault(call.at, f"{flag} {value} is no number; give the whole with --gpus"))
                    return self.gpus
                counts["each" if "gpus" in name or "proc" in name else "nodes"] = int(value)
            elif name == "include":
                counts["each"] = sum(host.rpartition(":")[2].count(",") + 1 for host in value.split("@"))
        if "each" in counts:
            return counts["each"] * counts.get("nodes", 1)
        self._notes.append(f"the script does not say on how many GPUs it runs: {self.gpus} are taken (--gpus)")
        return self.gpus


def _path(text: str) -> str:
    return os.path.normpath(os.path.abspath(text)) if text else text

"""A trained cell as a Hugging Face folder, and such a folder as a model with its compressor attached."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel

from orchestrator import registry
from orchestrator.compression import attach
from orchestrator.compression.attach import unwrap
from orchestrator.data.processing.processor import VisionTextProcessor, load_processor
from orchestrator.data.processing.templates import jinja_of
from orchestrator.data.rows import data_spec, template_of
from orchestrator.errors import OTHER_STORAGE, StageRunError, UsageError
from orchestrator.models.build import (
    build_model,
    compute_dtype,
    quiet_loading,
    save_weights,
    weight_tensors,
)
from orchestrator.models.compressor_weights import learned_weights, load_learned, named_in_file
from orchestrator.models.initial_weights import load_pretrained
from orchestrator.models.lora import lora_config
from orchestrator.models.parts import LANGUAGE_MODEL, part_of_or_none
from orchestrator.models.shrink import copy_processor_files
from orchestrator.plan.cell_record import CellRecord
from orchestrator.plan.cells.cell import Cell
from orchestrator.plan.experiment_plan import ExperimentPlan
from orchestrator.plan.ledger.files import storage_errors
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.phase import LoraSpec

NOTE_FILE = "llavolta.json"
COMPRESSORS_FILE = "compressors.safetensors"
MAX_SHARD_SIZE = "5GB"
_FORMAT = 1
_STAGES = 20  # rows of a phase in the card
_PADDED = (
    "It was trained on images padded to a square with the processor's mean colour, which the processor does not do."
)
_WRITERS = ("llavolta-orchestrator", "torch", "transformers", "peft")
_ADAPTER_CONFIG = "adapter_config.json"
_LOW_RANK_TOLERANCE = 1e-5  # of the largest weight: what float32 loses when adapters are merged is a hundredth of it


def export_cell(walk: ExperimentPlan, cell: Cell, folder: str | Path, *, adapter: bool = False) -> Path:
    """Write a trained cell as a Hugging Face folder; it appears when it is complete.

    Plain transformers loads it as the model on full tokens; `load_exported` attaches the compressor that the cell's
    final stage ended with.

    Args:
        walk: The cell's experiment.
        cell: The cell.
        folder: Folder to make; an empty one may be there.
        adapter: Write LoRA as a peft adapter beside the name of its base model; otherwise it is merged.

    Returns:
        The folder, absolute.

    Raises:
        UsageError: the folder holds something, the cell has no weights, or they are no adapter of a named model.
        DamagedStateError: the weights are damaged.
        StorageError: the folder cannot be written.
    """
    target = Path(folder).expanduser().absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"export: {target} exists already; name a new folder, or take that one away")
    record = walk.record(cell)
    weights = _weights_of(walk, cell, record)
    model = ModelSpec.model_validate(cell.root.model)
    note = _note(walk, cell, record, model)
    aside = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    with storage_errors(target.parent):
        aside.mkdir(parents=True)
        try:
            if adapter:
                note["base_model"] = _write_adapter(cell, model, weights, aside)
            else:
                _write_model(cell, model, weights, aside)
            if learned := named_in_file(learned_weights(weights)):
                save_weights(learned, aside / COMPRESSORS_FILE)
                note["compressor_weights"] = COMPRESSORS_FILE
            (aside / NOTE_FILE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
            (aside / "README.md").write_text(model_card(cell, record, note), encoding="utf-8")
            for file in aside.iterdir():  # safetensors leaves its files to their owner alone
                file.chmod((aside / NOTE_FILE).stat().st_mode)
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target


def _weights_of(walk: ExperimentPlan, cell: Cell, record: CellRecord) -> Path:
    """Return the cell's weights file, downloaded and checked."""
    if not walk.ledger.is_done(cell.state):
        raise UsageError(
            f"export: cell {cell.name} is not trained yet (it is {record.status} in the storage {walk.ledger.url}); "
            f"run the experiment first, or {OTHER_STORAGE}"
        )
    if not walk.ledger.has(cell.state, "weights"):
        raise UsageError(
            f"export: the weights of cell {cell.name} were not kept (cluster.keep: {{leaf: none}}, or `ledger gc`); "
            "set cluster.keep: {leaf: weights} and run the experiment again, which trains what is missing"
        )
    return walk.ledger.fetch(cell.state, "weights") / "model.safetensors"


def _note(walk: ExperimentPlan, cell: Cell, record: CellRecord, model: ModelSpec) -> dict[str, Any]:
    """Return the content of `llavolta.json`."""
    final = cell.phases[-1].schedule.final.points if cell.phases else ()
    summary = {name: dict[str, float]() for name in ("eval", "cost")}
    for name, value in record.summary.items():
        summary[name.partition("/")[0]][name] = value
    return {
        "format": _FORMAT,
        "experiment": walk.loaded.spec.name,
        "experiment_spec_sha": record.tags["experiment_spec_sha"],
        "cell": {"id": cell.id, "name": cell.name, "axes": cell.axes},
        "points": [dict(point) for point in final],
        "compressor_weights": None,
        "base_model": None,
        "dtype": compute_dtype(model),
        "image_aspect_ratio": _aspect_ratio(cell),
        "video": _frames(cell),
        "plugins": [Path(reference).name for reference in cell.root.plugins],
        "scores": summary["eval"],
        "cost": summary["cost"],
        "recipe": record.params,
        "trained_with": {name: record.tags[name] for name in ("hardware", "versions") if name in record.tags},
        "written_with": {name: version(name) for name in _WRITERS},
    }


def _aspect_ratio(cell: Cell) -> str | None:
    """Return `pad` where the last phase was trained on images that were padded to a square, else None."""
    entries = cell.phases[-1].data if cell.phases else ()
    return next((found for entry in entries if (found := entry["spec"].get("image_aspect_ratio"))), None)


def _frames(cell: Cell) -> dict[str, Any] | None:
    """Return how frames were taken of the last phase's videos; None without any, or where its data sets differ."""
    entries = cell.phases[-1].data if cell.phases else ()
    ways = {
        (entry["spec"]["num_frames"], entry["spec"]["fps"])
        for entry in entries
        if data_spec(entry["spec"]).has_videos()
    }
    return dict(zip(("num_frames", "fps"), ways.pop(), strict=True)) if len(ways) == 1 else None


def _write_model(cell: Cell, model: ModelSpec, weights: Path, folder: Path) -> None:
    """Write config, processor and safetensors of the complete model."""
    processor = _write_processor(cell, model, folder)
    eager = model.model_copy(update={"attn_implementation": "eager"})
    built = build_model(eager, weights, getattr(torch, compute_dtype(model)))
    built.generation_config = _generation_config(built, processor, folder)
    with quiet_loading():
        built.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)


def _write_processor(cell: Cell, model: ModelSpec, folder: Path) -> VisionTextProcessor:
    """Copy the processor's files, the chat template being the one that the last phase was trained with.

    Where its data sets do not agree on one, the model's own stays.
    """
    copy_processor_files(model, folder)
    processor = load_processor(model)
    entries = cell.phases[-1].data if cell.phases else ()
    found = {template_of(data_spec(entry["spec"])) for entry in entries}
    template = jinja_of(found.pop(), processor.image_token, processor.video_token) if len(found) == 1 else None
    if template is not None:
        (folder / "chat_template.json").unlink(missing_ok=True)  # the old name of the same thing
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return processor


def _generation_config(model: PreTrainedModel, processor: VisionTextProcessor, folder: Path) -> GenerationConfig:
    """Return the source's own settings, with the tokens that evaluations end, pad and suppress."""
    config = model.generation_config or GenerationConfig()
    if (folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(folder)
        try:
            config.validate(strict=True)
        except ValueError:  # Vicuna's has a temperature and does not sample; transformers writes no such file
            config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)
    if config.eos_token_id is None:
        config.eos_token_id = processor.tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = processor.pad_token_id
    if config.suppress_tokens is None:
        config.suppress_tokens = processor.placeholder_ids
    return config


def _write_adapter(cell: Cell, model: ModelSpec, weights: Path, folder: Path) -> str:
    """Write what differs from the base model: LoRA as a peft adapter, other parts that trained in full.

    The ledger keeps merged weights; of an exact low-rank difference an SVD gives the factors back.

    Returns:
        The base model's folder or hub id.

    Raises:
        UsageError: the cell trained no LoRA, started from no named model, or trained what an adapter cannot hold.
    """
    from peft import get_peft_model

    loras = [plan.recipe.lora for plan in cell.phases if plan.recipe.lora is not None]
    if not loras:
        raise UsageError(
            f"export: cell {cell.name} trained no LoRA, so there is no adapter; export it without `adapter`"
        )
    name, revision = _base_of(cell, model)
    base = load_pretrained(name, "export", revision=revision, trust_remote_code=model.trust_remote_code)
    targets = sorted({target for lora in loras for target in lora.target_modules})
    lora = loras[-1].model_copy(update={"r": sum(one.r for one in loras), "target_modules": targets, "dropout": 0.0})
    config = lora_config(base, lora)
    with safe_open(weights, framework="pt") as file:
        changed = [key for key, tensor in weight_tensors(base).items() if not torch.equal(file.get_tensor(key), tensor)]
        adapted = [key for key in changed if re.fullmatch(config.target_modules, key.removesuffix(".weight"))]
        saved = sorted({_module_to_save(key, cell) for key in changed if key not in adapted})
        config.modules_to_save = saved or None
        config.base_model_name_or_path, config.revision = name, revision
        factors = {key: _factors(file.get_tensor(key), base.get_parameter(key), lora, key) for key in adapted}
        wrapped = get_peft_model(base, config)
        with torch.no_grad():
            for key, module in wrapped.base_model.model.named_modules():
                if f"{key}.weight" in factors:
                    module.lora_A["default"].weight.copy_(factors[f"{key}.weight"][0])
                    module.lora_B["default"].weight.copy_(factors[f"{key}.weight"][1])
                elif key in saved:
                    for inner, parameter in module.modules_to_save["default"].named_parameters():
                        parameter.copy_(file.get_tensor(f"{key}.{inner}"))
    _write_processor(cell, model, folder)
    # No config.json: beside one, transformers takes an adapter's folder for a complete model.
    with quiet_loading():
        wrapped.save_pretrained(folder)
    return name


def _base_of(cell: Cell, model: ModelSpec) -> tuple[str, str | None]:
    """Return the folder or hub id, and the revision, of the model that the cell's last training began with."""
    named = {job.id: job.folder for job in cell.starts if job.base is None and job.folder is not None}
    for plan in reversed(cell.phases):
        folder = named.get(plan.start)
        if folder is not None and (Path(folder) / "config.json").is_file():
            return folder, None
    if model.weights != "pretrained":
        raise UsageError(
            "export: an adapter names the model that the adapter belongs to, and this one was not trained from one "
            f"(model.weights: {model.weights}); export it without `adapter`"
        )
    return model.model_name_or_path, model.revision


def _module_to_save(name: str, cell: Cell) -> str:
    """Return the module, e.g. `model.multi_modal_projector`, that a changed weight without an adapter belongs to."""
    part, steps = part_of_or_none(name), name.split(".")[:-1]
    paths = (".".join(steps[: count + 1]) for count in range(len(steps)))
    found = next((path for path in paths if part_of_or_none(path) == part), None)
    if found is None or part == LANGUAGE_MODEL:
        raise UsageError(
            f"export: {name} of cell {cell.name} was trained in full, which no adapter holds; "
            "export it without `adapter`"
        )
    return found


def _factors(
    final_OI: torch.Tensor, base_OI: torch.Tensor, lora: LoraSpec, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `A` (R, I) and `B` (O, R) with `final = base + B A alpha / r`.

    Raises:
        StageRunError: the difference has a higher rank.
    """
    difference_OI = (final_OI - base_OI.detach()) * (lora.r / lora.alpha)
    rank = min(lora.r, *difference_OI.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left_OR, values_R, right_IR = torch.svd_lowrank(difference_OI, min(rank + 8, *difference_OI.shape), niter=4)
    left_OR, values_R, right_IR = left_OR[:, :rank], values_R[:rank].sqrt(), right_IR[:, :rank]
    down_RI, up_OR = torch.zeros(lora.r, final_OI.shape[1]), torch.zeros(final_OI.shape[0], lora.r)
    down_RI[:rank], up_OR[:, :rank] = (right_IR * values_R).T, left_OR * values_R
    error = (up_OR @ down_RI - difference_OI).abs().max() * (lora.alpha / lora.r)
    if error > _LOW_RANK_TOLERANCE * final_OI.abs().max():
        raise StageRunError(
            f"export: {name} differs from the base model by more than rank {lora.r}: it was trained in full as well; "
            "export it without `adapter`"
        )
    return down_RI, up_OR


def model_card(cell: Cell, record: CellRecord, note: dict[str, Any]) -> str:
    """Return the README of an exported folder: what it is, how to load it, its scores and cost, how it was trained."""
    base, points = note["base_model"], note["points"]
    head = f"library_name: {'peft' if base else 'transformers'}\npipeline_tag: image-text-to-text\n"
    head += f"base_model: {base}\n" if base and not Path(base).is_absolute() else ""
    acts = ", then ".join(f"`{point['kind']}` at layer {point['layer']}" for point in points) or "none: full tokens"
    load = (
        f'base = AutoModelForImageTextToText.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(base, FOLDER)'
        if base
        else "model = AutoModelForImageTextToText.from_pretrained(FOLDER)"
    )
    imports = "from peft import PeftModel\n" if base else ""
    own = any(registry.is_plugin(registry.COMPRESSORS, point["kind"]) for point in points)
    data = cell.phases[-1].data if cell.phases else ()
    plugins = f", plugins={json.dumps(note['plugins'])}" if own else ""
    sections = [
        f"---\n{head}tags: [llavolta, visual-token-compression]\n---\n# {note['experiment']}: {cell.name}",
        cell.spec.description or "",
        f"Cell `{cell.id}`, compressor of its final stage: {acts}.",
        f"Plain transformers loads {'the model on full tokens' if points else 'the model'}:",
        f"```python\n{imports}from transformers import AutoModelForImageTextToText, AutoProcessor\n\n{load}\n"
        "processor = AutoProcessor.from_pretrained(FOLDER)\n```",
        "`processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, "
        'return_tensors="pt")` gives the tokens of training; `processor(text=...)` writes a second `<s>` before a '
        "rendered prompt that begins with one.",
        _PADDED if any(entry["spec"].get("image_aspect_ratio") for entry in data) else "",
        _of_frames(**note["video"]) if note["video"] else "",
        "With the compressor attached, as `final` was tested:",
        f"```python\nimport orchestrator as llv\n\nmodel, processor = llv.load_exported(FOLDER{plugins})\n```",
        "## Scores",
        _table("metric", note["scores"]),
        "## Cost",
        _table("quantity", note["cost"]),
        "## Training",
        _table("setting", record.params),
        "\n".join(f"- {notice}" for notice in cell.notices),
    ]
    for plan in cell.phases:
        sets = ", ".join(f"`{entry['name']}` ({entry['spec']['kind']})" for entry in plan.data)
        rows = [f"| {action.first_step} to {action.last_step} | {action.variant} |" for action in plan.table[:_STAGES]]
        rows += [f"| ... | {len(plan.table) - _STAGES} more |"] if len(plan.table) > _STAGES else []
        if (lora := plan.recipe.lora) is not None:
            modules = ", ".join(f"`{name}`" for name in lora.target_modules)
            sets += f", LoRA (r {lora.r}, alpha {lora.alpha}, dropout {lora.dropout}) on {modules}"
        sections += [f"`{plan.name}` on {sets}:", "\n".join(["| steps | compressor |", "|---|---|", *rows])]
    sections.append(_table("trained or written with", {**note["trained_with"], **note["written_with"]}))
    return "\n\n".join(section for section in sections if section) + "\n"


def _of_frames(num_frames: int, fps: float | None) -> str:
    numbers = f"`numpy.linspace(0, n - 1, {num_frames}, dtype=int)`"
    if fps is not None:
        numbers = f"`range(0, n, max(1, round(rate / {fps:g})))`, or where these are more than {num_frames} {numbers}"
    return (
        f"Of a video of n frames it was trained on those of numbers {numbers}; the processor takes frames as they are "
        "with `videos=[frames], videos_kwargs={'do_sample_frames': False}`."
    )


def _table(head: str, values: Mapping[str, Any]) -> str:
    if not values:
        return "none"
    shown = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values.items()}
    return "\n".join([f"| {head} | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in shown.items())])


def load_exported(folder: str | Path, *, plugins: Sequence[str] = (), **options: Any) -> tuple[Any, Any]:
    """Return the model and processor of an exported folder, the compressor of the cell's final stage attached.

    Both are transformers' own (a folder with an adapter gives a `PeftModel`). Full tokens again:
    `orchestrator.compression.attachment_of(model).switch([])`.

    Args:
        folder: What `llavolta export` wrote.
        plugins: Plug-in files or modules of the compressors in it; they run code, so that none is loaded unasked.
        options: Further arguments of transformers' `from_pretrained`, for instance `dtype` or `attn_implementation`.

    Raises:
        UsageError: it is no exported folder, or a compressor of it is of a plug-in that is not named.
        StageRunError: weights are missing in it.
    """
    place = Path(folder).expanduser()
    try:
        note = json.loads((place / NOTE_FILE).read_text(encoding="utf-8"))
        points, learned, base = note["points"], note["compressor_weights"], note["base_model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{place} is no folder that `llavolta export` wrote: {NOTE_FILE} in it cannot be read ({error})"
        ) from error
    for reference in plugins:
        registry.load_plugin(reference, Path.cwd())
    if unknown := sorted({point["kind"] for point in points} - set(registry.kinds(registry.COMPRESSORS))):
        raise UsageError(
            f"{place}: the compressor {', '.join(unknown)} is none of this installation; it is a plug-in's "
            f"({', '.join(note.get('plugins', ())) or 'an installed one'}): load_exported(..., plugins=[...])"
        )
    trusted = bool(options.get("trust_remote_code", False))
    processor = load_processor(ModelSpec(model_name_or_path=str(place), trust_remote_code=trusted), config_of=base)
    model: Any
    if base is None:
        model = _loaded(str(place), options)
    else:
        from peft import PeftModel

        adapter = json.loads((place / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
        given = {"dtype": note["dtype"], "revision": adapter.get("revision"), **options}
        model = PeftModel.from_pretrained(_loaded(base, given), str(place))
    attach(model, points)
    if learned is not None:
        load_learned(unwrap(model), place / learned)
    return model.eval(), processor.processor


def _loaded(source: str, options: dict[str, Any]) -> PreTrainedModel:
    with quiet_loading():
        model, report = AutoModelForImageTextToText.from_pretrained(source, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise StageRunError(
            f"{source} lacks {len(missing)} weights of {type(model).__name__}: {', '.join(missing[:5])}"
        )
    loaded: PreTrainedModel = model
    return loaded

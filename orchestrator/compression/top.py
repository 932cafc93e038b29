"""One forward of the top model while a compressor is attached: its own code, with our head and an idle tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from orchestrator.compression.caches import record_of
from orchestrator.compression.decoder import Decoder
from orchestrator.compression.entry import Pass
from orchestrator.compression.families import Family
from orchestrator.compression.head import Head
from orchestrator.compression.projector import AtProjector
from orchestrator.compression.protocol import IGNORED, Point
from orchestrator.compression.tower import watched_tower


def forward_top(decoder: Decoder, inputs: dict[str, Any]) -> tuple[Any, tuple[int, ...]]:
    """The top model's forward under the decoder's points.

    Args:
        decoder: Runs the language model.
        inputs: Keyword arguments of the top model's forward, and `return_logits`, `label_logits`.

    Returns:
        The model's output, and the visual tokens that ran in each decoder layer, summed over rows.
    """
    family = decoder.family
    labels = inputs.pop("labels", None)
    return_logits = inputs.pop("return_logits", False)
    label_logits = inputs.pop("label_logits", False)
    has_labels = labels is not None or inputs.get("shift_labels") is not None
    current = Pass(inputs, labels)
    decoder.current = current
    idle = _idle_images(family) if has_labels and _lacks_images(family, inputs) else None
    current.idle = idle is not None
    record = record_of(inputs.get("past_key_values"))
    points: Sequence[Point] = record.points if record else decoder.points
    at_projector = AtProjector(decoder, current, [point for point in points if point.at_projector])
    try:
        with watched_tower(family, points) as current.tower, at_projector:
            if not has_labels and not decoder.points:
                output = type(family.model).forward(family.model, **inputs)
            else:
                output = _with_head(family, current, return_logits, label_logits)
    finally:
        decoder.current = None
        if idle is not None:
            idle.remove()
    counted = current.visual_tokens_per_layer
    return output, counted or (family.num_visual_tokens(inputs),) * family.num_layers


def _with_head(family: Family, current: Pass, return_logits: bool, label_logits: bool) -> Any:
    """The top model's own forward with our head in the place of its own.

    With `label_logits` and labels the output's logits are those of the L tokens that predict a label, row by row:
    L x vocabulary, L and its order the same under all points.
    """
    return_logits = return_logits and not label_logits
    inputs = dict(current.inputs)
    shifted = inputs.pop("shift_labels", None)
    if shifted is not None and current.labels_BN is None:
        current.labels_BN = nn.functional.pad(shifted, (1, 0), value=IGNORED)[:, :-1]
    num_items = inputs.pop("num_items_in_batch", None)
    keep = inputs.pop("logits_to_keep", 0)
    return_dict = inputs.pop("return_dict", None)
    if current.labels_BN is not None and inputs.get("use_cache") is None:
        inputs["use_cache"] = False
    source = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    model: Any = family.model
    head = Head(getattr(model, family.head_name), current, source.shape[1], shifted, keep, return_logits)
    view = object.__new__(type(model))
    view.__dict__.update(model.__dict__)
    view.__dict__["_modules"] = {**model._modules, family.head_name: head}
    output = type(model).forward(view, **inputs, return_dict=True)
    values = dict(output.items())
    if current.labels_BN is not None:
        values["loss"] = head.loss(values["logits"], num_items)
    if current.labels_BN is not None and not return_logits:
        if not label_logits:
            del values["logits"]
    else:
        values["logits"] = head.at_original_length(values["logits"])
    output = type(output)(**values)
    if return_dict is None:
        return_dict = getattr(model.config, "return_dict", True)
    return output if return_dict else output.to_tuple()


def _lacks_images(family: Family, inputs: dict[str, Any]) -> bool:
    """A training rank whose batch has no image must still call the tower: others do, and wait for it."""
    # One rank alone does it too: parameters without a gradient would move differently than among several, and
    # ZeRO-3 would take their gradient of the step before.
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not (family.model.training and distributed):
        return False
    return family.num_visual_tokens(inputs) == 0


def _idle_images(family: Family) -> RemovableHandle:
    """Runs the vision tower on an empty image, without effect on the numbers.

    A hook in front of all others of the language model, so that modules are called in the order of a batch with
    images (token embedding, tower, projector, decoder): ZeRO-3 gathers parameters in that order on every rank.
    """

    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embeds_BND = kwargs["inputs_embeds"]
        kwargs["inputs_embeds"] = embeds_BND + 0.0 * family.idle_features().sum().to(embeds_BND)
        return args, kwargs

    handle: RemovableHandle = family.language_model.register_forward_pre_hook(add, prepend=True, with_kwargs=True)
    return handle

"""One forward of the top model while a compressor is attached: its own code, with our head and an idle tower."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from orchestrator.compression.attention.stats import present_columns
from orchestrator.compression.attention.tower import watched_tower
from orchestrator.compression.families import Family
from orchestrator.compression.forward.cache import record_of
from orchestrator.compression.forward.decoder import Decoder
from orchestrator.compression.forward.entry import Pass
from orchestrator.compression.forward.projector import AtProjector
from orchestrator.compression.ops import tokens_at
from orchestrator.compression.protocol import IGNORED, Point
from orchestrator.errors import UsageError


@dataclass
class Head:
    """Stands in for the LM head during one forward of the top model, so the model's own code around it still runs.

    Attributes:
        head: The real LM head; called as a module, so that hooks (ZeRO-3) run.
        current: The pass under way.
        columns: Original length of the rows.
        keep: `logits_to_keep` as the caller gave it.
        return_logits: Logits of all tokens although there are labels.
        rows_L: After the call: flat places of tokens that predict a label.
        targets_L: After the call: the labels they predict.
        cut: After the call: logits are those of `keep` only.
    """

    head: nn.Module
    current: Pass
    columns: int
    keep: Any = 0
    return_logits: bool = False
    rows_L: Tensor | None = None
    targets_L: Tensor | None = None
    cut: bool = False

    def __call__(self, hidden_BMD: Tensor) -> Tensor:
        """Return the logits: L x vocabulary where labels ask for L of them, else B x tokens x vocabulary."""
        if self.current.labels_BN is not None:
            self._find_targets(hidden_BMD.device)
            assert self.rows_L is not None
            if not self.return_logits:
                # A row each: some models ask for logits of three dimensions (to cap or shift them).
                return self.head(hidden_BMD.reshape(-1, 1, hidden_BMD.shape[-1]).index_select(0, self.rows_L))
            return self.head(hidden_BMD)
        flow = self.current.flow
        if isinstance(self.keep, int) and self.keep == 0:
            return self.head(hidden_BMD)
        self.cut = True
        wanted_K = torch.arange(self.columns, device=hidden_BMD.device)
        wanted_K = wanted_K[-self.keep :] if isinstance(self.keep, int) else wanted_K[self.keep]
        if flow is None or flow.layout is None:
            return self.head(hidden_BMD[:, wanted_K])
        places_BK = present_columns(flow.origins_BN, self.columns)[:, wanted_K]
        logits_BKV = self.head(tokens_at(hidden_BMD, places_BK.clamp(min=0)))
        return logits_BKV.masked_fill((places_BK < 0).unsqueeze(-1), float("nan"))

    def _find_targets(self, device: torch.device) -> None:
        targets_BM = self.current.targets_BN(self.current.flow)
        if self.current.queries is not None:
            targets_BM = targets_BM.gather(1, self.current.queries.columns_BQ.to(targets_BM.device))
        flat = targets_BM.reshape(-1)
        rows_L = (flat != IGNORED).nonzero().squeeze(1)
        self.rows_L = rows_L.to(device, non_blocking=True)
        self.targets_L = flat[rows_L].to(device, non_blocking=True)

    def loss(self, logits: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Return the sum over label tokens of the cross-entropy (float32), divided by their number or the number given.

        A batch without labels gives 0 with a graph.
        """
        assert self.rows_L is not None and self.targets_L is not None
        logits = logits.reshape(-1, logits.shape[-1])
        if self.return_logits:
            logits = logits.index_select(0, self.rows_L)
        total = F.cross_entropy(logits.float(), self.targets_L.to(logits.device), reduction="sum")
        if num_items_in_batch is None:
            return total / max(1, len(self.targets_L))
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch

    def share(self, num_items_in_batch: Tensor | int | None) -> Tensor | float:
        """Return the batch's share of the label tokens that the loss is divided by: what is a mean over a batch counts
        by it, so that micro-batches add up to one mean.
        """
        assert self.targets_L is not None
        return 1.0 if num_items_in_batch is None else len(self.targets_L) / num_items_in_batch

    def at_original_length(self, logits_BMV: Tensor) -> Tensor:
        """Return all logits at the length of the input, NaN where a token was dropped."""
        flow = self.current.flow
        if self.cut or flow is None or flow.layout is None:
            return logits_BMV
        rows, _, vocabulary = logits_BMV.shape
        full = logits_BMV.new_full((rows, self.columns + 1, vocabulary), float("nan"))
        # Padding goes to a column of its own that is cut off again.
        places_BM = torch.where(flow.origins_BN < 0, self.columns, flow.origins_BN)
        full.scatter_(1, places_BM.unsqueeze(-1).expand(-1, -1, vocabulary), logits_BMV)
        return full[:, : self.columns]


def forward_top(decoder: Decoder, inputs: dict[str, Any]) -> tuple[Any, tuple[int, ...]]:
    """Return the top model's forward under the decoder's points.

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
    image, video = _kinds_to_idle(decoder, inputs) if has_labels else (False, False)
    current.idle = (image or video) and family.num_visual_tokens(inputs) == 0
    record = record_of(inputs.get("past_key_values"))
    points: Sequence[Point] = record.points if record else decoder.points
    at_projector = AtProjector(decoder, current, [point for point in points if point.before_decoder])
    idle = _idle_calls(family, image, video)
    try:
        with watched_tower(family, points) as current.tower, at_projector:
            if not has_labels and not decoder.points:
                output = type(family.model).forward(family.model, **inputs)
            else:
                output = _with_head(family, current, return_logits, label_logits)
    finally:
        decoder.current = None
        for handle in idle:
            handle.remove()
    counted = current.visual_tokens_per_layer
    return output, counted or (family.num_visual_tokens(inputs),) * family.num_layers


def _with_head(family: Family, current: Pass, return_logits: bool, label_logits: bool) -> Any:
    """Return the top model's own forward with our head in the place of its own.

    With `label_logits` and labels the output's logits are those of the L tokens that predict a label, row by row:
    L x vocabulary, L and its order the same under all points.
    """
    return_logits = return_logits and not label_logits
    inputs = dict(current.inputs)
    shifted = inputs.pop("shift_labels", None)
    if shifted is not None and current.labels_BN is None:
        current.labels_BN = F.pad(shifted, (1, 0), value=IGNORED)[:, :-1]
    current.shift_labels_BN = shifted
    current.label_logits_only = current.labels_BN is not None and not return_logits
    num_items = inputs.pop("num_items_in_batch", None)
    keep = inputs.pop("logits_to_keep", 0)
    return_dict = inputs.pop("return_dict", None)
    if current.labels_BN is not None and inputs.get("use_cache") is None:
        inputs["use_cache"] = False
    source = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    model: Any = family.model
    head = Head(model.get_submodule(family.head_name), current, source.shape[1], keep, return_logits)
    output = type(model).forward(_with_child(model, family.head_name, head), **inputs, return_dict=True)
    values = dict(output.items())
    if current.router_logits:
        values["router_logits"] = current.router_logits
        values["aux_loss"] = _balance(family, current.router_logits)
    if current.labels_BN is not None:
        values["loss"] = head.loss(values["logits"], num_items)
        if isinstance(values.get("aux_loss"), Tensor):
            values["loss"] = values["loss"] + head.share(num_items) * _balance_weight(family) * values["aux_loss"]
    if current.labels_BN is not None and not return_logits:
        values["logits"] = values["logits"].flatten(0, -2)
        if not label_logits:
            del values["logits"]
    else:
        values["logits"] = head.at_original_length(values["logits"])
    output = type(output)(**values)
    if return_dict is None:
        return_dict = getattr(model.config, "return_dict", True)
    return output if return_dict else output.to_tuple()


def _with_child(module: Any, path: str, child: Any) -> Any:
    """Return a view of a module (its own parameters and submodules) with another one at the dotted `path`."""
    name, _, rest = path.partition(".")
    view = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    inside = _with_child(module._modules[name], rest, child) if rest else child
    view.__dict__["_modules"] = {**module._modules, name: inside}
    return view


def _balance(family: Family, router_logits: tuple[Tensor, ...]) -> Tensor:
    """Return the load-balancing loss of experts over the tokens that ran in each layer, by the model's own function."""
    config = family.language_model.config
    balance = getattr(sys.modules[type(family.model).__module__], "load_balancing_loss_func", None)
    experts = next((getattr(config, name) for name in _EXPERTS if isinstance(getattr(config, name, None), int)), None)
    if balance is None or experts is None:
        raise UsageError(
            f"compression: {type(family.model).__name__} gives router logits, but how it balances its experts is not "
            "known (no load_balancing_loss_func beside it); set output_router_logits to false"
        )
    loss: Tensor = balance(router_logits, experts, config.num_experts_per_tok, None)
    return loss


def _balance_weight(family: Family) -> float:
    for owner in (family.language_model.config, family.model.config, family.model):
        if (weight := getattr(owner, "router_aux_loss_coef", None)) is not None:
            return float(weight)
    raise UsageError(
        f"compression: {type(family.model).__name__} has an auxiliary loss, but no router_aux_loss_coef says what it "
        "weighs; set output_router_logits to false"
    )


_EXPERTS = ("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts")


def _kinds_to_idle(decoder: Decoder, inputs: dict[str, Any]) -> tuple[bool, bool]:
    """Return whether a training rank must call the tower for images, and for videos, that its batch does not hold:
    other ranks do, and wait for it.

    Ranks of a family that takes videos tell each other what their batches hold: by images alone nobody knows who
    calls a tower twice. A tower of videos alone is called from then on in every batch.
    """
    family: Any = decoder.family
    # One rank alone does it too: parameters without a gradient would move differently than among several, and
    # ZeRO-3 would take their gradient of the step before.
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not (family.model.training and distributed):
        return False, False
    if not family.knows_videos:
        return family.num_visual_tokens(inputs) == 0, False
    image, video = (any(inputs.get(name) is not None for name in names) for names in (_IMAGES, _VIDEOS))
    anywhere = torch.tensor([image, video], dtype=torch.int, device=next(family.model.parameters()).device)
    if torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
    images, videos = anywhere.bool().tolist()
    if family.two_towers:
        decoder.kinds_seen = images, videos = images or decoder.kinds_seen[0], videos or decoder.kinds_seen[1]
    return (images or not videos) and not image, videos and not video


_IMAGES, _VIDEOS = ("pixel_values", "pixel_values_images"), ("pixel_values_videos",)


def _idle_calls(family: Any, image: bool, video: bool) -> list[RemovableHandle]:
    """Run the vision tower on an empty image, on an empty video, without effect on the numbers.

    Hooks, so that modules are called in the order of a batch that has both (token embedding, tower, projector for
    images, for videos, decoder): ZeRO-3 gathers parameters in that order on every rank. That of an image comes after
    the token embedding where a video is encoded later; all others in front of other hooks of the language model.
    """

    def of_embedding(_: nn.Module, args: tuple[Any, ...], embeds_BND: Tensor) -> Tensor:
        return embeds_BND + 0.0 * family.idle_features().sum().to(embeds_BND)

    def of_decoder(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embeds_BND = kwargs["inputs_embeds"]
        if image and video:
            embeds_BND = embeds_BND + 0.0 * family.idle_features().sum().to(embeds_BND)
        features = family.idle_video_features() if video else family.idle_features()
        kwargs["inputs_embeds"] = embeds_BND + 0.0 * features.sum().to(embeds_BND)
        return args, kwargs

    handles: list[RemovableHandle] = []
    if image and not video and family.knows_videos:
        handles.append(family.model.get_input_embeddings().register_forward_hook(of_embedding))
    elif image or video:
        hooked = family.outer_language_model
        handles.append(hooked.register_forward_pre_hook(of_decoder, prepend=True, with_kwargs=True))
    return handles

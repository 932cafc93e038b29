"""Tiny random models for the contract kit: how those of a family are built, their batches, points attached to them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.compression import Attachment, attach
from orchestrator.compression.attach import PointLike
from orchestrator.compression.families import Family, family_of
from orchestrator.compression.testing.reference import Reference
from orchestrator.spec.components import Grid

Row = Sequence[int | str]
Tokens = Mapping[str, Sequence[int]]
PAD, FIRST_TEXT, SEPARATOR, VIDEO, IMAGE, VOCABULARY = 0, 1, 61, 62, 63, 64
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
VISION_SIZES = SIZES | {"num_hidden_layers": 2}
TEXT_SIZES = SIZES | {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class TinyFamily:
    """A family as the kit tests it.

    Attributes:
        model_type: `model_type` of its config, the key under which its adapter is registered.
        build: `build(attention, seed)`: a random model of a few narrow layers in float32, weights large enough that
            what the layers do shows in the loss.
        batch: `batch(rows, padding, seed, answer)`: keyword arguments of the model's forward. A row lists numbers of
            text tokens and kinds of visual input; the last `answer` tokens of a row carry labels (-100 elsewhere).
        units: For each kind of visual input a row may hold (`image`, `small` for another size, `video`), the grids it
            becomes, in order; stated by hand, not by the adapter.
        layers: Decoder layers; points act at layers the family allows.
        first_layer: First layer at which a point may act.
        attentions: Attention implementations that run on a CPU.
    """

    model_type: str
    build: Callable[[str, int], nn.Module]
    batch: Callable[[Sequence[Row], str, int, int], dict[str, Tensor]]
    units: Mapping[str, tuple[Grid, ...]]
    layers: int = 4
    first_layer: int = 0
    attentions: tuple[str, ...] = ("eager", "sdpa")


def builder(
    model_class: Any, vision: Any, text: Any, *, after: Any = None, **options: Any
) -> Callable[[str, int], nn.Module]:
    """Return `TinyFamily.build` of a model class.

    Args:
        model_class: A Hugging Face model; its `config_class` is used.
        vision: Its vision config, or values of it.
        text: Its text config, values of it, or its class, whose sizes are then `TEXT_SIZES`.
        after: A function called with the model before its weights are enlarged.
        **options: Further values of its config.
    """
    given = {"vision_config": vision, "text_config": text(**TEXT_SIZES) if isinstance(text, type) else text}

    def build(attention: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        parts = {name: one if isinstance(one, dict) else one.to_dict() for name, one in given.items()}
        config = model_class.config_class(**parts, attn_implementation=attention, **options)
        config.pad_token_id = PAD
        model = model_class(config)
        if after is not None:
            after(model)
        return enlarge(model)

    return build


def tiny(
    model_class: Any,
    vision: Any,
    text: Any,
    tokens: Tokens,
    *add: Callable[[Draw], None],
    units: Mapping[str, tuple[Grid, ...]],
    first_layer: int = 0,
    attentions: tuple[str, ...] = ("eager", "sdpa"),
    **options: Any,
) -> TinyFamily:
    """Return the family of a model class; see `builder`, `batcher` and `TinyFamily` for the arguments."""
    return TinyFamily(
        model_class.config_class.model_type,
        builder(model_class, vision, text, **options),
        batcher(tokens, *add),
        units,
        first_layer=first_layer,
        attentions=attentions,
    )


def enlarge(model: nn.Module, factor: float = 4.0) -> nn.Module:
    """Make weights larger than their initial values, so that what layers do shows in the loss."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return model


@dataclass
class Draw:
    """A batch while it is made.

    Attributes:
        inputs: Its keyword arguments; the text side is there.
        kinds: Kinds of visual input of each row.
        generator: Draws what is random.
        answer: How many last tokens of a row carry labels.
    """

    inputs: dict[str, Any]
    kinds: list[list[str]]
    generator: torch.Generator
    answer: int

    @property
    def flat(self) -> list[str]:
        """Kinds of visual input of all rows."""
        return [kind for row in self.kinds for kind in row]

    def pixels(self, *shape: int) -> Tensor:
        """Return random pixels."""
        return torch.randn(*shape, generator=self.generator)


def batcher(
    tokens: Tokens, *add: Callable[[Draw], None]
) -> Callable[[Sequence[Row], str, int, int], dict[str, Tensor]]:
    """Return `TinyFamily.batch` of a family.

    Args:
        tokens: Token ids that each kind of visual input becomes; those that are not `IMAGE` or `VIDEO` are text.
        *add: Add pixels and whatever else the model's forward takes, in this order.
    """

    def batch(rows: Sequence[Row], padding: str, seed: int, answer: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)  # the global state stays as it is
        sequences: list[list[int]] = []
        for row in rows:
            ids: list[int] = []
            for part in row:
                if isinstance(part, str):
                    ids += tokens[part]
                else:
                    ids += torch.randint(FIRST_TEXT, SEPARATOR, (part,), generator=generator).tolist()
            sequences.append(ids)
        visual = [[token in (IMAGE, VIDEO) for token in ids] for ids in sequences]
        kinds = [[part for part in row if isinstance(part, str)] for row in rows]
        draw = Draw(pad_rows(sequences, visual, padding, PAD, answer), kinds, generator, answer)
        for one in add:
            one(draw)
        return draw.inputs

    return batch


def pad_rows(
    sequences: Sequence[Sequence[int]], visual: Sequence[Sequence[bool]], padding: str, pad_token: int, answer: int
) -> dict[str, Any]:
    """Return `input_ids`, `attention_mask` and `labels` of rows of token ids.

    Args:
        sequences: Token ids of each row, placeholders expanded.
        visual: True at each row's placeholders; they never carry a label.
        padding: `left` or `right`.
        pad_token: Token id of padding.
        answer: How many last tokens of a row carry labels; 0 for none.
    """
    length = max(map(len, sequences))
    ids, mask, labels = [], [], []
    for tokens, is_visual in zip(sequences, visual, strict=True):
        gap = length - len(tokens)
        labelled = [
            token if number >= len(tokens) - answer and not seen else -100
            for number, (token, seen) in enumerate(zip(tokens, is_visual, strict=True))
        ]
        left, right = (gap, 0) if padding == "left" else (0, gap)
        ids.append([pad_token] * left + list(tokens) + [pad_token] * right)
        mask.append([0] * left + [1] * len(tokens) + [0] * right)
        labels.append([-100] * left + labelled + [-100] * right)
    named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.tensor(value) for name, value in named.items()}


@dataclass(frozen=True)
class Batch:
    """Keyword arguments of a forward, and the grids of each row's images."""

    inputs: dict[str, Any]
    units: tuple[tuple[Grid, ...], ...]

    @property
    def rows(self) -> int:
        """Rows."""
        return len(self.units)


@dataclass
class Bench:
    """A family's models.

    Attributes:
        tiny: What the kit knows of the family.
        models: Models by attention implementation, all of the same weights; `plain` is never attached to.
    """

    tiny: TinyFamily
    models: dict[str, nn.Module] = field(default_factory=dict)

    def model(self, attention: str) -> nn.Module:
        """Return the model of an attention implementation, in training mode; `plain` is an eager one."""
        if attention not in self.models:
            with torch.random.fork_rng(devices=[]):
                built = self.tiny.build("eager" if attention == "plain" else attention, 0)
            self.models[attention] = built.train()
            self.models[attention](**self.batch(self.rows(False), "right").inputs)  # installs hooks of its own
        return self.models[attention]

    @property
    def family(self) -> Family:
        """Adapter of the plain model."""
        return family_of(self.model("plain"))

    @property
    def grids(self) -> tuple[Grid, ...]:
        """All grids of more than one token that the family's batches hold."""
        found = dict.fromkeys(grid for grids in self.tiny.units.values() for grid in grids)
        return tuple(grid for grid in found if grid.tokens > 1)

    def rows(self, other: bool) -> list[Row]:
        """Return the rows of two mixed batches: none, one, two and three images of unequal size, a video where there
        is one.
        """
        kinds = [kind for kind in self.tiny.units if kind != "video"]
        first, last = kinds[0], kinds[-1]
        video: list[Row] = [[1, "video", 4]] if "video" in self.tiny.units else []
        if other:
            return [[1, first, last, 4], [6], *video]
        return [[3, first, 7], [9], [2, first, 2, last, first, 5], *video]

    def batch(self, rows: Sequence[Row], padding: str, seed: int = 0, answer: int = 3) -> Batch:
        """Return a batch of rows."""
        inputs = dict(self.tiny.batch(rows, padding, seed, answer))
        if not answer:
            inputs.pop("labels", None)
        units = tuple(
            tuple(grid for part in row if isinstance(part, str) for grid in self.tiny.units[part]) for row in rows
        )
        return Batch(inputs, units)

    @contextmanager
    def attached(
        self, attention: str, points: Sequence[PointLike], modules: Sequence[PointLike] | None = None
    ) -> Iterator[tuple[nn.Module, Attachment]]:
        """Yield a model with points for the block; learned modules have parameters that do something."""
        model = self.model(attention)
        attachment = attach(model, points) if modules is None else attach(model, points, modules)
        try:
            move_parameters(attachment.learned_modules)
            yield model, attachment
        finally:
            model.zero_grad()
            model.train()
            attachment.detach()

    def reference(self, attachment: Attachment | None = None) -> Reference:
        """Return the plain computation, with copies of an attachment's learned modules."""
        return Reference(self.family, copy.deepcopy(attachment.learned_modules) if attachment is not None else {})


def move_parameters(modules: Mapping[str, nn.Module]) -> None:
    """Move learned modules from their first values: some begin as an identity, which would prove little."""
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for _, parameter in sorted(nn.ModuleDict(modules).named_parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))

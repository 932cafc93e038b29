"""Points before the decoder: patches get fewer in the vision tower, or features before the projector maps them, and the
decoder's rows follow.

The unmodified model checks that there is a feature for every placeholder. So what the projector gives is padded back to
the number it was, each unit's features first, and the decoder trims the rows before its first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orchestrator.compression.attention.recorder import Recording, attention_module, not_recorded, recording_of
from orchestrator.compression.attention.tower import cls_of_images, image_numbers
from orchestrator.compression.forward.apply_point import apply_point, by_count, call_idle, call_once
from orchestrator.compression.forward.queries import recomputes_views, view_of
from orchestrator.compression.layout import ImageGroup, Layout, build_layout
from orchestrator.compression.ops import tokens_at
from orchestrator.compression.protocol import Context, Kept, Point, Resizes
from orchestrator.errors import UsageError
from orchestrator.spec.components import Grid

if TYPE_CHECKING:
    from orchestrator.compression.forward.decoder import Decoder
    from orchestrator.compression.forward.entry import Pass


@dataclass
class AtProjector:
    """The hooks of one forward on the projector, and on the tower where a method acts in it or on pixels; a context
    manager.

    Attributes:
        decoder: The attached model.
        current: The pass under way.
        points: The points before the decoder, in their order.
    """

    decoder: Decoder
    current: Pass
    points: Sequence[Point]
    _undo: ExitStack = field(default_factory=ExitStack)
    _units: list[_Units] = field(default_factory=list)
    _keys: dict[int, Recording] = field(default_factory=dict)
    _front: int = 0
    _padding: tuple[Tensor, int, torch.Size] | None = None

    def __enter__(self) -> AtProjector:
        if not self.points:
            return self
        family = self.decoder.family
        projector = family.projector
        assert projector is not None
        with ExitStack() as undo:
            if any(hasattr(point.compressor, "resize") for point in self.points):
                tower = family.resizable_tower
                assert tower is not None
                undo.callback(tower.register_forward_pre_hook(self._resize, prepend=True, with_kwargs=True).remove)
            if any(point.tower_layer is not None for point in self.points):
                self._enter_tower(undo)
            # In front of the others, so that ZeRO-3 sees a learned module before the projector, not inside of it.
            undo.callback(projector.register_forward_pre_hook(self._shorten, prepend=True).remove)
            undo.callback(projector.register_forward_hook(self._pad).remove)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _enter_tower(self, undo: ExitStack) -> None:
        """Let the tower run its layers as `_TowerLayer`s: a point acts outside of the checkpoint of its layer."""
        tower = self.decoder.family.tower
        encoder, self._front = tower.encoder, tower.front
        layers = list(encoder.layers)
        for point in self.points:
            number = point.tower_layer
            if number is not None and "tower_keys" in point.spec.needs:
                what = f"compression: {point.spec.kind} at {point.place}"
                attention = attention_module(layers[number if point.inside_layer else number - 1], what)
                self._keys[number] = undo.enter_context(recording_of(attention, Recording(wants_keys=True), what))
        # In the instance's dict, where it hides the list of modules, which stays as it is.
        encoder.__dict__["layers"] = [_TowerLayer(layer, number, self) for number, layer in enumerate(layers)]
        undo.callback(encoder.__dict__.pop, "layers", None)

    def at_tower_layer(self, number: int, inside: bool) -> list[Point]:
        """Return the points before a layer of the tower, or those inside of it."""
        return [point for point in self.points if point.tower_layer == number and point.inside_layer == inside]

    def through_points(self, points: Sequence[Point], hidden_BTD: Tensor, mask: Any) -> tuple[Tensor, Any]:
        """Return the hidden states that points of one place in the tower leave, and the additive mask from there on."""
        layout = self.decoder.located(self.current)[0]
        if layout is None:
            return self._idle(points, hidden_BTD), mask
        if points:
            front_BTD, patches_BND = hidden_BTD[:, : self._front], hidden_BTD[:, self._front :]
            if not self._units:
                self._units = self._units_of(layout, patches_BND)
            (units,) = self._units  # the tower's images are of one size
            units.kept = replace(units.kept, hidden_BMD=patches_BND)
            self._apply(points)
            (units,) = self._units
            hidden_BTD = torch.cat([front_BTD, units.kept.hidden_BMD.to(hidden_BTD.dtype)], 1)
        if self._units and self._units[0].kept.size_bias:
            sizes_BT = nn.functional.pad(self._units[0].kept.sizes_BM, (self._front, 0), value=1)
            mask = sizes_BT[:, None, None].float().log().to(hidden_BTD.dtype)
        return hidden_BTD, mask

    def _idle(self, points: Sequence[Point], hidden: Tensor) -> Tensor:
        """Pass hidden states of a rank without images by what points learned."""
        for point in points:
            module = self.decoder.module_of(point)
            hidden = hidden if module is None else call_idle(module, hidden)
        return hidden

    def _apply(self, points: Sequence[Point]) -> None:
        """Let points act on the features as they are, one after the other."""
        for point in points:
            inputs = [(unit.kept.hidden_BMD, unit.grid, self._context(point, unit)) for unit in self._units]
            kept = apply_point(point, inputs, self.decoder.module_of(point), self.decoder.draw.fill)
            self._units = [part for unit, one in zip(self._units, kept, strict=True) for part in unit.keep(one)]

    def _resize(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layout = self.decoder.located(self.current)[0]
        pixels_BCHW = args[0] if args else kwargs["pixel_values"]
        (point,) = (point for point in self.points if hasattr(point.compressor, "resize"))
        if layout is None:
            # A rank without images: its idle image goes the way of the others' images through the tower, since
            # interpolating reads the position embeddings without calling their module (ZeRO-3 counts calls).
            grids = set(self.decoder.family.grids({"pixel_values": pixels_BCHW}, 0))
        else:
            grids = {group.grid for group in layout.groups}
        if len(grids) > 1:
            raise UsageError(f"compression: {point.spec.kind}: the tower's images of one call have several grids")
        (grid,) = grids
        try:
            assert isinstance(point.compressor, Resizes)
            smaller_BCHW = point.compressor.resize(pixels_BCHW, grid)
        except ValueError as error:
            raise UsageError(f"compression: {point.spec.kind} at {point.place}: {error}") from error
        if smaller_BCHW.shape != pixels_BCHW.shape:
            kwargs = kwargs | {"interpolate_pos_encoding": True}
        if args:
            return (smaller_BCHW, *args[1:]), kwargs
        return args, kwargs | {"pixel_values": smaller_BCHW}

    def _shorten(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        features, rest = args[0], args[1:]
        layout = self.decoder.located(self.current)[0]
        points = [point for point in self.points if point.at_projector]
        self._padding = None
        if layout is None:
            return (self._idle(points, features), *rest)
        if self._units:  # on their way since the tower
            (one,) = self._units
            one.kept = replace(one.kept, hidden_BMD=features.flatten(0, -2).unflatten(0, one.kept.sizes_BM.shape))
        else:
            self._units = self._units_of(layout, features)
        self._apply(points)
        units, self._units = self._units, []
        self.current.projected = [
            (unit.group, replace(unit.kept, hidden_BMD=unit.kept.hidden_BMD[..., :0])) for unit in units
        ]
        first = [unit.offsets_I.unsqueeze(1) + torch.arange(unit.kept.hidden_BMD.shape[1]) for unit in units]
        places = torch.cat([places_IM.flatten() for places_IM in first]).to(features.device, non_blocking=True)
        self._padding = places, layout.visual_tokens, features.shape[:-2]
        flat_LD = torch.cat([unit.kept.hidden_BMD.flatten(0, 1).to(features.dtype) for unit in units])
        return (flat_LD if features.ndim == 2 else flat_LD.unsqueeze(0), *rest)

    def _units_of(self, layout: Layout, features: Tensor) -> list[_Units]:
        """Return the features of each group: the tower's images and the units of the batch are in one order."""
        flat_LD = features.flatten(0, -2)
        number_U = torch.cat(image_numbers(layout.groups, layout.length))
        sizes_U = torch.cat([torch.full_like(group.rows_I, group.columns_IN.shape[1]) for group in layout.groups])
        order_U = number_U.argsort()
        offset_U = (sizes_U[order_U].cumsum(0) - sizes_U[order_U])[number_U]
        resized = any(hasattr(point.compressor, "resize") for point in self.points)
        tokens = len(flat_LD) // len(number_U)
        if len(flat_LD) != (tokens * len(number_U) if resized else layout.visual_tokens):
            raise UsageError(
                f"compression: {self.points[0].spec.kind} at {self.points[0].place}: the tower gave {len(flat_LD)} "
                f"features for {len(number_U)} images of {layout.visual_tokens} visual tokens; give a decoder layer "
                "instead"
            )
        units = []
        counts = [len(group.rows_I) for group in layout.groups]
        parts = zip(layout.groups, number_U.split(counts), offset_U.split(counts), strict=True)
        for group, numbers_I, offsets_I in parts:
            starts_I, count = (numbers_I * tokens, tokens) if resized else (offsets_I, group.columns_IN.shape[1])
            index_IN = (starts_I.unsqueeze(1) + torch.arange(count)).to(features.device, non_blocking=True)
            place_IN = torch.arange(group.columns_IN.shape[1], device=features.device).expand(group.columns_IN.shape)
            kept = Kept(flat_LD[index_IN], place_IN.unsqueeze(0), torch.ones_like(place_IN), place_IN, group.grid)
            units.append(_Units(kept, group, numbers_I, offsets_I, place_IN.shape[1]))
        return units

    def _context(self, point: Point, units: _Units) -> Context:
        fields = self.decoder.draw.context_fields(units.group.rows_I)
        if "cls" in point.spec.needs:  # what the CLS token saw, of the features that are left
            attention_IN, keys_IND = cls_of_images(self.current.tower, units.tokens, units.numbers_I)
            index_IM = units.sources_BM.clamp(min=0)
            fields["cls_attention_BN"] = attention_IN.gather(1, index_IM)
            fields["cls_keys_BND"] = tokens_at(keys_IND, index_IM)
        if (recording := self._keys.get(-1 if point.tower_layer is None else point.tower_layer)) is not None:
            if not recording.keys:
                raise not_recorded(
                    self.decoder.family.tower.encoder, f"compression: {point.spec.kind} at {point.place}"
                )
            fields["tower_keys_BND"] = recording.keys[-1].mean(1)[:, self._front :]
        return Context(point.layer, units.kept.positions_ABM, units.kept.sizes_BM, **fields)

    def _pad(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._padding is None:
            return None
        places, tokens, leading = self._padding
        self._padding = None
        padded_LD = output.new_zeros(tokens, output.shape[-1])
        return padded_LD.index_copy(0, places, output.flatten(0, -2)).unflatten(0, (*leading, -1))


class _TowerLayer:
    """A layer of the vision tower at its place: the points before it act on what enters it, those inside of it between
    its attention and its MLP.
    """

    def __init__(self, layer: Any, number: int, at: AtProjector) -> None:
        self._layer, self._number, self._at = layer, number, at

    def __call__(self, hidden_BTD: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        at, layer = self._at, self._layer
        before, inside = (at.at_tower_layer(self._number, inside) for inside in (False, True))
        hidden_BTD, attention_mask = at.through_points(before, hidden_BTD, attention_mask)
        if not inside:
            return layer(hidden_BTD, attention_mask, *args, **kwargs)
        if not recomputes_views(layer):
            raise UsageError(
                f"compression: {inside[0].spec.kind} inside {inside[0].place}: this activation checkpointing would run "
                "the whole layer again; use transformers 5.23 or later and use_reentrant=False, or inside_layer: false"
            )
        # The layer's own forward twice, each time on a view of it in which the other half adds nothing; one call of the
        # layer and of each module in it, in their usual order (ZeRO-3 gathers parameters by it).
        attending = view_of(layer, {"layer_norm2": _unchanged, "mlp": _nothing})
        behind = view_of(layer, {"layer_norm1": _unchanged, "self_attn": _no_attention})

        def halves(hidden_BTD: Tensor) -> Any:
            hidden_BTD = type(layer).forward(attending, hidden_BTD, attention_mask, *args, **kwargs)
            hidden_BTD, _ = at.through_points(inside, hidden_BTD, attention_mask)
            return type(layer).forward(behind, hidden_BTD, None, *args, **kwargs)

        return call_once(layer, halves, hidden_BTD)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)


def _unchanged(hidden_BTD: Tensor) -> Tensor:
    return hidden_BTD


def _nothing(hidden_BTD: Tensor) -> Tensor:
    return hidden_BTD.new_zeros(())


def _no_attention(hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    return hidden_states.new_zeros(()), None


@dataclass
class _Units:
    """The features of all units of one grid on their way through the points.

    Attributes:
        kept: What is left of them; positions (one axis) and sources count in each unit from 0.
        group: Where they stand in the rows.
        numbers_I: Which unit of the batch each is.
        offsets_I: Visual tokens of the batch before each.
        tokens: First features of each unit.
    """

    kept: Kept
    group: ImageGroup
    numbers_I: Tensor
    offsets_I: Tensor
    tokens: int

    @property
    def grid(self) -> Grid:
        """Their grid."""
        assert self.kept.grid is not None
        return self.kept.grid

    @property
    def sources_BM(self) -> Tensor:
        """Which first feature each stands in place of; -1 for a new one."""
        assert self.kept.sources_BM is not None
        return self.kept.sources_BM

    def keep(self, kept: Kept) -> list[_Units]:
        """Return the features to continue with, of what a method kept, as `apply_point` returned it."""
        assert kept.sources_BM is not None
        sources_BM = self.sources_BM.gather(1, kept.sources_BM.clamp(min=0)).masked_fill(kept.sources_BM < 0, -1)
        renumber, size_bias = kept.renumber or self.kept.renumber, kept.size_bias or self.kept.size_bias
        kept = replace(kept, sources_BM=sources_BM, renumber=renumber, size_bias=size_bias)
        parts = []
        for images, left, number_I in by_count(self.group, kept):
            of_I = number_I.cpu() if isinstance(number_I, Tensor) else number_I
            parts.append(_Units(left, images, self.numbers_I[of_I], self.offsets_I[of_I], self.tokens))
        return parts


def expand_images(family: Any, input_ids_BN: Tensor, times: int, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of `generate` with the images of each row repeated as a whole, as its rows are (beams).

    Without ready features, transformers repeats image by image, which mixes the images of a row that has several.

    Args:
        family: Adapter of a model whose images are units of `image_units`.
        input_ids_BN: Rows before they are repeated.
        times: How often.
        inputs: The other arguments of the forward.

    Raises:
        UsageError: an argument is neither by image, by unit, by row nor packed patches.
    """
    visual_BN = family.visual_BN(input_ids_BN).cpu()
    if not bool(visual_BN.any()):
        return {}
    given = {name: value for name, value in inputs.items() if name.startswith(_OF_IMAGES) and value is not None}
    inputs = {**inputs, "input_ids": input_ids_BN}
    units = [len(one) for one in family.image_units(inputs)]
    layout = build_layout(visual_BN, visual_BN, family.grids(inputs, int(visual_BN.sum())))
    places = torch.cat([group.rows_I * layout.length + group.columns_IN[:, 0] for group in layout.groups])
    row_U = places.sort().values // layout.length
    image_U = torch.arange(len(units)).repeat_interleave(torch.tensor(units))
    row_I = row_U[torch.cat([torch.ones(1, dtype=torch.bool), image_U[1:] != image_U[:-1]])] if len(units) else row_U
    thw = inputs.get("image_grid_thw")
    patches_I = None if thw is None else torch.as_tensor(thw).prod(1).cpu()
    expanded = {}
    for name, value in given.items():
        count = len(value) if isinstance(value, Tensor) else -1
        if name == "pixel_values" and family.pixels_by_row and count == len(visual_BN):
            wanted = torch.arange(count).repeat_interleave(times)
        elif count == len(row_I) and len(row_U) == len(image_U):
            wanted = _of_rows(row_I, len(visual_BN), times)
        elif count == len(row_U) and len(row_U) == len(image_U):
            wanted = _of_rows(row_U, len(visual_BN), times)
        elif name == "pixel_values" and patches_I is not None and count == int(patches_I.sum()):
            wanted = _of_rows(row_I.repeat_interleave(patches_I), len(visual_BN), times)
        else:
            raise UsageError(
                f"generate: {type(family.model).__name__} takes {name} by neither image nor tile, so several beams or "
                "answers at once cannot repeat it; give num_beams=1 and num_return_sequences=1"
            )
        expanded[name] = value[wanted.to(value.device)]
    return expanded


# By their names, what belongs to images or videos and not to the tokens of rows.
_OF_IMAGES = ("pixel_", "image_", "video_", "spatial_", "num_local_", "num_frames_")


def _of_rows(row_K: Tensor, rows: int, times: int) -> Tensor:
    """Return the numbers of what stands in each row, row by row, each row `times` times."""
    return torch.cat([(row_K == row).nonzero().squeeze(1).repeat(times) for row in range(rows)])

"""Points at the projector: visual features get fewer before it maps them, and the decoder's rows follow.

The unmodified model checks that there is a feature for every placeholder. So what the projector gives is padded back to
the number it was, each unit's features first, and the decoder trims the rows before its first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from orchestrator.compression.attention.tower import cls_of_images, image_numbers
from orchestrator.compression.families import Family
from orchestrator.compression.forward.apply_point import apply_point, by_count, call_idle
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
    """The hooks of one forward on the projector, and on the tower where a method acts on pixels; a context manager.

    Attributes:
        decoder: The attached model.
        current: The pass under way.
        points: The points at the projector, in their order.
    """

    decoder: Decoder
    current: Pass
    points: Sequence[Point]
    _handles: list[RemovableHandle] = field(default_factory=list)
    _padding: tuple[Tensor, int, torch.Size] | None = None

    def __enter__(self) -> AtProjector:
        if not self.points:
            return self
        family = self.decoder.family
        projector = family.projector
        assert projector is not None
        if any(hasattr(point.compressor, "resize") for point in self.points):
            tower = family.resizable_tower
            assert tower is not None
            self._handles.append(tower.register_forward_pre_hook(self._resize, prepend=True, with_kwargs=True))
        # In front of the others, so that ZeRO-3 sees a learned module before the projector, not inside of it.
        self._handles.append(projector.register_forward_pre_hook(self._shorten, prepend=True))
        self._handles.append(projector.register_forward_hook(self._pad))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

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
        self._padding = None
        if layout is None:
            for point in self.points:
                module = self.decoder.module_of(point)
                features = features if module is None else call_idle(module, features)
            return (features, *rest)
        units = self._units(layout, features)
        for point in self.points:
            inputs = [(unit.kept.hidden_BMD, unit.grid, self._context(point, unit)) for unit in units]
            kept = apply_point(point, inputs, self.decoder.module_of(point), self.decoder.draw.fill)
            units = [part for unit, one in zip(units, kept, strict=True) for part in unit.keep(one)]
        self.current.projected = [
            (unit.group, replace(unit.kept, hidden_BMD=unit.kept.hidden_BMD[..., :0])) for unit in units
        ]
        first = [unit.offsets_I.unsqueeze(1) + torch.arange(unit.kept.hidden_BMD.shape[1]) for unit in units]
        places = torch.cat([places_IM.flatten() for places_IM in first]).to(features.device, non_blocking=True)
        self._padding = places, layout.visual_tokens, features.shape[:-2]
        flat_LD = torch.cat([unit.kept.hidden_BMD.flatten(0, 1).to(features.dtype) for unit in units])
        return (flat_LD if features.ndim == 2 else flat_LD.unsqueeze(0), *rest)

    def _units(self, layout: Layout, features: Tensor) -> list[_Units]:
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
                f"compression: {self.points[0].spec.kind} at the projector: the tower gave {len(flat_LD)} features for "
                f"{len(number_U)} images of {layout.visual_tokens} visual tokens; give a decoder layer instead"
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
        return Context(point.layer, units.kept.positions_ABM, units.kept.sizes_BM, **fields)

    def _pad(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._padding is None:
            return None
        places, tokens, leading = self._padding
        self._padding = None
        padded_LD = output.new_zeros(tokens, output.shape[-1])
        return padded_LD.index_copy(0, places, output.flatten(0, -2)).unflatten(0, (*leading, -1))


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


def expand_images(family: Family, input_ids_BN: Tensor, times: int, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of `generate` with the images of each row repeated as a whole, as its rows are (beams).

    Without ready features, transformers repeats image by image, which mixes the images of a row that has several.
    """
    visual_BN = family.visual_BN(input_ids_BN).cpu()
    if not bool(visual_BN.any()):
        return {}
    layout = build_layout(visual_BN, visual_BN, family.grids(inputs, int(visual_BN.sum())))
    places = torch.cat([group.rows_I * layout.length + group.columns_IN[:, 0] for group in layout.groups])
    row_U = places.sort().values // layout.length
    wanted = torch.cat([(row_U == row).nonzero().squeeze(1).repeat(times) for row in range(len(visual_BN))])
    names = [name for name in ("pixel_values", "image_sizes") if isinstance(inputs.get(name), Tensor)]
    return {name: inputs[name][wanted.to(inputs[name].device)] for name in names}

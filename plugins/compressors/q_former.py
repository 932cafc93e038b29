"""`q_former`: learned queries look at the visual tokens (BLIP-2, Flamingo's resampler; elastic as MQT); it learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor, nn


class QFormerSpec(plugin.CompressorSpec):
    """`keep_tokens` learned queries take the place of an image's visual tokens.

    Each of `depth` layers is attention among the queries, attention of the queries to the image's tokens (BLIP-2,
    arXiv:2301.12597 section 3.1; Flamingo's resampler, arXiv:2204.14198 section 3.1.1, has the latter only) and a
    feed-forward network, each after a layer norm. Tokens carry sinusoidal positions of their row and column. The number
    of queries is a shape of the module, so the amount is `keep_tokens`; with `max_queries` the first queries of that
    many are used (Matryoshka queries, arXiv:2405.19315 section 3.2), any amount fits, and stages share one module.
    Position ids of the queries are spread evenly over the image's.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.q_former:QFormer"
    points: ClassVar[tuple[str, ...]] = ("decoder", "projector")
    learns: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = False

    kind: Literal["q_former"] = "q_former"
    max_queries: plugin.Count | None = None
    """Queries that exist; null has as many as `keep_tokens`. With it, stages of different amounts share one module."""
    depth: plugin.Count = 2
    """Layers of the module."""
    hidden_size: plugin.Count | None = None
    """Width of the queries inside; null takes about a quarter of the tokens' width."""
    heads: plugin.Count = 8
    """Attention heads."""
    self_attention: plugin.Flag = True
    """Whether queries attend to one another."""

    @model_validator(mode="after")
    def _has_queries(self) -> QFormerSpec:
        if self.max_queries is None and (self.stride or self.keep_ratio):
            raise PydanticCustomError(
                "amount", "the number of queries is a shape of the module: give keep_tokens, or max_queries too"
            )
        if self.max_queries is not None and (self.keep_tokens or 0) > self.max_queries:
            raise PydanticCustomError("amount", "keep_tokens is more than max_queries")
        if self.hidden_size is not None and self.hidden_size % self.heads:
            raise PydanticCustomError("heads", "hidden_size is no multiple of heads")
        return self

    def kept_tokens(self, grid: plugin.Grid) -> int:
        """Return the number of queries used.

        Raises:
            ValueError: it is more than the image's tokens, or than there are queries.
        """
        kept = plugin.amount_to_keep(self, grid.tokens)
        if self.max_queries is not None and kept > self.max_queries:
            raise ValueError(f"{kept} tokens are to be kept, but there are max_queries {self.max_queries} queries")
        return kept

    def nearest_amount(self, keep: int, grid: plugin.Grid) -> int:
        """Return no more than the image's tokens and the queries."""
        return super().nearest_amount(min(keep, self.max_queries or keep), grid)

    def inner_width(self, width: int) -> int:
        """Return the width of the queries inside, for tokens of `width`."""
        return self.hidden_size or self.heads * max(1, round(width / 4 / self.heads))

    def module_operations(self, grid: plugin.Grid, width: int) -> int:
        """Linear maps and attention of all layers, and the maps from and to the tokens' width."""
        tokens, kept, inner = grid.tokens, self.kept_tokens(grid), self.inner_width(width)
        across = 4 * inner**2 * (kept + tokens) + 4 * kept * tokens * inner
        among = 8 * inner**2 * kept + 4 * kept**2 * inner if self.self_attention else 0
        return self.depth * (across + among + 16 * inner**2 * kept) + 2 * width * inner * (tokens + kept)

    def module_shape(self) -> dict[str, Any]:
        """Return the module's shape with the number of queries that exist."""
        return super().module_shape() | {"max_queries": self.max_queries or self.keep_tokens}


class QFormer:
    """The module does the work; this gives it the number of queries."""

    def __init__(self, spec: QFormerSpec) -> None:
        self.spec = spec

    def create_module(self, width: int) -> nn.Module:
        """Return the queries and their layers, for tokens of `width`."""
        return build_resampler(self.spec, width)

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`.

        Raises:
            ValueError: there are more queries than tokens.
        """
        import torch

        assert context.module is not None
        images, tokens = visual_BND.shape[:2]
        kept = self.spec.kept_tokens(grid)
        first_M = plugin.evenly_spaced(tokens, kept, visual_BND.device)
        window_N = torch.zeros(tokens, dtype=torch.long, device=visual_BND.device)
        window_N = window_N.index_fill(0, first_M[1:], 1).cumsum(0)
        sizes_BM = context.sizes_BN.new_zeros(images, kept).index_add(1, window_N, context.sizes_BN)
        return plugin.Kept(
            context.module(visual_BND, grid, kept),
            context.positions_ABN[:, :, first_M],
            sizes_BM,
            sources_BM=first_M.expand(images, -1),
        )


def sinusoids(grid: plugin.Grid, width: int) -> Tensor:
    """Return the positions of a grid's tokens, N x width: half of the channels for the row, half for the column
    (float32).

    sin and cos of place / 10000^(k / frequencies), as in arXiv:1706.03762 section 3.5, along each axis.
    """
    import torch

    frequencies = max(1, width // 4)
    rate_F = 10000.0 ** (-torch.arange(frequencies) / frequencies)
    parts = []
    for place_N in (
        torch.arange(grid.height).repeat_interleave(grid.width),
        torch.arange(grid.width).repeat(grid.height),
    ):
        angle_NF = place_N.unsqueeze(1) * rate_F
        parts += [angle_NF.sin(), angle_NF.cos()]
    table_NF = torch.cat(parts, dim=1)[:, :width]
    return torch.nn.functional.pad(table_NF, (0, width - table_NF.shape[1]))


def build_resampler(spec: QFormerSpec, width: int) -> nn.Module:
    """Return a module that maps (visual_BND, grid, number of queries) to B x M x width."""
    import torch
    from torch import nn

    hidden = spec.inner_width(width)
    queries = spec.max_queries or spec.keep_tokens or 0  # never 0: the spec asks for one of them

    class Resampler(nn.Module):
        """Queries, their layers, and the maps from and to the width of the tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(0.02 * torch.randn(queries, hidden))
            self.enter, self.enter_norm = nn.Linear(width, hidden), nn.LayerNorm(hidden)
            self.layers = nn.ModuleList(build_layer(spec, hidden) for _ in range(spec.depth))
            self.norm, self.leave = nn.LayerNorm(hidden), nn.Linear(hidden, width)

        def forward(self, visual_BND: Tensor, grid: plugin.Grid, count: int) -> Tensor:
            value_BNH = self.enter_norm(self.enter(visual_BND))
            key_BNH = value_BNH + sinusoids(grid, hidden).to(value_BNH)
            query_BMH = self.queries[:count].expand(len(visual_BND), -1, -1)
            for layer in self.layers:
                query_BMH = layer(query_BMH, key_BNH, value_BNH)
            result: Tensor = self.leave(self.norm(query_BMH))
            return result

    return Resampler()


def build_layer(spec: QFormerSpec, hidden: int) -> nn.Module:
    """Return a module that maps (query_BMH, key_BNH, value_BNH) to new queries."""
    from torch import nn

    class Layer(nn.Module):
        """Queries look at one another, then at the tokens, then each goes through a feed-forward network."""

        def __init__(self) -> None:
            super().__init__()
            self.among_norm = nn.LayerNorm(hidden) if spec.self_attention else None
            self.among = nn.MultiheadAttention(hidden, spec.heads, batch_first=True) if spec.self_attention else None
            self.across_norm = nn.LayerNorm(hidden)
            self.across = nn.MultiheadAttention(hidden, spec.heads, batch_first=True)
            self.last_norm = nn.LayerNorm(hidden)
            self.feed_forward = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

        def forward(self, query_BMH: Tensor, key_BNH: Tensor, value_BNH: Tensor) -> Tensor:
            if self.among is not None and self.among_norm is not None:
                normed_BMH = self.among_norm(query_BMH)
                query_BMH = query_BMH + self.among(normed_BMH, normed_BMH, normed_BMH, need_weights=False)[0]
            seen_BMH = self.across(self.across_norm(query_BMH), key_BNH, value_BNH, need_weights=False)[0]
            query_BMH = query_BMH + seen_BMH
            result: Tensor = query_BMH + self.feed_forward(self.last_norm(query_BMH))
            return result

    return Layer()

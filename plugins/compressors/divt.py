"""`divt`: as many tokens as an image has clusters of alike ones (DiVT, CVPR 2026, arXiv:2605.17954); it learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor, nn


class DivtSpec(plugin.CompressorSpec):
    """An image's tokens are clustered by their cosines, and attention makes one token of each cluster.

    Again and again the token with most neighbours of a cosine of at least `threshold` among those that are left is a
    centre, and leaves with its neighbours; then each token goes to its nearest centre. So simple images keep few
    tokens: the release reports 35.7, 74.1 and 136.5 of 576 on average at 0.5, 0.65 and 0.75. The amount is the most:
    once there are so many centres, what is left goes to the nearest of them (the release has no such bound;
    `keep_ratio: 1` is none). Attention of 8 heads inside each cluster: query `Wq LN(c)` of its centre, keys
    `LN(MLP(x))` and values `LN(MLP(x + p))` of its members, MLPs of two layers, p learned for 24 x 24 places and
    interpolated to other grids. The release maps the result to the decoder by an MLP of two layers; at
    `layer: projector`, its place, the model's own projector is that MLP. Tokens stand in the order of their centres and
    have their position ids.

    Cosines are float64 products; one that equals `threshold` up to 1e-5 counts as above it, and of equal numbers of
    neighbours the first token is the centre. The clusters take no gradient. It starts from random maps, as a projector
    does: train it (`train: [..., compressor]`).
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.divt:Divt"
    points: ClassVar[tuple[str, ...]] = ("decoder", "projector")
    learns: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = False
    adaptive: ClassVar[bool] = True

    kind: Literal["divt"] = "divt"
    threshold: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.65
    """Cosine from which two tokens are neighbours: the higher, the more tokens are left."""
    heads: plugin.Count = 8
    """Attention heads; they divide the tokens' width."""
    position_grid: plugin.Count = 24
    """Rows and columns of learned positions; images of another shape interpolate them."""

    def module_operations(self, grid: plugin.Grid, width: int) -> int:
        """Count both MLPs of all tokens, the queries, and attention as it is computed: every query with every key."""
        tokens, most = grid.tokens, self.kept_tokens(grid)
        side = self.position_grid
        places = 0 if (grid.height, grid.width) == (side, side) else 2 * grid.height * side * (side + grid.width)
        return 8 * width**2 * tokens + 2 * width**2 * most + 4 * most * tokens * width + places * width

    def module_shape(self) -> dict[str, Any]:
        """Return heads and positions; variants of other thresholds share one module."""
        return {"heads": self.heads, "position_grid": self.position_grid}


class Divt:
    """Finds the clusters and gives them to the module, which makes the tokens."""

    def __init__(self, spec: DivtSpec) -> None:
        self.spec = spec

    def create_module(self, width: int) -> nn.Module:
        """Return positions and maps, for tokens of `width`.

        Raises:
            UsageError: the heads do not divide it.
        """
        if width % self.spec.heads:
            raise plugin.UsageError(f"attach: divt: {self.spec.heads} heads do not divide a width of {width}")
        return build_attention(self.spec, width)

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`."""
        from dataclasses import replace

        assert context.module is not None
        index_BM, counts_B, slots_BN = clusters(visual_BND.detach(), self.spec.threshold, self.spec.kept_tokens(grid))
        return replace(
            plugin.take(visual_BND, index_BM, context, counts_B),
            hidden_BMD=context.module(visual_BND, grid, index_BM, slots_BN),
            sizes_BM=plugin.sum_members(context.sizes_BN, slots_BN, index_BM.shape[1]),
        )


def clusters(visual_BND: Tensor, threshold: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the clusters of each image's tokens.

    Returns:
        The centres in rising order, B x M (the last token where an image has fewer than M), how many each image has,
        and the cluster of each token, B x N.
    """
    import torch

    tokens = visual_BND.shape[1]
    cosines_BNN = plugin.cosines(visual_BND, visual_BND)
    near_BNN = cosines_BNN >= threshold - plugin.TOLERANCE
    near_BNN |= torch.eye(tokens, dtype=torch.bool, device=visual_BND.device)  # a token of zeros is its own neighbour
    numbers_BNN = near_BNN.float()
    left_BN = torch.ones_like(near_BNN[:, 0])
    is_centre_BN = torch.zeros_like(left_BN)
    found = 0
    while found < most and bool(left_BN.any()):
        with plugin.full_precision(visual_BND.device):  # whole numbers, exact in float32
            neighbours_BN = (numbers_BNN @ left_BN.float().unsqueeze(2)).squeeze(2)
        first_B1 = plugin.argmax(neighbours_BN.masked_fill(~left_BN, -1), scale=1).unsqueeze(1)
        # An image that has no token left stays as it is, whatever the others of the batch still do.
        is_centre_BN |= torch.zeros_like(left_BN).scatter(1, first_B1, left_BN.any(1, keepdim=True))
        left_BN &= ~near_BNN.gather(1, first_B1.unsqueeze(2).expand(-1, -1, tokens)).squeeze(1)
        found += 1
    index_BM, counts_B = plugin.places_of(is_centre_BN, found), is_centre_BN.sum(1)
    is_there_BM = index_BM < tokens
    index_BM = index_BM.clamp(max=tokens - 1)
    to_centre_BNM = cosines_BNN.gather(2, index_BM.unsqueeze(1).expand(-1, tokens, -1))
    slots_BN = plugin.argmax(to_centre_BNM.masked_fill(~is_there_BM.unsqueeze(1), -torch.inf), scale=1)
    # A centre stays its cluster's, also one of zeros, which is near to none.
    number_BN = is_centre_BN.cumsum(1) - 1
    return index_BM, counts_B, torch.where(is_centre_BN, number_BN, slots_BN)


def build_attention(spec: DivtSpec, width: int) -> nn.Module:
    """Return a module that maps (visual_BND, grid, index_BM, slots_BN) to B x M x width."""
    import torch
    from torch import nn

    side = spec.position_grid

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    class ClusterAttention(nn.Module):
        """Each centre looks at the members of its cluster."""

        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(0.02 * torch.randn(side, side, width))
            self.query_norm, self.query = nn.LayerNorm(width), nn.Linear(width, width)
            self.key, self.key_norm = mlp(), nn.LayerNorm(width)
            self.value, self.value_norm = mlp(), nn.LayerNorm(width)

        def forward(self, visual_BND: Tensor, grid: plugin.Grid, index_BM: Tensor, slots_BN: Tensor) -> Tensor:
            query_BMD = self.query(self.query_norm(plugin.tokens_at(visual_BND, index_BM)))
            key_BND = self.key_norm(self.key(visual_BND))
            value_BND = self.value_norm(self.value(visual_BND + self.places(grid).to(visual_BND.dtype)))
            number_M1 = torch.arange(index_BM.shape[1], device=slots_BN.device).unsqueeze(1)
            own_BMN = slots_BN.unsqueeze(1) == number_M1
            own_BMN = own_BMN | ~own_BMN.any(2, keepdim=True)  # what stands for no cluster is cut: any number will do
            query_BhMd, key_BhNd, value_BhNd = (
                one.unflatten(2, (spec.heads, -1)).transpose(1, 2) for one in (query_BMD, key_BND, value_BND)
            )
            scores_BhMN = plugin.at_least_float32(query_BhMd @ key_BhNd.mT) * (width // spec.heads) ** -0.5
            weights_BhMN = scores_BhMN.masked_fill(~own_BMN.unsqueeze(1), -torch.inf).softmax(-1)
            result: Tensor = (weights_BhMN.to(value_BhNd.dtype) @ value_BhNd).transpose(1, 2).flatten(2)
            return result

        def places(self, grid: plugin.Grid) -> Tensor:
            """Return the positions of a grid's tokens, N x width; of another shape by bilinear interpolation."""
            if (grid.height, grid.width) == (side, side):
                return self.positions.flatten(0, 1)
            rows_hs, columns_ws = (_linear(side, count).to(self.positions) for count in (grid.height, grid.width))
            rows_hsD = (rows_hs @ self.positions.flatten(1)).unflatten(1, (side, width))
            return (columns_ws @ rows_hsD).flatten(0, 1)

    return ClusterAttention()


def _linear(tokens: int, wanted: int) -> Tensor:
    """Return the map of one axis by linear interpolation, wanted x tokens."""
    import torch
    from torch.nn.functional import interpolate

    return interpolate(torch.eye(tokens).unsqueeze(0), size=wanted, mode="linear", align_corners=False)[0].T

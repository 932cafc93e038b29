"""`k_means`: an image's tokens in M clusters, each replaced by its mean (LLaVolta section 4.2, Table 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor


class KMeansSpec(plugin.CompressorSpec):
    """Lloyd's algorithm from evenly spaced tokens; `stride` S means ceil(tokens / S) clusters.

    The paper says k-means with L/S centroids and no more. Its code measures by the L1 distance and runs one round by
    default; this is plain k-means (L2), which `iterations: 1` brings near to it. A cluster's position id is the
    mean of its members' rounded down; clusters stand in the order of their members' mean place in the image.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.k_means:KMeans"
    points: ClassVar[tuple[str, ...]] = ("decoder", "projector", "tower")

    kind: Literal["k_means"] = "k_means"
    iterations: plugin.Count = 10
    """Most rounds of assignment and new centres; it ends sooner where no assignment changes."""


class KMeans:
    """Assignment takes no gradient; the means of the clusters pass it to their members."""

    def __init__(self, spec: KMeansSpec) -> None:
        self.spec = spec

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`; each cluster stands in place of its first member.

        Raises:
            ValueError: more clusters are asked for than there are tokens.
        """
        tokens, kept = visual_BND.shape[1], self.spec.kept_tokens(grid)
        if kept == tokens:
            return plugin.take(visual_BND, plugin.evenly_spaced(tokens, tokens, visual_BND.device), context)
        slots_BN, first_BM = in_order(cluster(visual_BND.detach(), kept, self.spec.iterations), kept)
        counts_BM = plugin.sum_members(slots_BN.new_ones(slots_BN.shape), slots_BN, kept)
        return plugin.Kept(
            plugin.merge(visual_BND, slots_BN, kept),
            plugin.sum_members(context.positions_ABN, slots_BN, kept) // counts_BM,
            plugin.sum_members(context.sizes_BN, slots_BN, kept),
            sources_BM=first_BM,
        )


def cluster(visual_BND: Tensor, kept: int, iterations: int) -> Tensor:
    """Return the cluster of each token, B x N; every cluster of 0 to `kept` - 1 has a member.

    A token goes to the nearest centre (of several within `ops.TOLERANCE` the first); a centre
    without tokens stays where it is.
    """
    import torch

    tokens_BND = visual_BND.double()
    centres_BMD = tokens_BND[:, plugin.evenly_spaced(tokens_BND.shape[1], kept, visual_BND.device)]
    lengths_BN1 = tokens_BND.norm(dim=2, keepdim=True)
    distance_BNM = tokens_BND.new_empty(0)
    slots_BN = torch.empty(0, dtype=torch.long, device=visual_BND.device)
    for number in range(iterations):
        if number:
            members_BMN = torch.zeros_like(distance_BNM.mT).scatter_(1, slots_BN.unsqueeze(1), 1)
            counts_BM1 = members_BMN.sum(2, keepdim=True)
            with plugin.full_precision(visual_BND.device):
                means_BMD = members_BMN @ tokens_BND / counts_BM1.clamp(min=1)
            centres_BMD = torch.where(counts_BM1 > 0, means_BMD, centres_BMD)
        distance_BNM = plugin.distances(tokens_BND, centres_BMD)
        # A centre is no longer than token and distance together, so this is the scale of the errors of both.
        before_BN, slots_BN = slots_BN, plugin.argmin(distance_BNM, lengths_BN1 + distance_BNM.amin(2, keepdim=True))
        # An image that has settled stays as it is, whatever its neighbours in the batch still do.
        if torch.equal(before_BN, slots_BN):
            break
    own_BN = distance_BNM.gather(2, slots_BN.unsqueeze(2)).squeeze(2)
    return _fill_empty(slots_BN, own_BN, lengths_BN1.mean(1) + own_BN.amax(1, keepdim=True), kept)


def _fill_empty(slots_BN: Tensor, own_BN: Tensor, scale_B1: Tensor, kept: int) -> Tensor:
    """Give each empty cluster, in order, the token farthest from its centre among clusters of several members."""
    ones_BN = slots_BN.new_ones(slots_BN.shape)
    while True:
        counts_BM = plugin.sum_members(ones_BN, slots_BN, kept)
        empty_BM = counts_BM == 0
        if not bool(empty_BM.any()):
            return slots_BN
        alone_BN = counts_BM.gather(1, slots_BN) < 2
        token_B1 = plugin.argmax(own_BN.masked_fill(alone_BN, -float("inf")), scale_B1).unsqueeze(1)
        first_empty_B1 = empty_BM.long().argmax(1, keepdim=True)
        unchanged_B1 = slots_BN.gather(1, token_B1)
        slots_BN = slots_BN.scatter(1, token_B1, first_empty_B1.where(empty_BM.any(1, keepdim=True), unchanged_B1))


def in_order(slots_BN: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return the clusters numbered anew by the mean place of their members (then by the first), and each one's first
    member.

    Returns:
        The new numbers, B x N, and the places of the first members, B x M.
    """
    import torch

    places_BN = torch.arange(slots_BN.shape[1], device=slots_BN.device).expand_as(slots_BN)
    counts_BM = plugin.sum_members(torch.ones_like(slots_BN), slots_BN, kept)
    # Equal quotients of whole numbers are equal in float64, too.
    means_BM = plugin.sum_members(places_BN, slots_BN, kept).double() / counts_BM
    first_BM = torch.full_like(counts_BM, slots_BN.shape[1])
    first_BM = first_BM.scatter_reduce(1, slots_BN, places_BN, "amin")
    by_first_BM = first_BM.argsort(1)
    by_mean_BM = means_BM.gather(1, by_first_BM).argsort(dim=1, stable=True)
    order_BM = by_first_BM.gather(1, by_mean_BM)
    return order_BM.argsort(1).gather(1, slots_BN), first_BM.gather(1, order_BM)

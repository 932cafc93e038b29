"""divt: clusters against a plain loop, its attention against torch's, cluster by cluster; what is left of an image."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from method_checks import first_largest, images_of
from orchestrator_plugins.compressors.divt import Divt, DivtSpec, build_attention, clusters
from pydantic import ValidationError
from torch.nn.functional import cosine_similarity, interpolate, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.errors import UsageError
from orchestrator.plugin import TOLERANCE
from orchestrator.spec.components import Grid

GRID, WIDTH = Grid(4, 6), 16
SPEC = DivtSpec(layer="projector", keep_ratio=1, heads=4, position_grid=5)


def loop(tokens_ND: torch.Tensor, threshold: float, most: int) -> tuple[list[int], list[int]]:
    """Centres in rising order, and the cluster of each token."""
    cosine = [cosine_similarity(one, tokens_ND.double(), dim=-1).tolist() for one in tokens_ND.double()]
    near = [
        {j for j, value in enumerate(row) if j == i or value >= threshold - TOLERANCE} for i, row in enumerate(cosine)
    ]
    left, centres = set(range(len(tokens_ND))), []
    while left and len(centres) < most:
        counts = [len(near[i] & left) if i in left else -1 for i in range(len(tokens_ND))]
        centres.append(counts.index(max(counts)))
        left -= near[centres[-1]]
    centres.sort()
    nearest = [first_largest([cosine[i][c] for c in centres], scale=1) for i in range(len(tokens_ND))]
    return centres, [centres.index(i) if i in centres else nearest[i] for i in range(len(tokens_ND))]


def images(seed: int = 0, tokens: int = GRID.tokens) -> torch.Tensor:
    """Images of few kinds of tokens and of many; one of equal tokens, one with tokens of zeros."""
    generator = torch.Generator().manual_seed(seed)

    def kinds(count: int, noise: float) -> torch.Tensor:
        base = torch.randn(count, WIDTH, generator=generator)[torch.randint(count, (tokens,), generator=generator)]
        return base + noise * torch.randn(tokens, WIDTH, generator=generator)

    blank = kinds(3, 0.2)
    blank[[2, 7]] = 0
    return torch.stack([kinds(2, 0.3), kinds(7, 0.6), kinds(tokens, 1.0), kinds(1, 0.0), blank])


@pytest.mark.parametrize("most", [1, 3, 24])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.65, 1.0])
def test_the_clusters_are_the_plain_loops(threshold: float, most: int):
    different = set()
    for seed in range(4):
        visual_BND = images(seed)
        index_BM, counts_B, slots_BN = clusters(visual_BND, threshold, most)
        for image, tokens_ND in enumerate(visual_BND):
            centres, slots = loop(tokens_ND, threshold, most)
            assert index_BM[image, : counts_B[image]].tolist() == centres
            assert slots_BN[image].tolist() == slots
            alone = clusters(tokens_ND[None], threshold, most)
            assert alone[0].shape[1] == len(centres) and torch.equal(alone[2][0], slots_BN[image])
            different.add(len(centres))
    assert len(different) == 1 if most == 1 else len(different) > 1


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-6])
def test_equal_numbers_and_a_cosine_at_the_threshold_do_not_hang_on_the_last_bits(noise: float):
    """Cosines of exactly 1/2 and 0, and as many neighbours of each token."""
    eye = torch.eye(WIDTH)
    half = torch.stack([eye[i] + eye[(i + 1) % 8] for i in range(8)]).repeat(3, 1)
    shake = 1 + noise * (2 * torch.rand(half.shape, generator=torch.Generator().manual_seed(1)) - 1)
    for dtype in (torch.float32, torch.bfloat16):
        index_BM, counts_B, slots_BN = clusters((half * shake).to(dtype)[None], 0.5, 24)
        assert index_BM[0].tolist() == [0, 3, 5] and counts_B.tolist() == [3]
        assert slots_BN[0].tolist() == [0, 0, 1, 1, 1, 2, 2, 0] * 3


def test_counts_are_exact_under_autocast():
    """One kind of 600 tokens and one of 599: bfloat16 cannot tell the numbers."""
    eye = torch.eye(2).repeat_interleave(torch.tensor([599, 600]), 0)
    with torch.autocast("cpu", torch.bfloat16):
        index_BM, _, slots_BN = clusters(eye[None], 0.5, 1)
    assert index_BM.tolist() == [[599]] and not slots_BN.any()


def made(spec: DivtSpec = SPEC):
    torch.manual_seed(3)
    module = Divt(spec).create_module(WIDTH)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    _, context = images_of(GRID, images=5, axes=3)
    return module, images().requires_grad_(), replace(context, module=module)


def test_a_token_is_what_its_centre_sees_of_its_cluster():
    module, visual_BND, context = made()
    kept = Divt(SPEC).compress(visual_BND, GRID, context)
    table_1D = module.positions.permute(2, 0, 1)[None]
    places_ND = interpolate(table_1D, (GRID.height, GRID.width), mode="bilinear")[0].flatten(1).T
    assert len(set(kept.counts_B.tolist())) > 2
    wanted = []
    for image, tokens_ND in enumerate(visual_BND):
        centres, slots = loop(tokens_ND.detach(), SPEC.threshold, 24)
        count = int(kept.counts_B[image])
        assert kept.sources_BM[image, :count].tolist() == centres
        assert torch.equal(kept.positions_ABM[:, image, :count], context.positions_ABN[:, image, centres])
        for number, centre in enumerate(centres):
            members = [token for token, slot in enumerate(slots) if slot == number]
            assert int(kept.sizes_BM[image, number]) == int(context.sizes_BN[image, members].sum())
            query = module.query(module.query_norm(tokens_ND[centre]))[None]
            keys = module.key_norm(module.key(tokens_ND[members]))
            values = module.value_norm(module.value(tokens_ND[members] + places_ND[members]))
            heads = [one.unflatten(1, (4, 4)).transpose(0, 1) for one in (query, keys, values)]
            wanted.append((kept.hidden_BMD[image, number], scaled_dot_product_attention(*heads).flatten()))
    ours, plain = (torch.stack(each) for each in zip(*wanted, strict=True))
    assert torch.allclose(ours, plain, atol=1e-5)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    leaves = [visual_BND, *module.parameters()]
    mine, theirs = (torch.autograd.grad((one * weights).sum(), leaves, retain_graph=True) for one in (ours, plain))
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_the_amount_is_the_most():
    _, visual_BND, context = made()
    for amount, most in (
        ({"keep_tokens": 5}, 5),
        ({"keep_tokens": 99}, 24),
        ({"stride": 5}, 5),
        ({"keep_ratio": 0.5}, 12),
    ):
        spec = DivtSpec(layer="projector", heads=4, position_grid=5, **amount)
        assert spec.kept_tokens(GRID) == most and spec.kept_grid(GRID) == Grid(1, most)
        kept = Divt(spec).compress(visual_BND, GRID, context)
        assert int(kept.counts_B.max()) == kept.hidden_BMD.shape[1] == min(most, 20)
        assert int(kept.counts_B.min()) == 1
    with pytest.raises(ValidationError, match="give the most it leaves of one, keep_tokens"):
        DivtSpec(layer=1, layer_average_tokens=5)


def test_shapes_and_operations():
    assert SPEC.module_name(4) == SPEC.model_copy(update={"threshold": 0.5, "keep_ratio": 0.5}).module_name(4)
    assert SPEC.module_name(4) != SPEC.model_copy(update={"heads": 8}).module_name(4)
    with pytest.raises(UsageError, match="3 heads do not divide a width of 16"):
        Divt(SPEC.model_copy(update={"heads": 3})).create_module(16)
    for grid in (GRID, Grid(5, 5)):
        spec = SPEC.model_copy(update={"keep_tokens": 7, "keep_ratio": None})
        index_BM = torch.arange(7)[None]
        slots_BN = (torch.arange(grid.tokens) % 7)[None]
        with FlopCounterMode(display=False) as counter:
            build_attention(spec, WIDTH)(torch.randn(1, grid.tokens, WIDTH), grid, index_BM, slots_BN)
        assert counter.get_total_flops() == spec.module_operations(grid, WIDTH)

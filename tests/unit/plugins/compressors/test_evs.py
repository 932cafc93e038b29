"""evs and frame_pool: transformers' own sampling and torch's pooling, number by number; videos in a batch's rows."""

from __future__ import annotations

import pytest
import torch
from orchestrator_plugins.compressors.evs import Evs, EvsSpec
from orchestrator_plugins.compressors.frame_pool import FramePool, FramePoolSpec
from orchestrator_plugins.data.easy_vqa import EasyVqaSpec
from orchestrator_plugins.data.moving_shapes import MovingShapesSpec
from pydantic import ValidationError

from orchestrator.compression import Context, attach
from orchestrator.compression.layout import build_layout, join_frames, rearrange, split_frames
from orchestrator.compression.testing import check_compressor
from orchestrator.compression.testing.families import TINY
from orchestrator.errors import UsageError
from orchestrator.spec.checks.compression import check_variant
from orchestrator.spec.components import Grid

nemotron = pytest.importorskip("transformers.models.nemotron_h_omni.modeling_nemotron_h_omni")


def context_of(videos: int, tokens: int) -> Context:
    ids_ABN = (torch.arange(tokens) + 5).expand(1, videos, -1)
    return Context(0, ids_ABN, torch.ones(videos, tokens, dtype=torch.long), torch.arange(videos))


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.75, 0.9, 0.99])
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 3, 4), (2, 2, 2), (5, 3, 4), (10, 5, 2), (8, 4, 4)])
def test_it_keeps_what_transformers_keeps(rate: float, frames: int, height: int, width: int):
    generator = torch.Generator().manual_seed(frames)
    visual_BND = torch.randn(3, frames * height * width, 8, generator=generator)
    still = visual_BND[1].unflatten(0, (frames, -1))
    still[1:, ::2] = still[:1, ::2]  # places where nothing moves: equal scores, rounded differently in float32
    grid = Grid(height * frames, width, frames)
    kept = Evs(EvsSpec(layer=0, pruning_rate=rate)).compress(visual_BND, grid, context_of(3, grid.tokens))
    for video in range(3):
        mask = nemotron.compute_retention_mask(
            video_embeds=visual_BND[video], thw=(frames, height, width), spatial_merge_size=1, q=rate
        )
        theirs = mask.nonzero()[:, 0]
        if video == 1:  # of those that never moved ours are the first
            moved = torch.tensor([place % (height * width) % 2 == 1 for place in range(grid.tokens)])
            assert kept.sources_BM[1][moved[kept.sources_BM[1]]].tolist() == theirs[moved[theirs]].tolist()
            assert len(kept.sources_BM[1]) == len(theirs)
            continue
        assert kept.sources_BM[video].tolist() == theirs.tolist()
        assert torch.equal(kept.hidden_BMD[video], visual_BND[video][mask])
    assert torch.equal(kept.positions_ABM[0], kept.sources_BM + 5) and kept.in_place
    assert kept.sources_BM.shape[1] == EvsSpec(layer=0, pruning_rate=rate).kept_tokens(grid)


@pytest.mark.parametrize(("frames", "left"), [(8, 4), (8, 3), (5, 2), (4, 1), (3, 7), (1, 2)])
def test_frames_are_pooled_as_torch_pools(frames: int, left: int):
    visual_BND, grid = torch.randn(2, frames * 6, 4), Grid(2 * frames, 3, frames)
    kept = FramePool(FramePoolSpec(layer=0, frames=left)).compress(visual_BND, grid, context_of(2, grid.tokens))
    left = min(left, frames)
    volumes = visual_BND.unflatten(1, (frames, 2, 3)).permute(0, 4, 1, 2, 3)
    wanted = torch.nn.functional.adaptive_avg_pool3d(volumes, (left, 2, 3)).permute(0, 2, 3, 4, 1).flatten(1, 3)
    assert torch.allclose(kept.hidden_BMD, wanted, atol=1e-6)
    assert kept.grid == Grid(2 * left, 3, left) and kept.sizes_BM.sum(1).tolist() == [grid.tokens] * 2
    first = [frame * frames // left * 6 + place for frame in range(left) for place in range(6)]
    assert kept.sources_BM[0].tolist() == first
    if frames == 4:  # frames 0 to 3 of place 0 have the ids 5, 11, 17, 23
        assert kept.positions_ABM[0, 0, 0] == 14


def test_frames_of_a_video_are_joined_and_stand_where_they_stood():
    """A row of text, an image, two frames with a time stamp between, text; and one of a video alone."""
    frame = Grid(1, 2)
    row = [0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0]
    visual_BN = torch.tensor([row, [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]]).bool()
    grids = [frame, frame, Grid(1, 2, frame=1), frame, Grid(1, 2, frame=1)]
    layout = join_frames(build_layout(visual_BN, torch.ones_like(visual_BN), grids))
    image, videos = layout.groups
    assert (image.grid, image.columns_IN.tolist()) == (frame, [[1, 2]])
    assert videos.grid == Grid(2, 2, frames=2) and videos.rows_I.tolist() == [0, 1]
    assert videos.columns_IN.tolist() == [[4, 5, 8, 9], [0, 1, 2, 3]]
    sources = torch.tensor([[0, 1, 3], [0, 2, 3]])
    after, moves = rearrange(layout, [2, 3], [frame, Grid(1, 3)], [0, 0], [None, sources])
    assert after.groups[1].columns_IN.tolist() == [[4, 5, 8], [0, 1, 2]]
    assert moves.kept_to[1].tolist() == [4, 5, 8, 10, 11, 12]
    assert moves.text_to.tolist()[:5] == [0, 3, 6, 7, 9], "the time stamp stays between its frames"
    again = split_frames(layout)
    assert [group.grid for group in again.groups] == [frame, frame]
    assert again.groups[1].columns_IN.tolist() == [[4, 5], [8, 9], [0, 1], [2, 3]]
    assert again.groups[1].frames_I.tolist() == [0, 1, 0, 1]


def test_points_after_it_hold_the_contract():
    """Frames left whole are images again; tokens left of a video are one image without a grid."""
    points = [{"kind": "frame_pool", "layer": 1}, {"kind": "average_pool_2d", "layer": 2, "keep_tokens": 2}]
    assert check_compressor(points, ["qwen3_vl"]).proven
    points = [{"kind": "evs", "layer": 0}, {"kind": "average_pool", "layer": 2, "stride": 2}]
    assert check_compressor(points, ["video_llava"]).proven


def test_what_cannot_tell_videos_is_refused():
    with pytest.raises(UsageError, match="does not tell which frames are of one video"):
        attach(TINY["internvl"].build("sdpa", 0), [{"kind": "evs", "layer": 0}])
    tiny = TINY["qwen2_vl"]
    attach(model := tiny.build("sdpa", 0).eval(), [{"kind": "evs", "layer": 0}])
    batch = tiny.batch([[3, "video", 7]], "right", 0, 0)
    with pytest.raises(UsageError, match="give num_beams=1"):
        model.generate(**batch, num_beams=2, max_new_tokens=2)
    images = {"train": EasyVqaSpec()}
    (finding,) = check_variant([EvsSpec(layer=0)], ("compressors", "v"), None, images)
    assert finding.path == ("compressors", "v", 0, "kind") and "no data here has videos" in finding.message
    assert not list(check_variant([EvsSpec(layer=0)], ("compressors", "v"), None, {**images, "t": MovingShapesSpec()}))
    with pytest.raises(ValidationError, match="less than 1"):
        EvsSpec(layer=0, pruning_rate=1.0)
    with pytest.raises(ValidationError, match="takes no amount"):
        FramePoolSpec(layer=0, stride=2)

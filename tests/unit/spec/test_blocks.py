"""Which block of a grid an amount stands for, against trying every block; what follows for plan and checks."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.spec.components import (
    BlockCompressorSpec,
    CompressorSpec,
    Grid,
    amounts_around,
    block_to_keep,
    nearest_block,
)

SIDE = st.integers(1, 26)


class Block(BlockCompressorSpec):
    kind: Literal["block"] = "block"


class Row(CompressorSpec):
    kind: Literal["row"] = "row"
    kept: int = 1

    def kept_tokens(self, grid):
        return self.kept


def every_block(height, width):
    return [(rows, columns) for rows in range(1, height + 1) for columns in range(1, width + 1)]


@settings(max_examples=200, deadline=None)
@given(height=SIDE, width=SIDE, wanted=st.integers(1, 700))
@example(height=24, width=24, wanted=72)
def test_no_block_is_nearer_and_no_block_of_as_many_is_better_shaped(height, width, wanted):
    rows, columns = nearest_block(height, width, wanted)
    assert 1 <= rows <= height and 1 <= columns <= width

    def stretch(block):
        wide = block[0] * width / (block[1] * height)
        return max(wide, 1 / wide)

    for block in every_block(height, width):
        assert abs(block[0] * block[1] - wanted) >= abs(rows * columns - wanted)
        if block[0] * block[1] == rows * columns:
            assert stretch(block) >= stretch((rows, columns)) - 1e-9


def test_blocks_of_llava():
    grid = Grid(24, 24)
    for amount, block in (
        ({"stride": 1}, (24, 24)),
        ({"stride": 4}, (12, 12)),
        ({"stride": 8}, (8, 9)),
        ({"keep_tokens": 144}, (12, 12)),
        ({"keep_ratio": "1/9"}, (8, 8)),
        ({"keep_tokens": 1}, (1, 1)),
        ({"keep_tokens": 576}, (24, 24)),
    ):
        assert block_to_keep(Block(layer=0, **amount), grid) == block
    assert block_to_keep(Block(layer=0, stride=4), Grid(40, 10)) == (20, 5)
    assert block_to_keep(Block(layer=0, keep_tokens=7), Grid(1, 10)) == (1, 7)


def test_an_amount_that_is_no_block_names_the_nearest():
    with pytest.raises(ValueError, match=r"keep_tokens 73 is no product .*nearest possible is 72 or 75"):
        block_to_keep(Block(layer=0, keep_tokens=73), Grid(24, 24))
    with pytest.raises(ValueError, match="keep_tokens 577 is more than the image's 576 tokens"):
        block_to_keep(Block(layer=0, keep_tokens=577), Grid(24, 24))
    amounts = sorted({rows * columns for rows, columns in every_block(6, 7)})
    for wanted in range(1, 43):
        below, above = [a for a in amounts if a <= wanted][-1], next(a for a in amounts if a >= wanted)
        assert amounts_around(6, 7, wanted) == tuple(sorted({below, above}))


def test_nearest_amount_is_one_the_method_takes():
    grid = Grid(7, 5)
    for keep in range(-3, 50):
        near = Block(layer=0, stride=1).nearest_amount(keep, grid)
        assert Block(layer=0, keep_tokens=near).kept_tokens(grid) == near
        assert Row(layer=0, stride=1).nearest_amount(keep, grid) == min(max(keep, 1), 35)


def test_kept_grid():
    assert Block(layer=0, stride=4).kept_grid(Grid(6, 8)) == Grid(3, 4)
    assert Row(layer=0, stride=1, kept=48).kept_grid(Grid(6, 8)) == Grid(6, 8)
    assert Row(layer=0, stride=1, kept=47).kept_grid(Grid(6, 8)) == Grid(1, 47)
    assert Row(layer=0, stride=1).tokens_before(Grid(6, 8)) == 48

"""Which h' x w' block of a token grid holds a wanted number of tokens: the arithmetic of two-dimensional methods."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache


@lru_cache(maxsize=4096)
def nearest_block(height: int, width: int, wanted: int) -> tuple[int, int]:
    """The rows and columns, at most `height` and `width`, whose product is nearest to `wanted`.

    Of equally near products the smaller is taken; of a product's blocks the one whose shape is nearest to the grid's,
    of two equally near shapes the flatter one.

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        wanted: Tokens wanted.
    """

    def rank(block: tuple[int, int]) -> tuple[int, int, Fraction, int]:
        rows, columns = block
        stretch = Fraction(rows * width, columns * height)
        return abs(rows * columns - wanted), rows * columns, max(stretch, 1 / stretch), rows

    # For each number of rows only the two numbers of columns around the wanted product can be nearest.
    blocks = (
        (rows, columns)
        for rows in range(1, height + 1)
        for columns in {min(max(wanted // rows + more, 1), width) for more in (0, 1)}
    )
    return min(blocks, key=rank)


def amounts_around(height: int, width: int, wanted: int) -> tuple[int, ...]:
    """The nearest products of a block below and above `wanted` (one of them at the ends of the range), rising."""
    amounts = {rows * columns for rows in range(1, height + 1) for columns in range(1, width + 1)}
    below = [amount for amount in amounts if amount <= wanted]
    above = [amount for amount in amounts if amount >= wanted]
    return tuple(sorted({*([max(below)] if below else []), *([min(above)] if above else [])}))

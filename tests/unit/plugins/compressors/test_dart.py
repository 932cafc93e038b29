"""dart: against a plain loop over images, pivots and tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from method_checks import GRIDS, WIDTH, build, images_of, ranked_of, top_of

from orchestrator.spec.components import Grid

ROW_OF = (1, 0, 1, 2)  # two images of one row


def keyed(grid, text=(3, 5, 0), ties=False, seed=0):
    """Four images in three rows with `text` tokens before and after them; keys and hidden states of whole rows."""
    visual_BND, context = images_of(grid, images=4, seed=seed)
    generator = torch.Generator().manual_seed(3 + seed)
    length = 2 * grid.tokens + 2 * max(text) + 1
    columns, text_RN, used = [], torch.zeros(3, length, dtype=torch.bool), [0, 0, 0]
    for row, count in enumerate(text):
        text_RN[row, :count] = True
        used[row] = count
    for row in ROW_OF:
        columns.append(list(range(used[row], used[row] + grid.tokens)))
        used[row] += grid.tokens
    hidden_RND = torch.randn(3, length, WIDTH, generator=generator)
    for image, row in enumerate(ROW_OF):
        hidden_RND[row, columns[image]] = visual_BND[image].detach()
    keys_RND = torch.randn(3, length, 4, generator=generator)
    if ties:
        keys_RND = keys_RND.sign()
        visual_BND = visual_BND.detach().sign()
    context = dataclasses.replace(
        context, rows_B=torch.tensor(ROW_OF), columns_BN=torch.tensor(columns), text_RN=text_RN,
        hidden_RND=hidden_RND, row_keys_RND=keys_RND,
    )  # fmt: skip
    return visual_BND, context


def plain(visual_ND, context, image, kept, visual_pivots, text_pivots):
    """The tokens kept of one image, by loops."""
    tokens, row = len(visual_ND), ROW_OF[image]
    norms = context.row_keys_RND[row].abs().sum(1).tolist()
    columns = context.columns_BN[image].tolist()
    own = ranked_of([norms[column] for column in columns], min(visual_pivots, kept))
    texts = [column for column in range(len(norms)) if context.text_RN[row, column]]
    texts = [texts[place] for place in ranked_of([norms[column] for column in texts], min(text_pivots, len(texts)))]
    pivots = [visual_ND[token] for token in own] + [context.hidden_RND[row, column] for column in texts]
    chosen, budget = list(own), kept - len(own)
    for number, pivot in enumerate(pivots):
        share = budget // len(pivots) + (number < budget % len(pivots))
        alike = {
            token: float(torch.cosine_similarity(visual_ND[token].float(), pivot.float(), dim=0))
            for token in range(tokens)
            if token not in chosen
        }
        free = list(alike)
        chosen += [free[place] for place in top_of([-alike[token] for token in free], share, scale=1)]
    return sorted(chosen)


@pytest.mark.parametrize("pivots", [(4, 4), (1, 0), (2, 7), (9, 1)])
@pytest.mark.parametrize("grid", GRIDS)
def test_what_stays_is_what_the_loop_keeps(grid, pivots):
    for count in {1, grid.tokens, -(-grid.tokens // 2), -(-grid.tokens // 3)}:
        method = build("dart", keep_tokens=count, visual_pivots=pivots[0], text_pivots=pivots[1])
        visual_BND, context = keyed(grid)
        kept = method.compress(visual_BND, grid, context)
        for image in range(4):
            wanted = plain(visual_BND[image].detach(), context, image, count, *pivots)
            assert len(set(wanted)) == count
            assert kept.sources_BM[image].tolist() == wanted
            assert torch.equal(kept.hidden_BMD[image], visual_BND[image, wanted])
            assert torch.equal(kept.positions_ABM[:, image], context.positions_ABN[:, image, wanted])


def test_of_equal_tokens_the_first_stays():
    grid = Grid(5, 7)
    visual_BND, context = keyed(grid, ties=True)
    visual_BND = visual_BND.roll(1, 0).sign()
    kept = build("dart", keep_tokens=14).compress(visual_BND, grid, context)
    for image in range(4):
        assert kept.sources_BM[image].tolist() == plain(visual_BND[image], context, image, 14, 4, 4)


def test_an_image_alone_keeps_the_same():
    grid = Grid(6, 4)
    method = build("dart", keep_tokens=9)
    visual_BND, context = keyed(grid)
    together = method.compress(visual_BND, grid, context)
    for image, row in enumerate(ROW_OF):
        alone = dataclasses.replace(
            context,
            positions_ABN=context.positions_ABN[:, image : image + 1],
            sizes_BN=context.sizes_BN[image : image + 1],
            rows_B=torch.tensor([0]),
            columns_BN=context.columns_BN[image : image + 1],
            text_RN=context.text_RN[row : row + 1],
            hidden_RND=context.hidden_RND[row : row + 1],
            row_keys_RND=context.row_keys_RND[row : row + 1],
        )
        kept = method.compress(visual_BND[image : image + 1], grid, alone)
        assert torch.equal(kept.sources_BM[0], together.sources_BM[image])


def test_faults():
    grid = Grid(3, 3)
    visual_BND, context = keyed(grid)
    with pytest.raises(ValueError, match="keep_tokens 10 is more than the image's 9 tokens"):
        build("dart", keep_tokens=10).compress(visual_BND, grid, context)
    with pytest.raises(ValueError, match="keys of the layer before"):
        build("dart", keep_tokens=4).compress(visual_BND, grid, images_of(grid, images=4)[1])

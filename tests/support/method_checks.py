"""What every method that needs only tokens is held to, given a plain loop over one image."""

from __future__ import annotations

import importlib
import math

import torch

from orchestrator import registry
from orchestrator.compression import Context
from orchestrator.spec.components import Grid

GRIDS = (Grid(5, 7), Grid(1, 13), Grid(6, 4), Grid(9, 2), Grid(1, 1))
WIDTH = 6


def first_largest(scores, scale=None):
    """The tie rule in a plain loop: the first score within 1e-5 (of the scale, or of the best) of the best."""
    best = max(scores)
    margin = 1e-5 * (abs(best) if scale is None else scale)
    return next(place for place, score in enumerate(scores) if score >= best - margin)


def ranked_of(scores, count):
    """Places of the `count` best, best first."""
    left, found = list(range(len(scores))), []
    while len(found) < count:
        found.append(left.pop(first_largest([scores[place] for place in left])))
    return found


def top_of(scores, count, scale=None):
    """Places of the `count` best, rising; of those within 1e-5 of the last of them the first."""
    if not count:
        return []
    last = sorted(scores, reverse=True)[count - 1]
    margin = 1e-5 * (abs(last) if scale is None else scale)
    above = [place for place, score in enumerate(scores) if score > last + margin]
    equal = [place for place, score in enumerate(scores) if abs(score - last) <= margin]
    return sorted(above + equal[: count - len(above)])


def build(kind, **options):
    """A method by its registered name, as a user reaches it."""
    spec = registry.spec_class(registry.COMPRESSORS, kind).model_validate({"kind": kind, "layer": 0, **options})
    module, name = spec.implementation.split(":")
    return getattr(importlib.import_module(module), name)(spec)


def images_of(grid, images=3, axes=1, dtype=torch.float32, seed=0, sizes=True):
    """Random tokens with position ids in raster order (three axes: as M-RoPE counts) and random sizes."""
    generator = torch.Generator().manual_seed(1000 * grid.height + 10 * grid.width + seed)
    visual_BND = torch.randn(images, grid.tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    starts_B = torch.randint(0, 2000, (images, 1), generator=generator)
    place_N = torch.arange(grid.tokens)
    rows = [place_N] if axes == 1 else [place_N * 0, place_N // grid.width, place_N % grid.width]
    sizes_BN = torch.randint(1, 5, (images, grid.tokens), generator=generator)
    context = Context(
        layer=0,
        positions_ABN=torch.stack([starts_B + row for row in rows]),
        sizes_BN=sizes_BN if sizes else torch.ones_like(sizes_BN),
        rows_B=torch.arange(images),
    )
    return visual_BND, context


def check_against_loop(method, loop, grid, axes=1, seed=0, atol=1e-5, visual_BND=None):
    """Hidden states, position ids, sizes, sources and gradients equal those of `loop`, image by image.

    `loop(visual_ND, positions of each token, sizes, kept)` returns (hidden, position ids, size, source) of each token
    that is left.
    """
    random_BND, context = images_of(grid, axes=axes, seed=seed)
    visual_BND = random_BND if visual_BND is None else visual_BND.requires_grad_()
    kept = method.compress(visual_BND, grid, context)
    count = method.spec.kept_tokens(grid)
    assert kept.hidden_BMD.shape == (len(visual_BND), count, visual_BND.shape[2])
    unnamed = grid if count == grid.tokens else Grid(1, count)
    assert (kept.grid or unnamed) == method.spec.kept_grid(grid)
    pull_BMD = torch.randn(kept.hidden_BMD.shape, generator=torch.Generator().manual_seed(5))
    (gradient_BND,) = torch.autograd.grad(kept.hidden_BMD, visual_BND, pull_BMD)
    for image in range(len(visual_BND)):
        own_ND = visual_BND[image].detach().clone().requires_grad_()
        ids = [tuple(token) for token in context.positions_ABN[:, image].T.tolist()]
        left = loop(own_ND, ids, context.sizes_BN[image].tolist(), count)
        hidden_MD = torch.stack([token[0] for token in left])
        assert torch.allclose(kept.hidden_BMD[image], hidden_MD, atol=atol)
        assert kept.positions_ABM[:, image].T.tolist() == [list(token[1]) for token in left]
        assert kept.sizes_BM[image].tolist() == [token[2] for token in left]
        assert kept.sources_BM[image].tolist() == [token[3] for token in left]
        hidden_MD.backward(pull_BMD[image])
        assert torch.allclose(gradient_BND[image], own_ND.grad, atol=atol)
    return kept


def window_tokens(grid, kept):
    """The tokens of each window as torch's adaptive pooling defines it, upper left first."""
    windows = []
    for i in range(kept.height):
        rows = range(i * grid.height // kept.height, math.ceil((i + 1) * grid.height / kept.height))
        for j in range(kept.width):
            columns = range(j * grid.width // kept.width, math.ceil((j + 1) * grid.width / kept.width))
            windows.append([row * grid.width + column for row in rows for column in columns])
    return windows


def sizes_of(grid, kept, sizes):
    """Each token counts once, for the last window of its row and column that holds it."""
    totals = [0] * kept.tokens
    for token, size in enumerate(sizes):
        holders = [m for m, window in enumerate(window_tokens(grid, kept)) if token in window]
        totals[max(holders)] += size
    return totals

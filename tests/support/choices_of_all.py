"""Prints, as JSON, what every method chooses on tied inputs; run under several kernel settings by `test_choices.py`."""

from __future__ import annotations

import dataclasses
import json

import torch
from method_checks import build, images_of

from orchestrator.compression import Context
from orchestrator.spec.components import Grid

GRID = Grid(6, 8)
METHODS = {
    "dart": {"keep_tokens": 19},
    "divprune": {"keep_tokens": 17},
    "evs": {"pruning_rate": 0.3},
    "fastv": {"keep_tokens": 13},
    "k_means": {"keep_tokens": 11},
    "pyramid_drop": {"keep_tokens": 15},
    "random_drop": {"keep_tokens": 14},
    "tome": {"keep_tokens": 9},
    "visionzip": {"keep_tokens": 21, "contextual_ratio": "1/3"},
}
WIDTH = 37  # no whole number of vector registers


def tied_images(dtype: torch.dtype = torch.float32, noise: float = 0.0) -> tuple[torch.Tensor, Context]:
    """Images whose scores tie: few kinds of tokens, all alike, a mirrored grid, scaled copies (equal cosines).

    All values are small multiples of 1/8, so that bfloat16 and float16 hold them exactly. `noise` moves every value by
    up to this share of it.
    """
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randint(-12, 13, shape, generator=generator) / 8

    tokens = GRID.tokens
    few = values(5, WIDTH)[torch.randint(0, 5, (tokens,), generator=generator)]
    alike = values(1, WIDTH).expand(tokens, -1)
    half = values(GRID.height, GRID.width // 2, WIDTH)
    mirrored = torch.cat([half, half.flip(1)], 1).flatten(0, 1)
    scaled = values(6, WIDTH)[torch.arange(tokens) % 6] * (1 + torch.arange(tokens).unsqueeze(1) % 3)
    images_BND = torch.stack([few, alike, mirrored, scaled])
    images = len(images_BND)
    _, context = images_of(GRID, images=images)
    first_BN = images_BND.abs().sum(2)
    hidden_RND = torch.cat([images_BND, values(images, 7, WIDTH)[:, [0, 1, 0, 2, 1, 0, 3]]], 1)
    text_RN = torch.zeros(hidden_RND.shape[:2], dtype=torch.bool)
    text_RN[:, tokens:] = True

    def moved(exact: torch.Tensor) -> torch.Tensor:
        shake = 2 * torch.rand(exact.shape, generator=torch.Generator().manual_seed(int(1e9 * noise))) - 1
        return (exact * (1 + noise * shake)).to(dtype)

    told = {
        "hidden_RND": moved(hidden_RND),
        "row_keys_RND": moved(hidden_RND),
        "attention_BN": moved(first_BN.round().clamp(max=40) / 64),
        "cls_attention_BN": moved(first_BN.round().clamp(max=40) / 64),
        "cls_keys_BND": moved(images_BND),
    }
    columns_BN = torch.arange(tokens).expand(images, -1)
    return moved(images_BND), dataclasses.replace(
        context, columns_BN=columns_BN, text_RN=text_RN, sizes_BN=torch.ones_like(context.sizes_BN), **told
    )


def rows_of(context: Context, rows: list[int], left: int = 0, right: int = 0) -> Context:
    """The context of some images, their rows padded on the left and right."""
    index = torch.tensor(rows)
    pad = torch.nn.functional.pad
    shared = {name: getattr(context, name)[index] for name in ("attention_BN", "cls_attention_BN", "cls_keys_BND")}
    return dataclasses.replace(
        context,
        positions_ABN=context.positions_ABN[:, index],
        sizes_BN=context.sizes_BN[index],
        rows_B=torch.arange(len(rows)),
        sample_indices=tuple(rows),
        columns_BN=context.columns_BN[index] + left,
        text_RN=pad(context.text_RN[index], (left, right)),
        hidden_RND=pad(context.hidden_RND[index], (0, 0, left, right), value=3.0),
        row_keys_RND=pad(context.row_keys_RND[index], (0, 0, left, right), value=3.0),
        **shared,
    )


def chosen(
    dtype: torch.dtype = torch.float32,
    rows: tuple[int, ...] = (0, 1, 2, 3),
    left: int = 0,
    right: int = 0,
    noise: float = 0.0,
) -> dict[str, list[object]]:
    """What each method keeps of each image and how many tokens each stands for, in the order of `rows`."""
    visual_BND, context = tied_images(dtype, noise)
    context = rows_of(context, list(rows), left, right)
    found = {}
    for kind, options in METHODS.items():
        method = build(kind, **({"layer": 1} | options))
        grid = dataclasses.replace(GRID, frames=2) if method.spec.across_frames else GRID
        kept = method.compress(visual_BND[list(rows)], grid, context)
        found[kind] = [list(pair) for pair in zip(kept.sources_BM.tolist(), kept.sizes_BM.tolist(), strict=True)]
    return found


if __name__ == "__main__":
    print(json.dumps({"capability": torch.backends.cpu.get_cpu_capability(), "chosen": chosen()}))

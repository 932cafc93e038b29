"""`random_drop`: keeps a random subset of each image's visual tokens (LLaVolta section 4.2, ratio 1 - 1/S dropped)."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor


class RandomDropSpec(plugin.CompressorSpec):
    """Keeps a random subset of an image's visual tokens, drawn anew at each step; the control to beat."""

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.random_drop:RandomDrop"
    points: ClassVar[tuple[str, ...]] = ("decoder", "projector")

    kind: Literal["random_drop"] = "random_drop"


class RandomDrop:
    """Draws from (seed, step, sample, image of the sample) alone: a restart or another batch draws the same."""

    def __init__(self, spec: RandomDropSpec) -> None:
        self.spec = spec

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`; kept tokens keep their order and position ids.

        Raises:
            ValueError: more tokens are asked for than there are.
        """
        import torch

        tokens, kept = visual_BND.shape[1], self.spec.kept_tokens(grid)
        rows = context.rows_B.tolist()
        samples = context.sample_indices or rows
        seen: Counter[int] = Counter()
        drawn = []
        for row, sample in zip(rows, samples, strict=True):
            generator = torch.Generator().manual_seed(_seed(context, sample, seen[row]))
            seen[row] += 1
            drawn.append(torch.randperm(tokens, generator=generator)[:kept].sort().values)
        return plugin.take(visual_BND, torch.stack(drawn).to(visual_BND.device), context)


def _seed(context: plugin.Context, sample: int, image: int) -> int:
    key = f"random_drop:{context.layer}:{context.seed}:{context.step}:{sample}:{image}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1

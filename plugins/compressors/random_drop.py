"""`random_drop`: keeps a random subset of each image's visual tokens (LLaVolta section 4.2, ratio 1 - 1/S dropped)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Generator, Tensor


class RandomDropSpec(plugin.CompressorSpec):
    """Keeps a random subset of an image's visual tokens, drawn anew at each step; the control to beat."""

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.random_drop:RandomDrop"
    points: ClassVar[tuple[str, ...]] = ("decoder", "projector", "tower")

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
        generators = image_generators("random_drop", context)
        drawn = [torch.randperm(tokens, generator=one)[:kept].sort().values for one in generators]
        return plugin.take(visual_BND, torch.stack(drawn).to(visual_BND.device), context)


def image_generators(name: str, context: plugin.Context) -> Iterator[Generator]:
    """Yield a generator for each image, seeded by (method, layer, seed, step, sample, image of the sample)."""
    import torch

    rows = context.rows_B.tolist()
    seen: Counter[int] = Counter()
    for row, sample in zip(rows, context.sample_indices or rows, strict=True):
        key = f"{name}:{context.layer}:{context.seed}:{context.step}:{sample}:{seen[row]}"
        seen[row] += 1
        yield torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)

"""What a compressor is given and what it returns: pooling, dropping, merging and learned methods alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from orchestrator.compression.ops import tokens_at, windows_over
from orchestrator.compression.ops import top_tokens as top_tokens
from orchestrator.spec.components import CompressorSpec, Grid

IGNORED: Final = -100
"""Label of a token that predicts nothing, as in torch's cross-entropy."""


@dataclass(frozen=True)
class Context:
    """What a compressor may know beside the visual tokens; B counts the images of one grid in the batch.

    Attributes:
        layer: 0-based decoder layer before which it acts; 0 for one before the decoder.
        positions_ABN: Position ids of the visual tokens; A = 1, or one axis each for models with several (M-RoPE).
        sizes_BN: How many of the image's first visual tokens each token stands for (1 before any merging).
        rows_B: The batch's row that each image belongs to (on the host).
        seed: Seed of the phase; with `step` and `sample_indices` what random methods draw from.
        step: Optimizer step.
        sample_indices: The sample each image belongs to; empty where the caller gave none.
        hidden_RND: The whole rows (text included) for methods that look at queries; R counts rows.
        module: The point's learned module, or None.
        columns_BN: Columns of the visual tokens in their rows.
        text_RN: True where a row holds text of the prompt, False at visual tokens, padding and answers (tokens with a
            label, or that `generate` added), so that what is to be learned chooses nothing.
        attention_BN: What the query tokens (the last before each answer; without labels the prompt's)
            paid to each visual token in layer `layer - 1`, mean over heads and queries (need `queries`).
        row_keys_RND: Keys of all tokens in layer `layer - 1`, heads side by side (need `keys`).
        cls_attention_BN: What the vision tower's CLS token paid to each visual token in the last layer that is used,
            mean over heads (need `cls`).
        cls_keys_BND: Keys of the visual tokens in that layer, mean over heads (need `cls`).
        tower_keys_BND: Inside the vision tower, keys of the visual tokens in the attention before the point, mean over
            heads (need `tower_keys`); elsewhere None.
    """

    layer: int
    positions_ABN: Tensor
    sizes_BN: Tensor
    rows_B: Tensor
    seed: int = 0
    step: int = 0
    sample_indices: tuple[int, ...] = ()
    hidden_RND: Tensor | None = None
    module: nn.Module | None = None
    columns_BN: Tensor | None = None
    text_RN: Tensor | None = None
    attention_BN: Tensor | None = None
    row_keys_RND: Tensor | None = None
    cls_attention_BN: Tensor | None = None
    cls_keys_BND: Tensor | None = None
    tower_keys_BND: Tensor | None = None


@dataclass(frozen=True)
class Kept:
    """What is left of B images: M tokens each, in the order they take in the row.

    Attributes:
        hidden_BMD: Hidden states.
        positions_ABM: Position ids; the axes of `Context.positions_ABN`.
        sizes_BM: How many first visual tokens each stands for.
        sources_BM: Which of the N tokens each stands in place of (for logits at original length), -1 for a new token
            that stands in no one's place; None = evenly spaced, or, with M > N, all N and then new ones.
        grid: The grid they form; None = one row of M tokens, or the same grid where all are kept.
        renumber: The row's position ids are to be numbered again without gaps.
        size_bias: From here on attention adds the logarithm of a token's size to the logits of its key (ToMe,
            "proportional attention").
        in_place: Tokens stand where their sources stood (rising, no two alike), not evenly spread over the image's
            columns: between the frames of a video may stand text.
        before: How many of the first M are new tokens that stand before the image's first (`Enters` alone).
        counts_B: How many of its M tokens each image has, at least one, of a method whose spec is `adaptive`; what
            stands behind them is padding, which is cut, and what is left is one row of tokens. None = all M.
    """

    hidden_BMD: Tensor
    positions_ABM: Tensor
    sizes_BM: Tensor
    sources_BM: Tensor | None = None
    grid: Grid | None = None
    renumber: bool = False
    size_bias: bool = False
    before: int = 0
    in_place: bool = False
    counts_B: Tensor | None = None


@runtime_checkable
class Compressor(Protocol):
    """A method; built with its spec, once for each point that names it.

    It remembers nothing between calls, lets no image depend on the others of the batch, and draws only from
    `Context.seed`, `step` and `sample_indices`: a checkpointed layer calls it again in backward, and a sample must come
    out alike in any batch, on any rank, after a restart. Gradients flow through what it returns; choices take none.
    `Learns`, `Enters` and `Resizes` say what some methods have in addition.
    """

    def __init__(self, spec: Any) -> None: ...

    def compress(self, visual_BND: Tensor, grid: Grid, context: Context) -> Kept:
        """Turn the N visual tokens of each of B images of one grid into M <= N.

        Args:
            visual_BND: Hidden states before the layer (the decoder's, or of patches in the vision tower), or features
                before the projector; not to be written into.
            grid: Rows and columns of each image's tokens, in raster order; N = `grid.tokens`.
            context: What else is known of the tokens.

        Returns:
            `spec.kept_tokens(grid)` tokens of each image, of an adaptive method at most; `take` makes it of indices.

        Raises:
            ValueError: the amount does not fit this grid.
        """
        ...


@runtime_checkable
class Learns(Protocol):
    """A method with parameters of its own; its spec says `learns = True`.

    `attach` creates the module once, since an optimizer cannot be given parameters later. It comes back as
    `Context.module`, is trained as the part `compressor`, and is saved under a name made of kind, place and
    `spec.module_shape()`, so that stages whose points agree in these share it. The mechanism calls it once a forward,
    also on ranks without images, because ZeRO-3 gathers its parameters as one; call it freely inside `compress`.
    """

    def create_module(self, width: int) -> nn.Module:
        """Return its module, for tokens of `width`.

        Draw initial values from torch's global generator as modules do: it is seeded by (seed, the module's name) for
        this call and restored after it. Start near a simple method (zero-initialised last layers over an average, for
        instance), since the model was trained without it. Do not set device or dtype.
        """
        ...


@runtime_checkable
class Enters(Protocol):
    """A method that adds tokens at the decoder's input (registers); `spec.tokens_before(grid)` counts them.

    Without `compress` they stay to the last layer: it acts at layer 0 and its spec `takes_amount = False`.
    """

    def enter(self, visual_BND: Tensor, grid: Grid, context: Context) -> Kept:
        """Return what enters layer 0: as `compress`, but more tokens than it got where it adds some.

        The position ids of what follows the image in its row, and of the image too where tokens were added before it,
        move up by the number added. `Context.module` is given to this call alone; `compress` follows before the
        point's own layer.
        """
        ...


@runtime_checkable
class Resizes(Protocol):
    """A method that acts on pixels, at the projector; its spec needs `pixels`."""

    def resize(self, pixels_BCHW: Tensor, grid: Grid) -> Tensor:
        """Return the images of which the tower makes fewer tokens than those of `grid`.

        `compress` then gets the features of the smaller images, with grid and context of the original ones.
        """
        ...


def take(visual_BND: Tensor, index_BM: Tensor, context: Context, counts_B: Tensor | None = None) -> Kept:
    """Return the result of a method that keeps some tokens as they are.

    Args:
        visual_BND: Visual tokens.
        index_BM: The tokens kept of each image, in rising order; M alone where all images keep the same ones.
        context: The context given to the method.
        counts_B: Of an adaptive method, how many of its M indices each image has; what stands behind them is padding.
    """
    index_BM = index_BM.expand(len(visual_BND), -1)
    if counts_B is not None:  # `places_of` gives no place to what is not there
        index_BM = index_BM.clamp(max=visual_BND.shape[1] - 1)
    axes_ABM = index_BM.unsqueeze(0).expand(context.positions_ABN.shape[0], -1, -1)
    return Kept(
        hidden_BMD=tokens_at(visual_BND, index_BM),
        positions_ABM=context.positions_ABN.gather(2, axes_ABM),
        sizes_BM=context.sizes_BN.gather(1, index_BM),
        sources_BM=index_BM,
        counts_B=counts_B,
    )


def take_windows(hidden_BMD: Tensor, grid: Grid, kept: Grid, context: Context) -> Kept:
    """Return the result of a method that makes one token of each window over the grid.

    A token's position id is the mean of its window's, rounded down; it stands in place of the window's first token.

    Args:
        hidden_BMD: The new tokens in raster order.
        grid: The grid before.
        kept: The grid after, `kept.height` x `kept.width` windows.
        context: The context given to the method.
    """
    windows = windows_over(grid, kept, hidden_BMD.device)
    return Kept(
        hidden_BMD,
        windows.mean_positions(context.positions_ABN),
        windows.sizes(context.sizes_BN),
        sources_BM=windows.first_M.expand(len(hidden_BMD), -1),
        grid=kept,
    )


def evenly_spaced(tokens: int, kept: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the first token of each of `kept` windows over `tokens` whose lengths differ by at most one."""
    return torch.arange(kept, device=device) * tokens // kept


@dataclass(frozen=True)
class Point:
    """A compressor at its place.

    Attributes:
        layer: Decoder layer before which it acts, 0 for one before the decoder.
        spec: Its parameters.
        compressor: Its implementation.
        module_name: Name of its learned module, if it has one.
        at_projector: It acts on the features that enter the projector.
        enters: This is its first part, which acts at the decoder's input (`enter`).
        tower_layer: Layer of the vision tower before which it acts; None outside of the tower.
        inside_layer: It acts inside this layer instead, between its attention and its MLP.
    """

    layer: int
    spec: CompressorSpec
    compressor: Compressor
    module_name: str | None = None
    at_projector: bool = False
    enters: bool = False
    tower_layer: int | None = None
    inside_layer: bool = False

    @property
    def before_decoder(self) -> bool:
        """It acts while images are encoded: in the vision tower, or on the features that enter the projector."""
        return self.at_projector or self.tower_layer is not None

    @property
    def place(self) -> str:
        """Where it acts, in words."""
        if self.tower_layer is not None:
            return f"layer {self.tower_layer} of the vision tower"
        return "the projector" if self.spec.layer == "projector" else f"layer {self.layer}"

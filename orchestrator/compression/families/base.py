"""What the mechanism needs to know of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from orchestrator.compression.masks import Keys, ready_masks
from orchestrator.errors import UsageError
from orchestrator.spec.components import Grid
from orchestrator.spec.model_facts import FAMILIES, PLAIN_TOWERS, zero3_refusal


@dataclass(frozen=True)
class Tower:
    """A vision tower of plain blocks, between whose layers points may act: each patch becomes one visual token.

    Attributes:
        encoder: The module that runs the tower's `layers` one after the other.
        front: Tokens before the patches (1 with a class token, else 0).
        limit: Points may act before layers 0 to `limit` - 1; the model takes what later ones leave.
    """

    encoder: Any
    front: int
    limit: int

    @property
    def depth(self) -> int:
        """Layers, used or not."""
        return len(self.encoder.layers)

    @property
    def width(self) -> int:
        """Hidden size."""
        return int(self.encoder.config.hidden_size)


class Family(ABC):
    """Adapter of one model family; a subclass answers for its models.

    Attributes:
        model: The top model (with the LM head).
        language_model: The decoder stack: has `layers`, a norm after them, `rotary_emb`.
        norm_name: Attribute of the decoder stack that holds the norm after its layers.
        head_name: Path inside the top model of the LM head.
        proven: The family has tests of its own; others are served after a self-check.
        encodes_in_forward: Ready features do not say where images end, so `generate` leaves encoding to forward.
        remakes_masks: Masks of the full length that the top model makes follow from `block_ids_BN` and the padding
            mask, so a segment's are made from these.
        deep_options: Arguments of the language model that bring visual features into layers before `first_layer`.
        token_options: Arguments of the language model with one number for each token, which go on with those that are
            left (a token that a method adds, and padding, get 0).
        window_cuts_blocks: In a sliding layer a token sees no farther back than the window, not even in its own block.
        blocks_in_full: Tokens of a block see one another in layers of full attention too, not in sliding ones alone.

    Raises:
        UsageError: the model lacks a part; the message names it.
    """

    proven = True
    encodes_in_forward = False
    remakes_masks = False
    deep_options: ClassVar[tuple[str, ...]] = ()
    token_options: ClassVar[tuple[str, ...]] = ()
    window_cuts_blocks = True
    blocks_in_full = True

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.language_model: Any = self.find_language_model()
        self._refuse_layers_of_other_lengths()
        lacking = [name for name in ("layers", "rotary_emb") if not hasattr(self.language_model, name)]
        if lacking:
            raise self.cannot_serve(
                f"its language model {type(self.language_model).__name__} has no {', no '.join(lacking)}"
            )
        if not isinstance(self.language_model.layers, nn.ModuleList):
            raise self.cannot_serve("its decoder is not a plain list of layers")
        self.norm_name = self._find_norm()
        self.head_name = self._find_head()

    def cannot_serve(self, reason: str) -> UsageError:
        """Return the error for a model without a needed part."""
        return UsageError(f"attach: {type(self.model).__name__} cannot be served: {reason}")

    def _refuse_layers_of_other_lengths(self) -> None:
        config = self.language_model.config
        if size := getattr(config, "hidden_size_per_layer_input", None):
            raise self.cannot_serve(
                f"every layer of its decoder adds an embedding of each token that came in (hidden_size_per_layer_input "
                f"{size}), and what a token that stands for several gets is not defined"
            )
        if shared := getattr(config, "num_kv_shared_layers", None):
            raise self.cannot_serve(
                f"the last {shared} layers of its decoder read keys and values of an earlier layer "
                "(num_kv_shared_layers), which holds more tokens than they do where some are compressed in between"
            )

    def _find_norm(self) -> str:
        """Return `norm`, or the decoder stack's only norm by another name."""
        norms = [name for name, child in self.language_model.named_children() if type(child).__name__.endswith("Norm")]
        if "norm" in norms or hasattr(self.language_model, "norm"):
            return "norm"
        if len(norms) != 1:
            found = f"several ({', '.join(norms)})" if norms else "none"
            raise self.cannot_serve(
                f"its language model {type(self.language_model).__name__} has no norm after its layers: looked for "
                f"`norm` or one child of a class ...Norm, found {found}"
            )
        return norms[0]

    def _find_head(self) -> str:
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        for name, child in self.model.named_modules():
            if head is not None and child is head:
                return name
        raise self.cannot_serve("it has no LM head among its modules (get_output_embeddings)")

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.language_model.layers)

    @property
    def width(self) -> int:
        """Hidden size of the decoder."""
        return int(self.language_model.config.hidden_size)

    @abstractmethod
    def find_language_model(self) -> nn.Module:
        """Return the decoder stack."""

    @property
    def outer_language_model(self) -> nn.Module:
        """The module that the top model calls with embedded tokens: the decoder stack, or what holds it."""
        return cast(nn.Module, self.language_model)

    @property
    @abstractmethod
    def token_ids(self) -> tuple[int | None, int | None]:
        """Token ids of image and video placeholders; None where there is none."""

    def visual_BN(self, input_ids_BN: Tensor) -> Tensor:
        """Return True at the placeholders of visual tokens (images and videos)."""
        image, video = self.token_ids
        assert image is not None  # or it would not have been attached
        visual_BN = torch.eq(input_ids_BN, image)
        return visual_BN if video is None else visual_BN | torch.eq(input_ids_BN, video)

    @abstractmethod
    def grids(self, inputs: Mapping[str, Any], num_placeholders: int) -> list[Grid]:
        """Return the grid of each image (frame, tile) in the order of the batch, from shapes and host values only.

        Args:
            inputs: Keyword arguments of the top model's forward, `input_ids` on the host.
            num_placeholders: Visual tokens that `input_ids` announce.
        """

    @abstractmethod
    def num_visual_tokens(self, inputs: Mapping[str, Any]) -> int:
        """Return the visual tokens of a batch, from shapes alone (0 where the batch brings no image)."""

    @property
    def knows_videos(self) -> bool:
        """Whether `grids` tells which frames are of one video (`Grid.frame`)."""
        return False

    @property
    def first_layer(self) -> int:
        """The first decoder layer before which a point may act (more than 0 where visual features enter on the way)."""
        return 0

    def block_ids_BN(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Tokens of one non-negative id see one another both ways (-1: causal); None where the model is causal."""
        return None

    def attention_mask(self, keys: Keys) -> Any:
        """Return the `attention_mask` of a segment's layers.

        The plain 2-D mask, from which the model builds its own; ready-made ones where tokens form blocks or keys are
        weighed by size.
        """
        if keys.blocks_BK is None and keys.sizes_BK is None:
            return keys.mask_BK
        return ready_masks(keys, self.window_cuts_blocks, self.blocks_in_full)

    def segment_options(self, options: dict[str, Any], first: int) -> dict[str, Any]:
        """Return the further arguments of the language model for the segment that begins at layer `first`."""
        if first == 0:
            return options
        return {name: value for name, value in options.items() if name not in self.deep_options}

    def enter(self) -> None:
        """Prepare the model when it is attached; most families have nothing to do."""
        return

    def leave(self) -> None:
        """Undo what `enter` did, when the model is detached."""
        return

    @property
    def projector(self) -> nn.Module | None:
        """The projector, where it maps visual features token by token; else None."""
        return None

    @property
    def vision_width(self) -> int | None:
        """Width of the features the projector takes; None without `projector`."""
        return None

    @property
    def resizable_tower(self) -> nn.Module | None:
        """The vision tower, where it takes pixels of any size (B x C x H x W) with `interpolate_pos_encoding=True`.

        It must give one visual token a patch, in raster order; else None.
        """
        return None

    @property
    def zero3_refusal(self) -> str:
        """Why several ranks cannot train it under ZeRO-3; empty where all batches call the same modules, with a blank
        image where there is none.
        """
        return zero3_refusal(self.model.config.model_type)

    @property
    def tower_refusal(self) -> str:
        """Why no point may act inside the vision tower; empty where its type and the config decide."""
        known = FAMILIES.get(self.model.config.model_type)
        return "how its patches become visual tokens is not known" if known is None else known.tower_refusal

    @property
    def tower(self) -> Tower:
        """The vision tower, where points may act inside of it.

        Raises:
            UsageError: none may; the message says why.
        """
        raise self.no_tower_points()

    def no_tower_points(self) -> UsageError:
        """Return the error for a point inside a vision tower where none may act."""
        kind = getattr(getattr(self.model.config, "vision_config", None), "model_type", "tower of no known type")
        reason = self.tower_refusal or (
            f"it is a {kind}, not one of {', '.join(PLAIN_TOWERS)}, whose positions are added at the input"
            if kind not in PLAIN_TOWERS
            else "its visual tokens are not its patches one to one (vision_feature_select_strategy)"
        )
        return UsageError(
            f"attach: no compressor acts inside the vision tower of {type(self.model).__name__}: {reason}; give "
            "projector or a decoder layer"
        )

    def cls_attention(self) -> Any:
        """Return the attention module of the vision tower's last used layer if the tower has a CLS token; else None."""
        return None

    @abstractmethod
    def idle_features(self) -> Tensor:
        """Return visual features of an empty image, to run the tower and the projector for a batch without images."""

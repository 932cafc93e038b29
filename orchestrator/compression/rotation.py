"""Keys as they would be had the row begun at position 0: rotary embedding turns a key by where it stands."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn


def counted_from_zero(
    keys_BhND: Tensor, firsts_B: Tensor, language_model: Any, layer: int, attention: nn.Module
) -> Tensor:
    """Rotated keys turned back by their row's first position id.

    Attention knows only distances, but a norm of a rotated key's coordinates (DART) is another at another position: a
    row padded on the left, whose ids count the padding, would choose other pivots than the same row alone. Models with
    several position axes (M-RoPE) number their rows from 0 themselves; models without rotary embedding need nothing.

    Args:
        keys_BhND: Rotated keys in float32.
        firsts_B: Position id of each row's first token.
        language_model: The decoder stack; its `rotary_emb` says how positions turn keys.
        layer: Number of the keys' layer.
        attention: The attention module the keys are from.
    """
    turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    rotary = getattr(language_model, "rotary_emb", None)
    parameters = getattr(language_model.config, "rope_parameters", None) or {}
    if turn is None or rotary is None or "mrope_section" in parameters:
        return keys_BhND
    kinds = {}
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        kinds["layer_type"] = language_model.config.layer_types[layer]
    with torch.no_grad(), torch.autocast(keys_BhND.device.type, enabled=False):
        back_B1 = -firsts_B.unsqueeze(1)
        # Past the module's hooks, by which ZeRO-3 counts calls; it holds no parameters.
        cos_B1D, sin_B1D = rotary.forward(keys_BhND, back_B1, **kinds)
        scale_B1D, _ = rotary.forward(keys_BhND, torch.zeros_like(back_B1), **kinds)  # YaRN lengthens
        cos_B1D, sin_B1D = cos_B1D / scale_B1D, sin_B1D / scale_B1D
        turned: Tensor = turn(keys_BhND, keys_BhND, cos_B1D, sin_B1D)[1]
        return turned

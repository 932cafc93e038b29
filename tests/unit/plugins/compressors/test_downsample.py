"""downsample: the tower's own features of a smaller image are what the decoder gets; the kit proves the rest."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from orchestrator_plugins.compressors.downsample import Downsample, DownsampleSpec

from orchestrator.compression import attach
from orchestrator.compression.testing.families import tiny_llava
from orchestrator.spec.components import Grid


def test_the_decoder_gets_the_features_of_the_smaller_image():
    """A row of one image against the plain model's parts, run by hand."""
    model = tiny_llava("sdpa").eval()
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[3, 4, *[63] * 9, 5, 6]])
    with torch.no_grad():
        smaller = F.interpolate(pixels, (16, 16), mode="bilinear", antialias=True)
        tower = model.model.vision_tower(smaller, output_hidden_states=True, interpolate_pos_encoding=True)
        features = model.model.multi_modal_projector(tower.hidden_states[-2][:, 1:])
        embeds = model.get_input_embeddings()(ids)
        positions = torch.tensor([[0, 1, 2 + 2, 2 + 3, 2 + 5, 2 + 6, 11, 12]])  # windows of 2 x 2 overlap on 3 x 3
        expected = model.model.language_model(
            inputs_embeds=torch.cat([embeds[:, :2], features, embeds[:, 11:]], 1),
            position_ids=positions,
            attention_mask=torch.ones(1, 8, dtype=torch.bool),
        ).last_hidden_state
        attach(model, [{"kind": "downsample", "layer": "projector", "keep_tokens": 4}])
        logits = model(input_ids=ids, pixel_values=pixels).logits
    assert torch.allclose(logits[0, -2:], model.lm_head(expected[0, -2:]), atol=1e-5)


def test_sizes_of_images():
    pixels = torch.randn(2, 3, 24, 36)
    method = Downsample(DownsampleSpec(layer="projector", keep_tokens=6))
    assert method.resize(pixels, Grid(2, 3)) is pixels
    assert method.resize(pixels, Grid(4, 6)).shape == (2, 3, 12, 18)
    with pytest.raises(ValueError, match="7"):
        Downsample(DownsampleSpec(layer="projector", keep_tokens=7)).resize(pixels, Grid(4, 6))

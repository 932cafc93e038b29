"""Keys of a row padded on the left are those of the row alone, whatever a model rotates and how."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orchestrator.compression import attach
from orchestrator.compression.attention.stats import turning
from orchestrator.compression.forward import decoder
from orchestrator.compression.testing.families import TINY
from orchestrator.errors import UsageError

# One rotary function of pairs; in sliding layers alone; of single tensors; of complex numbers, in some layers.
NAMES = ("llava", "gemma3", "aya_vision", "gemma4", "llama4")


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_keys_count_from_a_rows_first_token(name, layer, monkeypatch):
    tiny, seen, right = TINY[name], [], decoder.Seen
    model = tiny.build("eager", 0).eval()

    def noted(*fields):
        seen.append(fields[4])
        return right(*fields)

    monkeypatch.setattr(decoder, "Seen", noted)
    attach(model, [{"kind": "dart", "layer": layer, "keep_ratio": "1/2"}])
    both = tiny.batch([[3, "image", 7], [3, "image", "image", 17]], "left", 0, 0)
    alone = tiny.batch([[3, "image", 7]], "left", 0, 0)
    alone |= {key: both[key][: len(alone[key])] for key in alone if key.startswith("pixel")}
    with torch.no_grad():
        for batch in (both, alone):
            del batch["labels"]
            model(**batch)
    padded, wanted = seen
    assert padded.shape[1] > wanted.shape[1]
    assert torch.allclose(padded[0, -wanted.shape[1] :], wanted[0], atol=1e-5)


def test_an_unknown_rotation_is_refused():
    with pytest.raises(UsageError, match="how Linear rotates its keys is not known"):
        turning(nn.Linear(2, 2))

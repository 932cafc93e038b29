"""Copies of what a checkpoint holds change with nothing else."""

from __future__ import annotations

from collections import OrderedDict

import torch

from orchestrator.training.checkpoint_files import copied


class Scaler:
    """Like DeepSpeed's loss scaler: an object of plain values in a state dict, changed in place by training."""

    def __init__(self) -> None:
        self.scale = 4.0


def test_a_copy_shares_nothing() -> None:
    scaler, weights_D = Scaler(), torch.zeros(3)
    state = {"scaler": scaler, "groups": [{"lr": 1.0, "params": (weights_D, weights_D[:1])}], "names": OrderedDict(a=1)}
    taken = copied(state)
    scaler.scale = 8.0
    weights_D += 1
    state["groups"][0]["lr"] = 2.0
    assert taken["scaler"].scale == 4.0
    assert taken["groups"][0]["lr"] == 1.0
    whole_D, view = taken["groups"][0]["params"]
    assert whole_D.tolist() == [0, 0, 0] and view.tolist() == [0]
    assert view.untyped_storage().nbytes() == view.nbytes
    assert type(taken["names"]) is OrderedDict and taken["names"] == {"a": 1}

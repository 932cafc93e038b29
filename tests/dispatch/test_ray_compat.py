"""The private parts of Ray that ray_compat leans on: this fails when a new Ray moves them."""

from __future__ import annotations

import inspect

import ray._private.worker
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from orchestrator.dispatch.ray_compat import UNWANTED_CALLBACKS, LaneTrainer, silence_driver


def test_a_lane_starts_without_the_stock_cleaner_and_data_sets() -> None:
    def loop() -> None:
        pass

    stock = TorchTrainer(loop, scaling_config=ScalingConfig(num_workers=1))._create_default_callbacks()
    ours = LaneTrainer(loop, scaling_config=ScalingConfig(num_workers=1))._create_default_callbacks()
    for unwanted in UNWANTED_CALLBACKS:
        assert sum(isinstance(callback, unwanted) for callback in stock) == 1
        assert not any(isinstance(callback, unwanted) for callback in ours)
    assert len(ours) == len(stock) - len(UNWANTED_CALLBACKS)


def test_rays_own_message_about_a_dead_worker_goes_through_the_name_we_replace(monkeypatch, capsys) -> None:
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", ray._private.worker.print_to_stdstream)
    assert "print_to_stdstream(" in inspect.getsource(ray._private.worker.listen_error_messages)
    silence_driver()
    ray._private.worker.print_to_stdstream({"lines": ["A worker died"], "pid": "raylet"}, ignore_prefix=False)
    assert capsys.readouterr() == ("", "")

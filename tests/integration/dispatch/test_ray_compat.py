"""The private parts of Ray that ray_compat leans on: this fails when a new Ray moves them."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import ray._private.worker
from ray._private.node import Node
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from orchestrator.dispatch.ray.compat import (
    UNWANTED_CALLBACKS,
    UNWANTED_SERVICES,
    LaneTrainer,
    few_processes,
    keep_credentials_from_trials,
    silence_driver,
)
from orchestrator.dispatch.ray.session import _ENVIRONMENT


def test_a_lane_starts_without_the_stock_cleaner_and_data_sets() -> None:
    def loop() -> None:
        pass

    stock = TorchTrainer(loop, scaling_config=ScalingConfig(num_workers=1))._create_default_callbacks()
    ours = LaneTrainer(loop, scaling_config=ScalingConfig(num_workers=1))._create_default_callbacks()
    for unwanted in UNWANTED_CALLBACKS:
        assert sum(isinstance(callback, unwanted) for callback in stock) == 1
        assert not any(isinstance(callback, unwanted) for callback in ours)
    assert len(ours) == len(stock) - len(UNWANTED_CALLBACKS) + 1  # and one of our own


def test_a_ray_of_our_own_starts_without_services_nobody_asks_and_is_itself_again_after_it() -> None:
    before = {name: getattr(Node, name) for name in UNWANTED_SERVICES}
    source = inspect.getsource(Node.start_head_processes) + inspect.getsource(Node.start_ray_processes)
    assert all(f"self.{name}(" in source for name in UNWANTED_SERVICES)
    with few_processes():
        assert all(getattr(Node, name) is not start for name, start in before.items())
    assert {name: getattr(Node, name) for name in UNWANTED_SERVICES} == before


def test_rays_own_watch_over_nodes_is_off_and_what_it_asks_is_there_to_be_asked() -> None:
    from ray._private.state import GlobalState
    from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR
    from ray.train.v2._internal.execution import preemption

    assert _ENVIRONMENT[ENABLE_PREEMPTION_WATCHER_ENV_VAR] == "0"
    assert "get_draining_nodes" in inspect.getsource(preemption) and callable(GlobalState.get_draining_nodes)


def test_rays_own_message_about_a_dead_worker_goes_through_the_name_we_replace(monkeypatch, capsys) -> None:
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", ray._private.worker.print_to_stdstream)
    assert "print_to_stdstream(" in inspect.getsource(ray._private.worker.listen_error_messages)
    silence_driver()
    ray._private.worker.print_to_stdstream({"lines": ["A worker died"], "pid": "raylet"}, ignore_prefix=False)
    assert capsys.readouterr() == ("", "")


def test_no_trial_of_a_search_is_handed_credentials(monkeypatch) -> None:
    from ray.tune.execution import class_cache

    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", names := class_cache.ENV_VARS_TO_PROPAGATE)
    assert "AWS_SECRET_ACCESS_KEY" in names and "ENV_VARS_TO_PROPAGATE" in inspect.getsource(
        class_cache._ActorClassCache
    )
    keep_credentials_from_trials()
    assert {name for name in names if name.startswith("RAY_")} <= class_cache.ENV_VARS_TO_PROPAGATE
    assert not {name for name in class_cache.ENV_VARS_TO_PROPAGATE if "KEY" in name or "TOKEN" in name}


def test_the_token_of_this_users_ray_is_for_his_eyes_only(tmp_path) -> None:
    """Made by us it is so from its first byte; one that Ray left to the umask is closed; Ray takes it as its own."""
    code = (
        "import os; os.umask(0o022)\n"
        "from orchestrator.dispatch.ray.compat import own_token\n"
        "from ray._private.authentication import authentication_token_setup as setup\n"
        "{first}\n"
        "own_token(ours=True); path = setup._get_default_token_path(); before = path.read_text()\n"
        "os.environ['RAY_AUTH_MODE'] = 'token'; setup._enable_token_auth(); setup.ensure_token_if_auth_enabled()\n"
        "assert path.read_text() == before and len(before) == 64\n"
        "print(oct(path.stat().st_mode & 0o777), sorted(p.name for p in path.parent.iterdir()))"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    for name, first in (("new", ""), ("left", "setup.generate_and_save_token()")):
        home = tmp_path / name
        home.mkdir()
        command = [sys.executable, "-c", code.format(first=first)]
        done = subprocess.run(command, env={**env, "HOME": str(home)}, capture_output=True, text=True, check=False)
        assert done.stdout.splitlines()[-1:] == ["0o600 ['auth_token']"], done.stderr


def test_where_a_home_cannot_be_written_our_own_ray_has_a_token_all_the_same() -> None:
    code = (
        "import os, sys\n"
        "from orchestrator.dispatch.ray.compat import own_token\n"
        "from ray._private.authentication import authentication_token_setup as setup\n"
        "own_token(ours=sys.argv[1] == 'ours'); loader = setup.AuthenticationTokenLoader.instance()\n"
        "print(len(os.environ.get('RAY_AUTH_TOKEN', '')), loader.has_token(ignore_auth_mode=True))"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"HOME": "/dev/null"}
    for whose, told in (("ours", "64 True"), ("joined", "0 False")):
        done = subprocess.run([sys.executable, "-c", code, whose], env=env, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == told, done.stderr

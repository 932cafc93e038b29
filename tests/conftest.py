"""What tests of the whole walk share: a tiny experiment on real data, and the program as a user starts it."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from program import run_forked
from repository import TINY_LLAVA

from orchestrator import registry

# How long an example takes says how busy the machine is.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
pytest_plugins = ["data_files", "search_experiment", "training_files"]
# A package of its own: integration/plugins/test_example_plugin.py installs and tests it.
collect_ignore = ["example_plugin"]

# `make test-python` runs without these; a test that asks for one is left out there, whatever else goes wrong fails.
FRAMEWORKS = ("torch", "transformers", "accelerate", "peft", "deepspeed", "ray", "mlflow", "matplotlib", "optuna")
ABSENT = {
    name for name in (*FRAMEWORKS, "safetensors", "boto3", "moto", "flask") if importlib.util.find_spec(name) is None
}
_MISSING = re.compile(r"No module named '(\w+)")

TINY_EXPERIMENT = f"""
schema_version: 1
name: tiny
model: {{model_name_or_path: {TINY_LLAVA}, weights: random, dtype: float32}}
data:
  train: {{kind: easy_vqa, split: train, max_samples: 200}}
  test: {{kind: easy_vqa, split: test, max_samples: 40}}
compressors:
  heavy: {{kind: average_pool, layer: 1, stride: 8}}
schedules:
  two_stage:
    kind: stages
    stages: [{{share: 1/2, compressor: heavy}}, {{}}]
phases:
  finetune:
    data: train
    train: [vision_tower, projector, language_model]
    max_steps: 6
    global_batch_size: 16
    per_device_train_batch_size: 8
    learning_rate: 1.0e-3
    model_max_length: 128
    deepspeed: zero0
evaluate:
  vqa: {{kind: exact_match, data: test, under: [final, full]}}
matrix:
  phases.finetune.schedule: [full, heavy, two_stage]
"""


# Files are handed out in this order, the longest first; a unit test fills the last gap.
LONGEST = (
    "test_tutorials", "test_golden", "test_run_on_ray", "test_search", "test_lanes", "test_rehearsal", "test_api",
    "test_run", "test_join_cluster", "test_sharing", "test_learned_training", "test_no_secret", "test_resume",
    "test_killed", "test_stop_signals", "test_run_faults", "test_damaged", "test_interrupted", "test_run_s3",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, those of the unit tier last."""
    rank = {name: place for place, name in enumerate(LONGEST)}

    def place(item: pytest.Item) -> tuple[bool, int]:
        return "unit" in item.path.parts, rank.get(item.path.stem, len(rank))

    items.sort(key=place)


def absent_in(text: str) -> str | None:
    """The framework whose absence a text tells of; None where it is not one, or is installed."""
    return next((name for name in _MISSING.findall(text) if name in ABSENT), None)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport]:
    """A file that imports what is not there is left out."""
    report = yield
    if report.failed and (name := absent_in(str(report.longrepr).strip().splitlines()[-1])):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {name} is not installed")
    return report


def _left_out() -> Generator[None, object, object]:
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if name := absent_in(str(error)):
            pytest.skip(f"{name} is not installed")
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    """A test whose fixtures import what is not there is left out."""
    return (yield from _left_out())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """A test that imports what is not there is left out."""
    return (yield from _left_out())


@pytest.fixture
def built_in_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry as a new process has it: plug-ins that other tests loaded are unknown for the length of a test."""
    monkeypatch.setattr(registry, "_from_plugins", {})


@pytest.fixture(scope="session", autouse=True)
def _own_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither find nor leave anything in the user's caches, and no terminal's width."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("COLUMNS", "LINES"):
            patch.delenv(name, raising=False)
        patch.setenv("RAY_worker_niceness", "0")  # else whatever runs beside a test starves Ray's workers
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # a lane's end is noticed sooner
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        yield


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """Three cells of six steps; `heavy` and `two_stage` begin alike."""
    return TINY_EXPERIMENT


@pytest.fixture
def tiny_experiment(tmp_path: Path, tiny_text: str) -> Path:
    """The tiny experiment as a file in an otherwise empty folder."""
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_text)
    return path


@pytest.fixture
def llavolta(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the program in an empty folder without a terminal, as a script would."""

    def run(*arguments: str | Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        result = run_forked(arguments, tmp_path, timeout, **environment)
        if result.returncode and (name := absent_in(result.stderr)):
            pytest.skip(f"{name} is not installed")
        return result

    return run


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a real S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """What boto3 needs of the environment, for this process and those it starts."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-tests")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.fixture
def bucket(s3_server: str, s3_credentials: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket of its own: `s3://NAME`."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server)
    name = f"bucket-{secrets.token_hex(6)}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"

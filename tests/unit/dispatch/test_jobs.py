"""What a cluster's shell is asked to do, and by which name an experiment's jobs are known."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from orchestrator.dispatch.package import Package, command
from orchestrator.dispatch.ray.jobs import exit_code, job_prefix
from orchestrator.errors import StageRunError


def package(digest: str = "ab" * 32) -> Package:
    return Package({}, "experiment/some specs/mine.yaml", "experiment/here", (), digest)


def test_the_shell_gives_every_word_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "experiment" / "here").mkdir(parents=True)
    program = tmp_path / "llavolta"
    program.write_text('#!/bin/sh\npwd\necho $PPID\nfor word; do echo "$word"; done\nexit 75\n')
    program.chmod(0o755)
    told = command(package(), "run", ["name=it's $HOME", "a.b=[1, 2]"], ["--max-hours", "2"])
    shell = subprocess.Popen(
        told, shell=True, cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, stdout=subprocess.PIPE, text=True
    )
    folder, parent, *words = shell.communicate()[0].splitlines()
    assert folder == str(tmp_path / "experiment" / "here")
    assert words == [
        "run", "../some specs/mine.yaml", "--set", "name=it's $HOME", "--set", "a.b=[1, 2]", "--set",
        "cluster.address=auto", "--max-hours", "2",
    ]  # fmt: skip
    assert int(parent) != shell.pid  # it stands in the shell's place: signals reach it, the code is its own
    assert shell.returncode == 75


def test_jobs_are_known_by_name_and_content() -> None:
    assert job_prefix(package(), "my study/1") == "llavolta-my-study-1-abababababababab-"
    assert job_prefix(package("cd" * 32), "a") != job_prefix(package(), "a")
    assert len(job_prefix(package(), "x" * 500)) < 100


@pytest.mark.parametrize(
    ("status", "code", "meant"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 75, 75),
        ("STOPPED", None, 75),
        ("FAILED", 127, "finds no `llavolta`"),
        ("FAILED", -9, "killed by SIGKILL"),
        ("FAILED", None, "no such node"),
    ],
)
def test_the_exit_code_of_a_job(status: str, code: int | None, meant: int | str) -> None:
    jobs = pytest.importorskip("ray.job_submission")
    details = jobs.JobDetails(
        type="SUBMISSION", status=status, entrypoint="", driver_exit_code=code, message="no such node"
    )
    if isinstance(meant, int):
        assert exit_code(details, "a job") == meant
    else:
        with pytest.raises(StageRunError, match=meant):
            exit_code(details, "a job")

"""A real PostgreSQL on loopback, with a folder and a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_servers import free_port


def binary(name: str) -> str | None:
    """A program of PostgreSQL; Debian has its server's in a folder of its own."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(places[-1]) if places else None)


needs_postgres = pytest.mark.skipif(
    binary("initdb") is None or binary("postgres") is None or importlib.util.find_spec("psycopg2") is None,
    reason="no PostgreSQL server or no psycopg2 here (apt-get install postgresql; pip install psycopg2-binary)",
)


def _not_root() -> dict[str, Any]:
    """It refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    names = {user.pw_name: user for user in pwd.getpwall()}
    user = names.get("postgres") or names["nobody"]
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The address of a new database, as SQLAlchemy takes it."""
    import psycopg2

    who, port = _not_root(), free_port()
    folder = tempfile.mkdtemp(prefix="llavolta-postgres-")  # not pytest's, which only its own user can enter
    try:
        if who:
            os.chown(folder, who["user"], who["group"])
        quiet: dict[str, Any] = {"cwd": folder, **who}
        made = [str(binary("initdb")), "-D", f"{folder}/data", "-U", "postgres", "-A", "trust", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, text=True, **quiet)
        options = [f"port={port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"]
        command = [str(binary("postgres")), "-D", f"{folder}/data", *(f"--{option}" for option in options)]
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **quiet)
        try:
            address = f"postgresql://postgres@127.0.0.1:{port}/postgres"
            deadline = time.monotonic() + 120
            while True:
                try:
                    psycopg2.connect(address).close()
                    break
                except psycopg2.OperationalError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise AssertionError((Path(folder) / "log").read_text()) from None
                time.sleep(0.1)
            yield address
        finally:
            process.send_signal(signal.SIGQUIT)  # ends its own processes at once
            process.wait()
    finally:
        shutil.rmtree(folder)

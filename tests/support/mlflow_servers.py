"""A real `mlflow server`, and a gate before it that counts what is asked and may want a password."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int, store: str = "", artifacts: str = "") -> Iterator[str]:
    """`mlflow server` in a process group of its own, on an sqlite file and a folder unless told; its address."""
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)),
        *("--backend-store-uri", store or f"sqlite:///{folder}/server.db"),
        *("--artifacts-destination", artifacts or str(folder / "artifacts")),
    ]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **quiet}, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            time.sleep(0.2)
        else:
            raise AssertionError((folder / "server.log").read_text())
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Gate:
    """Passes requests on to a server, counts them, and refuses those without the user and password it wants."""

    def __init__(self, target: str, port: int = 0) -> None:
        self.target = target
        self.wants: tuple[str, str] | None = None
        self.asked: list[str] = []
        gate = self

        class Handler(BaseHTTPRequestHandler):
            def _pass(self) -> None:
                gate.asked.append(f"{self.command} {self.path.partition('?')[0].rpartition('/mlflow/')[2]}")
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                code, kind, answer = gate.answer(self.command, self.path, dict(self.headers), body)
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass

            def log_message(self, *arguments: object) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.place = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, str, bytes]:
        if self.wants is not None:
            right = "Basic " + base64.b64encode(":".join(self.wants).encode()).decode()
            if headers.get("Authorization") != right:
                return 401, "text/plain", b"You are not authenticated."
        kept = {name: text for name, text in headers.items() if name.lower() in ("content-type", "accept")}
        request = urllib.request.Request(self.target + path, body or None, kept, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as got:
                return got.status, got.headers.get("Content-Type", ""), got.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers.get("Content-Type", ""), error.read()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

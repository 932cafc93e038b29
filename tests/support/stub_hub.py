"""A Hugging Face hub on loopback with a few repositories, as much of one as huggingface_hub asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class StubHub:
    """A hub.

    Attributes:
        url: What HF_ENDPOINT is to be.
        repositories: `models/ID` or `datasets/ID` to the folder of its files; its only revision is `main`.
        gated: Those that want `token`.
        token: The one token that opens them.
        files_sent: Files whose content was sent, in order.
    """

    url: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = "hub-token-of-a-test"
    files_sent: list[str] = field(default_factory=list)

    def commit(self, repository: str) -> str:
        """The commit of a repository's `main`: by its files."""
        files = {name: _etag(path) for name, path in self.files(repository).items()}
        return hashlib.sha1(json.dumps(files).encode()).hexdigest()

    def files(self, repository: str) -> dict[str, Path]:
        """The repository's files by name."""
        folder = self.repositories[repository]
        return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def stub_hub() -> Iterator[StubHub]:
    """Run a hub for the block."""
    hub = StubHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *arguments: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            words = unquote(urlsplit(self.path).path).strip("/").split("/")
            is_api = words[0] == "api"
            words = words[1:] if is_api else words
            kind = words.pop(0) if words[0] in ("models", "datasets") else "models"
            repository = "/".join([kind, *words[:2]])
            if repository not in hub.repositories:
                self._send(
                    401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, body
                )
            elif repository in hub.gated and self.headers.get("authorization") != f"Bearer {hub.token}":
                self._send(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, body)
            elif is_api:
                self._about(repository, words[2:], body)
            else:
                self._file(repository, "/".join(words[4:]), body)

        def _about(self, repository: str, words: list[str], body: bool) -> None:
            files, commit = hub.files(repository), hub.commit(repository)
            if words[:1] == ["tree"]:
                tree = [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                    for name, path in files.items()
                ]
                self._send(200, json.dumps(tree).encode(), {}, body)
            elif words[1:] in (["main"], [commit], []):
                name = repository.partition("/")[2]
                about = {"id": name, "modelId": name, "sha": commit, "private": False, "gated": False, "tags": [],
                         "downloads": 0, "likes": 0, "disabled": False,
                         "siblings": [{"rfilename": each} for each in files]}  # fmt: skip
                self._send(200, json.dumps(about).encode(), {}, body)
            else:
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)

        def _file(self, repository: str, name: str, body: bool) -> None:
            path = hub.files(repository).get(name)
            if path is None:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
                return
            if body:
                hub.files_sent.append(name)
            about = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": hub.commit(repository)}
            self._send(200, path.read_bytes(), about, body)

        def _send(self, code: int, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()

"""A chat endpoint on loopback that answers as a test scripts it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = '{"pred": "yes", "score": 4}'


class JudgeServer:
    """What the server was asked, and where it is.

    Attributes:
        url: Its address, up to `/v1`.
        requests: Bodies of the requests, with the header `Authorization` under that name.
    """

    def __init__(self, reply: Callable[[int, dict[str, Any]], Any], port: int) -> None:
        self.requests: list[dict[str, Any]] = []
        lock, kept = threading.Lock(), self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(kept)
                    kept.append({**body, "path": self.path, "Authorization": self.headers.get("Authorization")})
                found = reply(number, body)
                status, text, headers = found if isinstance(found, tuple) else (200, found, {})
                content = text if status != 200 else json.dumps({"choices": [{"message": {"content": text}}]})
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content.encode())))
                    self.end_headers()
                    self.wfile.write(content.encode())
                except BrokenPipeError:
                    pass  # who asked did not wait

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@contextmanager
def judge_server(reply: Callable[[int, dict[str, Any]], Any] = lambda *_: GOOD, port: int = 0) -> Iterator[JudgeServer]:
    """Serve until the block ends.

    Args:
        reply: Given the request's number and body, returns the judge's text, or (status, text, headers).
        port: Where it listens; 0 takes any.
    """
    found = JudgeServer(reply, port)
    thread = threading.Thread(target=found.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.server.shutdown()
        found.server.server_close()
        thread.join()

"""A web server on the loopback interface that can be told to misbehave."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """One file, and how it is served.

    ``breaks`` lists after how many bytes of the body each next answer is cut off; ``asked`` counts
    the requests.
    """

    content: bytes
    status: int = 200
    breaks: list[int] = field(default_factory=list)
    asked: int = 0
    url: str = ""


@contextmanager
def serve(served: Served) -> Iterator[Served]:
    """Serve a file on a free port while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked += 1
            if served.status != 200:
                self.send_error(served.status)
                return
            body = served.content
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if served.breaks:
                body = body[: served.breaks.pop(0)]
                self.close_connection = True
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}/file.bin"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

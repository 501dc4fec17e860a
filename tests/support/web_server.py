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

    ``breaks`` lists after how many bytes of the body each next answer is cut off.
    """

    content: bytes
    tag: str = '"one"'
    ranges: bool = True
    status: int = 200
    breaks: list[int] = field(default_factory=list)
    asked: list[dict[str, str]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(served: Served) -> Iterator[Served]:
    """Serve a file on a free port while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append(dict(self.headers))
            if served.status != 200:
                self.send_error(served.status)
                return
            begin = self._begin()
            if begin > 0 and begin >= len(served.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(served.content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = served.content[begin:]
            self.send_response(206 if begin else 200)
            self.send_header("ETag", served.tag)
            self.send_header("Content-Length", str(len(body)))
            if begin:
                last = len(served.content) - 1
                self.send_header("Content-Range", f"bytes {begin}-{last}/{len(served.content)}")
            self.end_headers()
            if served.breaks:
                body = body[: served.breaks.pop(0)]
                self.close_connection = True
            self.wfile.write(body)

        def _begin(self) -> int:
            asked = self.headers.get("Range", "")
            unchanged = self.headers.get("If-Range", served.tag) == served.tag
            if not (asked and served.ranges and unchanged):
                return 0
            return int(asked.removeprefix("bytes=").removesuffix("-"))

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

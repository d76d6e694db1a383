"""A hub on loopback that speaks as much of the hub's protocol as a pull needs: metadata, and files by range."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = 1_000  # bytes from which a file is a large one


class FakeHub:
    """`files` by name; `damaged` are answered with other bytes than the metadata promise; `asked` is what was fetched."""

    def __init__(self, repository: str, revision: str, files: dict[str, bytes]) -> None:
        self.repository, self.revision, self.files = repository, revision, files
        self.damaged: set[str] = set()
        self.cut_at: int | None = None  # the connection ends after so many bytes of a large file
        self.asked: list[tuple[str, str | None]] = []

    @property
    def siblings(self) -> list[dict[str, object]]:
        return [{"rfilename": name, "size": len(data), "blobId": sha1(data), **lfs(data)} for name, data in self.files.items()]

    @contextmanager
    def serving(self) -> Iterator[str]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def lfs(data: bytes) -> dict[str, object]:
    return {"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 1}} if len(data) >= LARGE else {}


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path == f"/api/models/{hub.repository}/revision/{hub.revision}":
                self._json({"id": hub.repository, "sha": hub.revision, "siblings": hub.siblings})
            elif path.startswith(prefix := f"/{hub.repository}/resolve/{hub.revision}/"):
                self._file(path.removeprefix(prefix))
            else:
                self.send_error(404)

        def _json(self, value: object) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _file(self, name: str) -> None:
            data = hub.files[name]
            if name in hub.damaged:
                data = bytes(len(data))
            start = 0
            wanted = self.headers.get("Range")
            if wanted:
                start = int(wanted.removeprefix("bytes=").split("-")[0])
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(data) - start))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            hub.asked.append((name, wanted))
            cut = hub.cut_at if len(data) >= LARGE and hub.cut_at is not None else len(data)
            self.wfile.write(data[start : max(start, cut)])

    return Handler

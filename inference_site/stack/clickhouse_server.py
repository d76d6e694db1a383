"""Embedded ClickHouse: the one process that owns a chdb session, serving ClickHouse's HTTP interface on loopback.

`python -m inference_site.stack.clickhouse_server --path DIR --port N`, with CLICKHOUSE_PASSWORD in the environment. It
speaks the part of the interface that `clickhouse-connect`'s ordinary client uses: queries with bound parameters, inserts
in Native format, errors with their code. Queries run one at a time.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hmac
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlsplit

from chdb._exceptions import ChdbError  # not the class of the same name that `chdb` itself shows
from chdb.session import Session

USER = "inference"
DATABASE = "inference"
MAX_BODY_BYTES = 64 << 20
_FORMAT = re.compile(r"\s+FORMAT\s+(\w+)\s*;?\s*$", re.IGNORECASE)
_INSERT = re.compile(r"^\s*(INSERT\s+INTO\s+.+?)\s+FORMAT\s+(\w+)\s*$", re.IGNORECASE | re.DOTALL)
_CODE = re.compile(r"Code: (\d+)")
_SETTING = re.compile(r"^[a-z_]+$")
# Settings that travel in the address and mean something to us; the rest are the client's own business.
_SETTINGS = frozenset({"insert_deduplication_token", "max_execution_time", "max_result_rows"})


class Engine:
    """The session, one query at a time."""

    def __init__(self, path: Path) -> None:
        self._session = Session(str(path))
        self._lock = threading.Lock()
        self._session.query(f"CREATE DATABASE IF NOT EXISTS {DATABASE}")
        self._session.query(f"USE {DATABASE}")

    def query(self, sql: str, parameters: dict[str, str], settings: dict[str, str], data: bytes) -> bytes:
        """Raises ChdbError."""
        insert = _INSERT.match(sql)
        with self._lock:
            if insert and data:
                return self._insert(insert[1], insert[2], settings, data)
            found = _FORMAT.search(sql)
            text = sql[: found.start()] if found else sql
            if text.lstrip()[:6].upper() in ("SELECT", "WITH"):
                text += _settings_clause({k: v for k, v in settings.items() if k.startswith("max_")})
            result = self._session.query(text, found[1] if found else "TabSeparated", params=parameters)
            return bytes(result.bytes())

    def _insert(self, head: str, layout: str, settings: dict[str, str], data: bytes) -> bytes:
        """chdb reads rows from a file, not from the query: they pass through one that nobody else can open."""
        with tempfile.NamedTemporaryFile(suffix=".rows") as rows:
            rows.write(data)
            rows.flush()
            clause = _settings_clause({k: v for k, v in settings.items() if k.startswith("insert_")})
            self._session.query(f"{head}{clause} SELECT * FROM file('{rows.name}', '{layout}')")
        return b""

    def close(self) -> None:
        with self._lock:
            self._session.close()


def _split(body: bytes) -> tuple[str, bytes]:
    """A body that begins with its query: an insert's rows follow on the next line."""
    first, newline, rest = body.partition(b"\n")
    if newline and _INSERT.match(first.decode(errors="replace")):
        return first.decode(), rest
    return body.decode(), b""


def _settings_clause(settings: dict[str, str]) -> str:
    quoted = (f"{name} = '{_quote(value)}'" for name, value in settings.items() if _SETTING.match(name))
    clause = ", ".join(quoted)
    return f" SETTINGS {clause}" if clause else ""


def _quote(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "\\'")


class Handler(BaseHTTPRequestHandler):
    """ClickHouse's HTTP interface, as far as clients of ours go."""

    protocol_version = "HTTP/1.1"
    engine: ClassVar[Engine]
    password: ClassVar[bytes]

    def do_GET(self) -> None:
        if urlsplit(self.path).path == "/ping":
            self._answer(200, b"Ok.\n")
        else:
            self._query(b"")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = self._read_chunked()
        elif length.isdigit() and int(length) <= MAX_BODY_BYTES:
            body = self.rfile.read(int(length))
        else:
            self._answer(413, b"Code: 1. the body is missing its length, or too large\n")
            return
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self._query(body)

    def _read_chunked(self) -> bytes:
        parts, total = [], 0
        while size := int(self.rfile.readline(20).split(b";")[0], 16):
            total += size
            if total > MAX_BODY_BYTES:
                raise ValueError("body too large")
            parts.append(self.rfile.read(size))
            self.rfile.readline(4)
        self.rfile.readline(4)
        return b"".join(parts)

    def _query(self, body: bytes) -> None:
        if not self._authorized():
            self._answer(403, b"Code: 516. DB::Exception: Authentication failed. (AUTHENTICATION_FAILED)\n", code="516")
            return
        address = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
        sql, data = (address["query"], body) if "query" in address else _split(body)
        parameters = {name[6:]: value for name, value in address.items() if name.startswith("param_")}
        settings = {name: value for name, value in address.items() if name in _SETTINGS}
        try:
            result = self.engine.query(sql, parameters, settings, data)
        except ChdbError as error:
            found = _CODE.search(str(error))
            self._answer(500, f"{error}\n".encode(), code=found[1] if found else "1")
            return
        self._answer(200, result)

    def _authorized(self) -> bool:
        given = self.headers.get("X-ClickHouse-Key", "")
        if header := self.headers.get("Authorization", ""):
            given = base64.b64decode(header.removeprefix("Basic ")).decode().partition(":")[2]
        return hmac.compare_digest(given.encode(), self.password)

    def _answer(self, status: int, body: bytes, code: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("X-ClickHouse-Timezone", "UTC")
        self.send_header("X-ClickHouse-Summary", '{"read_rows":"0","written_rows":"0"}')
        if code is not None:
            self.send_header("X-ClickHouse-Exception-Code", code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the writer logs its own failures."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is its own affair; anything else is ours, and logged."""
        if not isinstance(sys.exception(), ConnectionError):
            traceback.print_exc()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m inference_site.stack.clickhouse_server", description=__doc__)
    parser.add_argument("--path", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    password = os.environ.get("CLICKHOUSE_PASSWORD", "")
    if not password:
        parser.error("set CLICKHOUSE_PASSWORD")
    arguments.path.mkdir(parents=True, exist_ok=True)
    Handler.engine, Handler.password = Engine(arguments.path), password.encode()
    server = Server(("127.0.0.1", arguments.port), Handler)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    signal.signal(signal.SIGINT, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(poll_interval=0.1)
    Handler.engine.close()
    sys.exit(0)


if __name__ == "__main__":
    main()

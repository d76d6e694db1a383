"""Real Postgres and Redis for the tests: started before Django reads its settings, stopped when pytest ends.

Loaded with `-p tests.services`. DATABASE_URL and REDIS_URL, when set, are used instead.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import psycopg
import pytest
import redis

ROOT = Path(__file__).resolve().parents[1]
_started: list[tuple[subprocess.Popen[bytes], signal.Signals]] = []
_folder: list[Path] = []
_OURS = "TESTS_STARTED_SERVICES"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests() -> Generator[None, object, object]:
    """A wrapper, so that it comes before pytest-django, which imports the settings."""
    _start_services()
    return (yield)


def _start_services() -> None:
    if os.environ.get(_OURS):  # a process of pytest-xdist: what the one before it started is not shared
        del os.environ["DATABASE_URL"], os.environ["REDIS_URL"]
    folder = Path(tempfile.mkdtemp(prefix="inference-tests-"))
    folder.chmod(0o755)
    _folder.append(folder)
    models = os.environ.get("MODELS_DIR", str(ROOT / "var" / "models"))
    os.environ.update(
        SECRET_KEY=secrets.token_hex(),
        DAEMON_TOKEN=secrets.token_hex(),
        METRICS_TOKEN=secrets.token_hex(),
        VAR_DIR=str(folder / "var"),
        MODELS_DIR=models,
        OMP_WAIT_POLICY="PASSIVE",  # as the daemon has it
    )
    from inference_site.stack.postgres import Postgres, create_database
    from inference_site.stack.valkey import Valkey

    if "DATABASE_URL" not in os.environ:
        postgres = Postgres(folder / "postgres", free_port(), secrets.token_hex())
        postgres.prepare()
        _start(postgres.command, folder / "postgres.log", signal.SIGINT)
        _until(lambda: create_database(postgres.url), psycopg.Error, folder / "postgres.log")
        os.environ["DATABASE_URL"] = postgres.url
        os.environ[_OURS] = "1"
    if "REDIS_URL" not in os.environ:
        valkey = Valkey(folder / "valkey", free_port(), secrets.token_hex())
        valkey.prepare()
        _start(valkey.command, folder / "valkey.log", signal.SIGTERM)
        _until(lambda: redis.Redis.from_url(valkey.url).ping(), redis.RedisError, folder / "valkey.log")
        os.environ["REDIS_URL"] = valkey.url


def _start(command: list[str], log: Path, stop: signal.Signals) -> None:
    with log.open("wb") as output:
        _started.append((subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd="/"), stop))


def _until(works: object, errors: type[Exception], log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            works()  # type: ignore[operator]
            return
        except errors:
            if time.monotonic() > deadline:
                raise RuntimeError(log.read_text()) from None
            time.sleep(0.05)


def pytest_unconfigure() -> None:
    for process, stop in _started:
        process.send_signal(stop)
    for process, _ in _started:
        process.wait(timeout=20)
    _started.clear()
    for folder in _folder:
        shutil.rmtree(folder, ignore_errors=True)
    _folder.clear()

"""What `manage.py up` is made of, piece by piece; tests/e2e runs the whole."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest

from inference_site.stack import preflight
from inference_site.stack.errors import StackError
from inference_site.stack.secrets import secret, write_private
from inference_site.stack.supervisor import Program, Supervisor
from tests.services import ROOT


def test_secrets_are_made_once_and_private(tmp_path) -> None:
    first = secret(tmp_path, "key", "sk-")
    assert first.startswith("sk-")
    assert secret(tmp_path, "key") == first
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "open").write_text("x")
    write_private(tmp_path / "open", "y")
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o600


def test_one_stack_per_folder(tmp_path) -> None:
    with preflight.lock(tmp_path), pytest.raises(StackError, match="already runs"):
        preflight.lock(tmp_path)
    preflight.lock(tmp_path).close()


def test_a_busy_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(StackError, match=str(taken.getsockname()[1])):
            preflight.require_port("127.0.0.1", taken.getsockname()[1])


def test_a_full_disk_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(preflight, "STATE_BYTES", 1 << 60)
    with pytest.raises(StackError, match="too full"):
        preflight.require_space(tmp_path)


@pytest.fixture
def supervised(tmp_path):
    sleeper = [sys.executable, "-c", "__import__('time').sleep(600)"]
    programs = [Program("one", 1, sleeper, autostart=True), Program("two", 2, sleeper)]
    supervisor = Supervisor(tmp_path, tmp_path / "log", programs, tmp_path)
    supervisor.start()
    yield supervisor, tmp_path
    supervisor.stop()


def _children(folder) -> list[psutil.Process]:
    pid = int((folder / "supervisord.pid").read_text())
    return psutil.Process(pid).children()


def _until(condition, seconds: float = 10):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_what_dies_is_restarted_and_stopping_leaves_nothing(supervised) -> None:
    supervisor, folder = supervised
    supervisor.start_program("two")
    first = {child.pid for child in _until(lambda: len(_children(folder)) == 2 and _children(folder))}
    time.sleep(1.2)  # a program that lived for a second is one that works
    os.kill(min(first), signal.SIGKILL)
    second = _until(lambda: len(found := _children(folder)) == 2 and {c.pid for c in found} != first and found)
    supervisor.stop()
    assert not any(child.is_running() for child in second)


def test_a_killed_supervisor_takes_its_children_along(supervised) -> None:
    supervisor, folder = supervised
    children = _until(lambda: _children(folder))
    supervisor._process.kill()
    _until(lambda: not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children))


def test_a_missing_variable_is_named(tmp_path) -> None:
    env = {"PATH": os.environ["PATH"], "PORT": "ninety", "VAR_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "manage.py", "check"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert "port" in done.stderr


def test_the_clickhouse_server_binds_parameters_and_guards_its_door(tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "inference_site.stack.clickhouse_server", "--path", str(tmp_path), "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env={"CLICKHOUSE_PASSWORD": "secret", "PATH": "/usr/bin:/bin"})
    url = f"http://127.0.0.1:{port}/"

    def answers() -> bool:
        try:
            return httpx.get(url + "ping").text == "Ok.\n"
        except httpx.TransportError:
            return False

    try:
        _until(answers, 30)
        key = {"X-ClickHouse-Key": "secret"}
        bound = httpx.post(url, params={"param_x": "it's; DROP"}, content="SELECT {x:String} FORMAT TabSeparated", headers=key)
        assert bound.text == "it\\'s; DROP\n"
        wrong = httpx.post(url, content="SELECT nonsense FROM nowhere", headers=key)
        assert (wrong.status_code, wrong.headers["x-clickhouse-exception-code"]) == (500, "60")
        assert httpx.post(url, content="SELECT 1", headers={"X-ClickHouse-Key": "guess"}).status_code == 403
        assert httpx.post(url, content="SELECT 1").status_code == 403
    finally:
        process.terminate()
        assert process.wait(10) == 0

"""hostctl with real daemons: what a mode is, that every verb can be repeated, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gpu_daemon.hostctl import processes
from gpu_daemon.hostctl.__main__ import _remote_words, run
from gpu_daemon.hostctl.config import read_config
from gpu_daemon.hostctl.errors import Failed, Refused
from tests.services import ROOT, free_port


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Path]:
    """The configuration file of a host with two devices. Its daemons are ended with the test."""
    token = tmp_path / "token"
    token.write_text("t" * 32)
    token.chmod(0o600)
    path = tmp_path / "host.toml"
    path.write_text(f"""
        listen = "127.0.0.1"
        models_dir = "{tmp_path}"
        run_dir = "{tmp_path}/run"
        log_dir = "{tmp_path}/log"
        token_file = "{token}"
        start_seconds = 30
        arguments = ["--threads", "1"]
        [[individual]]
        worker = "gpu0"
        port = {free_port()}
        device = "cpu"
        [[individual]]
        worker = "gpu1"
        port = {free_port()}
        device = "cpu"
        [tensor_parallel]
        worker = "both"
        port = {free_port()}
        device = "cpu"
        launcher = ["{sys.executable}"]
    """)
    yield path
    processes.end(tmp_path / "run", lambda _: True, 0)


def hostctl(config: Path, words: str) -> tuple[int, dict]:
    """As sshd's forced command runs it."""
    env = {**os.environ, "SSH_ORIGINAL_COMMAND": words}
    command = [sys.executable, "-m", "gpu_daemon.hostctl", "--config", str(config)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def launch_by(config: Path, *launcher: str) -> None:
    """What goes before `-m gpu_daemon` in the tensor parallel mode."""
    config.write_text(re.sub("launcher = .*", f"launcher = {json.dumps(launcher)}", config.read_text()))


def living(config: Path) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for each in processes.find(read_config(config).run_dir):
        found.setdefault(f"{each.worker}@{each.epoch}", set()).add(each.process.pid)
    return found


def test_modes_are_started_beside_each_other_and_stopped_and_all_of_it_twice(host: Path) -> None:
    for _ in range(2):
        status, answer = hostctl(host, "start individual --epoch 1")
        assert (status, answer["ok"]) == (0, True), answer
    first = living(host)
    assert sorted(first) == ["gpu0@1", "gpu1@1"]
    assert all(len(pids) == 1 for pids in first.values()), "started twice is started once"
    assert hostctl(host, "verify")[0] == 0
    assert hostctl(host, "start tensor_parallel --epoch 2 --beside 1")[0] == 0
    assert sorted(living(host)) == ["both@2", "gpu0@1", "gpu1@1"]
    assert "several epochs" in hostctl(host, "verify")[1]["error"]
    assert hostctl(host, "stop --epoch 1")[1]["stopped"] == 2
    assert hostctl(host, "stop --epoch 1")[1]["stopped"] == 0
    assert sorted(living(host)) == ["both@2"]
    (daemon,) = hostctl(host, "verify")[1]["daemons"]
    assert (daemon["mode"], daemon["epoch"], daemon["listening"], daemon["exposed"]) == ("tensor_parallel", 2, True, [])
    status, answer = hostctl(host, "start individual --epoch 1")
    assert (status, "of the past" in answer["error"]) == (2, True)
    assert sorted(living(host)) == ["both@2"], "the past harms nothing"
    assert hostctl(host, "start individual --epoch 3")[0] == 0
    assert sorted(living(host)) == ["gpu0@3", "gpu1@3"], "what no switch knows of is swept"


def test_a_killed_daemon_is_started_again_and_its_sister_left_alone(host: Path) -> None:
    hostctl(host, "start individual --epoch 1")
    before = living(host)
    (victim,) = before["gpu1@1"]
    os.kill(victim, signal.SIGKILL)
    assert "gpu1 does not listen" in hostctl(host, "verify")[1]["error"]
    assert hostctl(host, "start individual --epoch 1")[0] == 0
    after = living(host)
    assert after["gpu0@1"] == before["gpu0@1"]
    assert after["gpu1@1"] != before["gpu1@1"]


def test_a_daemon_that_never_starts_is_undone_and_says_why(host: Path) -> None:
    hostctl(host, "start individual --epoch 1")
    launch_by(host, sys.executable, "-c", "print(41 + 1)")
    status, answer = hostctl(host, "start tensor_parallel --epoch 2 --beside 1")
    assert status == 1
    assert "both ended with status 0: 42" in answer["error"]
    launch_by(host, sys.executable)
    host.write_text(host.read_text().replace("start_seconds = 30", "start_seconds = 0.3"))
    status, answer = hostctl(host, "start tensor_parallel --epoch 3 --beside 1")
    assert (status, "does not listen in time" in answer["error"]) == (1, True)
    assert sorted(living(host)) == ["gpu0@1", "gpu1@1"]


def test_a_launch_whose_line_is_cut_is_undone(host: Path) -> None:
    slow = host.parent / "slow.py"
    slow.write_text("import time; time.sleep(300)")
    launch_by(host, sys.executable, str(slow))
    command = [sys.executable, "-m", "gpu_daemon.hostctl", "--config", str(host), "start", "tensor_parallel", "--epoch", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    _until(lambda: living(host))
    process.stdout.close()
    assert process.wait(10) == 1
    assert living(host) == {}


def test_what_does_not_leave_is_killed_with_its_children(host: Path) -> None:
    stubborn = host.parent / "stubborn.py"
    stubborn.write_text(
        "import signal, socket, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], start_new_session=True)\n"
        "port = int(sys.argv[sys.argv.index('--port') + 1])\n"
        "server = socket.create_server(('127.0.0.1', port))\n"
        "time.sleep(300)\n"
    )
    host.write_text(host.read_text().replace("start_seconds = 30", "start_seconds = 30\nstop_seconds = 0.5"))
    launch_by(host, sys.executable, str(stubborn))
    assert hostctl(host, "start tensor_parallel --epoch 1")[0] == 0
    _until(lambda: len(living(host)["both@1"]) == 2)
    assert hostctl(host, "stop --epoch 1")[1]["stopped"] == 2
    assert living(host) == {}


@pytest.mark.parametrize(
    "words",
    [
        "", "help", "start", "start both --epoch 1", "start individual", "start individual --epoch -1", "stop --epoch 1e3",
        "start individual --epoch 1; id", "status; id", "status && id", "$(id)", "`id`", "status\nverify", "stop --epoch '1 2'",
        "stop --epoch \u0661", "status --config /etc/passwd", "start individual --epoch 1 --beside", "'status",
        "stop --epoch 9999999999999",
        "status " * 100, "stop --epoch 1 --epoch 2", "\x00", "start individual --epoch $(id)", "-c id", "--config x status",
    ],
)  # fmt: skip
def test_anything_else_is_refused_and_touches_nothing(host: Path, words: str) -> None:
    with pytest.raises(Refused):
        run(_remote_words(words), host)
    assert not (host.parent / "run").exists()


def test_a_forced_command_without_words_is_refused(host: Path) -> None:
    assert hostctl(host, "")[0] == 2
    assert hostctl(host, "status; touch /tmp/x")[0] == 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("[tensor_parallel]", "[tensor_parallels]"), "unexpected keyword argument 'tensor_parallels'"),
        (('worker = "gpu1"', 'worker = "gpu0"'), "share a worker name"),
        (('worker = "gpu1"', 'worker = "gpu1; id"'), "letters, digits"),
        (('device = "cpu"', 'devise = "cpu"'), "has no devise"),
        (("listen", "listens"), "listen"),
        (("models_dir = ", "models_dir "), "wrong"),
    ],
)
def test_a_configuration_that_is_wrong_says_what_is(host: Path, change: tuple[str, str], why: str) -> None:
    host.write_text(host.read_text().replace(*change))
    with pytest.raises(Refused, match=why):
        run(["status"], host)


def test_a_token_that_others_can_read_starts_nothing(host: Path) -> None:
    (host.parent / "token").chmod(0o644)
    with pytest.raises(Refused, match="chmod 600"):
        run(["start", "individual", "--epoch", "1"], host)
    assert living(host) == {}


def test_a_mode_that_the_host_does_not_have_is_refused(host: Path) -> None:
    host.write_text(host.read_text().split("[tensor_parallel]")[0])
    with pytest.raises(Refused, match="no tensor_parallel mode"):
        run(["start", "tensor_parallel", "--epoch", "1"], host)
    with pytest.raises(Failed, match="no daemon runs"):
        run(["verify"], host)


def _until(holds) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_dead_process_is_none(host: Path) -> None:
    """A child of ours that nobody waited for yet is no daemon any more."""
    process = subprocess.Popen([sys.executable, "-c", ""], env={processes.TAG: f"individual|1|gpu0|{host.parent}/run"})
    _until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    assert living(host) == {}
    process.wait()

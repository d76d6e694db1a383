"""This host's daemons as processes, known by a tag in their environment, which every child inherits: no file goes stale."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from gpu_daemon.hostctl.errors import Failed

TAG = "INFERENCE_DAEMON"
MAX_LOG_BYTES = 16 << 20
POLL_SECONDS = 0.05
KILL_SECONDS = 5.0
_KEPT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH")


@dataclass(frozen=True, slots=True)
class Tagged:
    """A process of a daemon: `torchrun`, a rank, or a helper of either."""

    process: psutil.Process
    mode: str
    epoch: int
    worker: str


def tag(run_dir: Path, mode: str, epoch: int, worker: str) -> str:
    return f"{mode}|{epoch}|{worker}|{run_dir}"


def find(run_dir: Path) -> list[Tagged]:
    """Every living process of this run directory's daemons."""
    found = []
    for process in psutil.process_iter():
        try:
            mode, epoch, worker, folder = process.environ().get(TAG, "|||").split("|", 3)
            if folder == str(run_dir) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(Tagged(process, mode, int(epoch), worker))
        except (psutil.Error, OSError):
            continue  # another user's, or gone meanwhile
    return found


def launch(command: list[str], environment: dict[str, str], label: str, log: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Starts a daemon that outlives this program and its SSH session. Its output is appended to `log`."""
    if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env={**kept, **environment, TAG: label},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def listening(daemon: Iterable[Tagged]) -> set[tuple[str, int]]:
    """The (address, port) pairs on which the processes accept connections."""
    sockets = set()
    for each in daemon:
        try:
            connections = each.process.net_connections("tcp")
        except (psutil.Error, OSError):
            continue
        sockets |= {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}
    return sockets


def end(run_dir: Path, ends: Callable[[int], bool], grace_seconds: float) -> int:
    """SIGTERM to the daemons of the epochs that `ends` is true for, SIGKILL to what is left after the grace.

    Looks again until nothing is left, since what is told to leave may start a helper before it does. What was told and has
    outlived its children is killed: `torchrun` takes seconds to say farewell, and has nothing to save. Returns how many
    processes it met. Raises Failed when even SIGKILL does not end one.
    """
    deadline = time.monotonic() + grace_seconds
    told, met, parents = set[int](), set[int](), set[int]()
    while left := [each for each in find(run_dir) if ends(each.epoch)]:
        met |= {each.process.pid for each in left}
        now = {_parent(each.process) for each in left}
        parents |= now
        late = time.monotonic() - deadline
        if late > KILL_SECONDS:
            raise Failed(f"process {left[0].process.pid} does not end")
        for process in [each.process for each in left] if late >= 0 else _heads(left):
            kill = late >= 0 or process.pid in (told & parents) - now
            if kill or process.pid not in told:
                _signal(process, kill=kill)
                told.add(process.pid)
        time.sleep(POLL_SECONDS)
    return len(met)


def _heads(tagged: list[Tagged]) -> list[psutil.Process]:
    """Those that no other one started: `torchrun` tells its ranks itself. An orphan is its own head."""
    pids = {each.process.pid for each in tagged}
    return [each.process for each in tagged if _parent(each.process) not in pids]


def _parent(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.Error:
        return 0


def _signal(process: psutil.Process, *, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except psutil.Error:
        return  # it left by itself

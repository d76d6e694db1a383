"""supervisord, configured and driven: it starts every process, restarts what dies, and stops all in order.

Each process is told by the kernel to end when its parent does, so that nothing outlives even a `kill -9`.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy, Transport

from inference_site.stack.errors import StackError

STOP_SECONDS = 14


@dataclass(frozen=True, slots=True)
class Program:
    """One supervised process. Groups stop one after the other, the highest `stage` first."""

    name: str
    stage: int
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    stop_signal: str = "TERM"
    stop_seconds: int = 4
    autostart: bool = False


class Supervisor:
    def __init__(self, folder: Path, logs: Path, programs: Sequence[Program], working_directory: Path) -> None:
        self._folder = folder
        self._logs = logs
        self._programs = programs
        self._directory = working_directory
        # Socket paths are limited to about a hundred characters: it is named from inside its folder.
        self._socket = Path("supervisor.sock")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        configuration = self._folder / "supervisord.conf"
        configuration.touch(mode=0o600)
        configuration.write_text(self._configuration())
        (self._folder / self._socket).unlink(missing_ok=True)
        command = [sys.executable, "-m", "supervisor.supervisord", "--nodaemon", "--silent", "-c", str(configuration)]
        self._process = subprocess.Popen(
            _dies_with_parent(command),
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us; we stop the rest in order
        )
        self._wait_for_socket()

    def _wait_for_socket(self) -> None:
        deadline = time.monotonic() + 10
        while not (self._folder / self._socket).exists():
            if not self.alive or time.monotonic() > deadline:
                raise StackError(f"supervisord did not start; see {self._logs / 'supervisord.log'}")
            time.sleep(0.02)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start_program(self, name: str) -> None:
        try:
            with self._rpc() as rpc:
                rpc.supervisor.startProcess(self._full_name(name), False)
        except Fault as fault:
            raise StackError(f"{name} could not be started: {fault.faultString}") from None

    def failed(self) -> str | None:
        """The name of a program that was given up on."""
        with self._rpc() as rpc:
            states = rpc.supervisor.getAllProcessInfo()
        assert isinstance(states, list)
        return next((str(state["name"]) for state in states if state["statename"] == "FATAL"), None)

    def stop(self) -> None:
        """Stops every process, the latest started first. What does not stop in time is killed."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _full_name(self, name: str) -> str:
        stage = next(program.stage for program in self._programs if program.name == name)
        return f"stage{stage}:{name}"

    def _rpc(self) -> ServerProxy:
        return ServerProxy("http://localhost", transport=_UnixTransport(self._folder / self._socket))

    def _configuration(self) -> str:
        stages = sorted({program.stage for program in self._programs})
        sections = [
            f"[unix_http_server]\nfile={self._socket}\nchmod=0600\n",
            f"[supervisord]\nlogfile={self._logs / 'supervisord.log'}\npidfile=supervisord.pid\nminfds=1024\n"
            "logfile_maxbytes=10MB\nlogfile_backups=1\n",
            "[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n",
            *(self._group(stage) for stage in stages),
            *(self._section(program) for program in self._programs),
        ]
        return "\n".join(sections)

    def _group(self, stage: int) -> str:
        names = ",".join(program.name for program in self._programs if program.stage == stage)
        return f"[group:stage{stage}]\nprograms={names}\npriority={stage}\n"

    def _section(self, program: Program) -> str:
        environment = ",".join(f'{name}="{_escape(value)}"' for name, value in program.environment.items())
        return (
            f"[program:{program.name}]\n"
            f"command={_escape(shlex.join(_dies_with_parent(program.command)))}\n"
            f"directory={self._directory}\n"
            f"environment={environment}\n"
            f"autostart={str(program.autostart).lower()}\n"
            "autorestart=true\nstartsecs=1\nstartretries=5\nredirect_stderr=true\n"
            f"stopsignal={program.stop_signal}\nstopwaitsecs={program.stop_seconds}\n"
            f"stdout_logfile={self._logs / program.name}.log\nstdout_logfile_maxbytes=20MB\nstdout_logfile_backups=1\n"
        )


def _escape(text: str) -> str:
    """supervisord expands %(names)s in what it reads."""
    return text.replace("%", "%%")


def _dies_with_parent(command: Sequence[str]) -> list[str]:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise StackError("setpriv is missing; it is part of util-linux")
    # A command that already goes through setpriv sets its own user, which would clear the signal set before.
    if Path(command[0]).name == "setpriv":
        return [command[0], "--pdeathsig=TERM", *command[1:]]
    return [setpriv, "--pdeathsig=TERM", "--", *command]


class _UnixTransport(Transport):
    """XML-RPC over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> HTTPConnection:
        connection = HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(_short(self._path))
        self._connection = host, connection  # for close()
        return connection


def _short(path: Path) -> str:
    """The path, through /proc when it is too long for a socket's address."""
    return str(path) if len(str(path)) < 100 else f"/proc/self/cwd/{path.relative_to(Path.cwd())}"

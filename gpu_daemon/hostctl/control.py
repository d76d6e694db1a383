"""The verbs. Each may be repeated, or be cut off anywhere and asked for again: the host ends in the same state."""

from __future__ import annotations

import fcntl
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu_daemon.hostctl import processes
from gpu_daemon.hostctl.config import MEETING, Daemon, HostConfig
from gpu_daemon.hostctl.errors import Failed, Refused

LOCK_SECONDS = 45.0
LOG_LINES = 5
_CODE = Path(__file__).resolve().parents[2]  # where `-m gpu_daemon` is found


class Control:
    """One host. Owns the daemons of its run directory, and the memory of the highest epoch it was given."""

    def __init__(self, config: HostConfig) -> None:
        self._config = config
        self._run = config.run_dir

    # --- What it is asked ---

    def start(self, mode: str, epoch: int, beside: int) -> dict[str, Any]:
        """Every daemon of the mode runs and listens under this epoch, and none of an epoch other than it and `beside`.

        Raises Refused for an epoch of the past, and Failed after ending what it started.
        """
        wanted = self._config.daemons(mode)
        with self._locked():
            self._raise_epoch(epoch)
            if any(each.epoch == epoch and each.mode != mode for each in processes.find(self._run)):
                raise Refused(f"epoch {epoch} is of another mode")
            processes.end(self._run, lambda other: other not in (epoch, beside), self._config.stop_seconds)
            self._forget_meetings({epoch, beside})
            try:
                self._start_missing(mode, epoch, wanted)
            except (Failed, Refused):
                processes.end(self._run, lambda other: other == epoch, 0)
                raise
            return self._report()

    def stop(self, epoch: int) -> dict[str, Any]:
        """No daemon of the epoch is left; they had the time to save what they keep.

        When it is the highest that was seen, the switch to it was undone, and the one before counts again.
        """
        with self._locked():
            if epoch == self._highest():
                self._write_epoch(epoch - 1)
            met = processes.end(self._run, lambda other: other == epoch, self._config.stop_seconds)
            return {**self._report(), "stopped": met}

    def status(self) -> dict[str, Any]:
        return self._report()

    def verify(self) -> dict[str, Any]:
        """Raises Failed unless one mode runs under one epoch, with all of its daemons listening."""
        report = self._report()
        kinds = {(each["mode"], each["epoch"]) for each in report["daemons"]}
        if len(kinds) != 1:
            raise Failed("no daemon runs" if not kinds else "daemons of several epochs run")
        ((mode, _),) = kinds
        up = {each["worker"] for each in report["daemons"] if each["listening"]}
        if missing := [daemon.worker for daemon in self._config.daemons(mode) if daemon.worker not in up]:
            raise Failed(f"{', '.join(missing)} does not listen")
        return report

    # --- How ---

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One change at a time. Raises Failed when another takes too long."""
        for folder in (self._run, self._config.log_dir):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        deadline = time.monotonic() + LOCK_SECONDS
        with (self._run / "lock").open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise Failed("another command is still at work here") from None
                    _require_a_reader()
                    time.sleep(processes.POLL_SECONDS)
            yield

    def _raise_epoch(self, epoch: int) -> None:
        """Whoever asks for an epoch of the past was overtaken by a later switch."""
        known = self._highest()
        if epoch < known:
            raise Refused(f"epoch {epoch} is of the past: this host has seen {known}")
        self._write_epoch(epoch)

    def _write_epoch(self, epoch: int) -> None:
        written = self._run / "epoch.new"
        written.write_text(str(epoch))
        written.replace(self._run / "epoch")

    def _highest(self) -> int:
        path = self._run / "epoch"
        return int(path.read_text()) if path.exists() else 0

    def _forget_meetings(self, epochs: set[int]) -> None:
        """Files of launches that are over. `torchrun` looks into its own as long as it lives."""
        for path in self._run.glob(f"{MEETING}*"):
            if int(path.name.split(".")[1]) not in epochs:
                path.unlink(missing_ok=True)

    def _start_missing(self, mode: str, epoch: int, wanted: tuple[Daemon, ...]) -> None:
        running = {each.worker for each in self._of(epoch)}
        started = {d.worker: self._launch(d, mode, epoch) for d in wanted if d.worker not in running}
        deadline = time.monotonic() + self._config.start_seconds
        while missing := [daemon for daemon in wanted if not self._listens(daemon, epoch)]:
            _require_a_reader()
            for daemon in missing:
                process = started.get(daemon.worker)
                if (process is not None and process.poll() is not None) or time.monotonic() > deadline:
                    raise Failed(self._why(daemon, process))
            time.sleep(processes.POLL_SECONDS)

    def _launch(self, daemon: Daemon, mode: str, epoch: int) -> subprocess.Popen[bytes]:
        command, environment = self._config.command(daemon, mode, epoch), self._config.environment(daemon)
        label = processes.tag(self._run, mode, epoch, daemon.worker)
        try:
            return processes.launch(command, environment, label, self._log(daemon), _CODE)
        except OSError as error:
            raise Failed(f"{daemon.worker} cannot be started: {error.strerror}") from None

    def _log(self, daemon: Daemon) -> Path:
        return self._config.log_dir / f"{daemon.worker}.log"

    def _of(self, epoch: int) -> list[processes.Tagged]:
        return [each for each in processes.find(self._run) if each.epoch == epoch]

    def _listens(self, daemon: Daemon, epoch: int) -> bool:
        own = [each for each in self._of(epoch) if each.worker == daemon.worker]
        return any(port == daemon.port for _, port in processes.listening(own))

    def _why(self, daemon: Daemon, process: subprocess.Popen[bytes] | None) -> str:
        code = process.poll() if process is not None else None
        how = "does not listen in time" if code is None else f"ended with status {code}"
        last = self._log(daemon).read_text(errors="replace")[-2000:].splitlines()[-LOG_LINES:]
        return f"{daemon.worker} {how}: {' | '.join(last)}"

    def _report(self) -> dict[str, Any]:
        """The daemons that run, and where their processes listen beside the daemon's port and loopback."""
        tagged = processes.find(self._run)
        kinds = sorted({(each.mode, each.epoch, each.worker) for each in tagged})
        daemons = [self._describe(kind, [e for e in tagged if (e.mode, e.epoch, e.worker) == kind]) for kind in kinds]
        return {"epoch": self._highest(), "daemons": daemons}

    def _describe(self, kind: tuple[str, int, str], own: list[processes.Tagged]) -> dict[str, Any]:
        mode, epoch, worker = kind
        ports = {d.port for d in (*self._config.individual, self._config.tensor_parallel) if d and d.worker == worker}
        sockets = processes.listening(own)
        exposed = sorted(f"{ip}:{port}" for ip, port in sockets if port not in ports and not ip.startswith(("127.", "::1")))
        return {
            "mode": mode, "epoch": epoch, "worker": worker, "pids": sorted(each.process.pid for each in own),
            "listening": any(port in ports for _, port in sockets), "exposed": exposed,
        }  # fmt: skip


def _require_a_reader() -> None:
    """Raises Failed when the SSH session is gone: nobody would learn how a launch ended, so it is undone at once."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        raise Failed("the line was cut")

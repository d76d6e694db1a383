"""What this host's daemons are, read from a TOML file of its own: only a mode and an epoch ever come over the network.

listen = "10.0.0.7"                     # the address that daemons listen on
models_dir = "/srv/models"
run_dir = "/var/lib/inference"          # the lock and the highest epoch; also what tells this host's daemons from others
log_dir = "/var/log/inference"
token_file = "/etc/inference/token"     # the DAEMON_TOKEN, readable by nobody else
kv_handover = "/dev/shm/inference"      # optional: where sessions wait while the mode changes
arguments = ["--threads", "8"]          # optional: further arguments of every daemon

[[individual]]                          # one a device
worker = "rack1-gpu0"
port = 9000
device = "cuda:0"

[tensor_parallel]
worker = "rack1-tp"
port = 9010
ranks = 2
environment = { NCCL_SOCKET_IFNAME = "lo" }
"""

from __future__ import annotations

import re
import stat
import sys
import time
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gpu_daemon.hostctl.errors import Refused

INDIVIDUAL, TENSOR_PARALLEL = MODES = ("individual", "tensor_parallel")
_WORKER = re.compile(r"[A-Za-z0-9_-]{1,63}")
MEETING = "meeting."  # files in the run directory where the ranks of one launch find each other, so that no port is open


@dataclass(frozen=True, slots=True)
class Daemon:
    """One worker: a process, or `ranks` of them under torchrun. `launcher` goes before `-m gpu_daemon`; empty is the usual."""

    worker: str
    port: int
    device: str = "auto"
    ranks: int = 1
    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    launcher: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class HostConfig:
    """`start_seconds` is how long a daemon may take until it listens, `stop_seconds` how long it may take to save and leave."""

    listen: str
    models_dir: str
    run_dir: Path
    log_dir: Path
    token_file: Path
    individual: tuple[Daemon, ...] = ()
    tensor_parallel: Daemon | None = None
    kv_handover: str = ""
    arguments: tuple[str, ...] = ()
    start_seconds: float = 25.0
    stop_seconds: float = 20.0

    def daemons(self, mode: str) -> tuple[Daemon, ...]:
        """Raises Refused for a mode this host does not have."""
        found = self.individual if mode == INDIVIDUAL else tuple(filter(None, [self.tensor_parallel]))
        if not found:
            raise Refused(f"this host has no {mode} mode")
        return found

    def command(self, daemon: Daemon, mode: str, epoch: int) -> list[str]:
        command = [*(daemon.launcher or self._launcher(daemon, mode, epoch)), "-m", "gpu_daemon"]
        command += ["--worker-id", daemon.worker, "--host", self.listen, "--port", str(daemon.port)]
        command += ["--models-dir", self.models_dir, "--device", daemon.device, "--epoch", str(epoch)]
        if self.kv_handover:
            command += ["--kv-handover", self.kv_handover]
        return [*command, *self.arguments, *daemon.arguments]

    def _launcher(self, daemon: Daemon, mode: str, epoch: int) -> list[str]:
        if mode == INDIVIDUAL:
            return [sys.executable]
        meeting = self.run_dir / f"{MEETING}{epoch}.{time.time_ns()}"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(daemon.ranks)]
        torchrun += ["--local-addr", "127.0.0.1", "--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file"]
        return [*torchrun, "--rdzv-endpoint", str(meeting)]

    def environment(self, daemon: Daemon) -> dict[str, str]:
        """What a daemon is given beside its tag: nothing of the session that asked for it but the path."""
        torchrun = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return {**torchrun, **daemon.environment, "DAEMON_TOKEN": self._token(), "PYTHONUNBUFFERED": "1"}

    def _token(self) -> str:
        try:
            if stat.S_IMODE(self.token_file.stat().st_mode) & 0o077:
                raise Refused("others can read the token file: chmod 600 it")
            return self.token_file.read_text().strip()
        except OSError as error:
            raise Refused(f"the token file cannot be read: {error.strerror}") from None


def read_config(path: Path) -> HostConfig:
    """Raises Refused, which names what is wrong."""
    try:
        given = tomllib.loads(path.read_text())
        paths: dict[str, Any] = {name: Path(given.pop(name)) for name in ("run_dir", "log_dir", "token_file")}
        individual = tuple(_daemon(entry) for entry in given.pop("individual", []))
        together = given.pop("tensor_parallel", None)
        arguments = tuple(given.pop("arguments", ()))
        config = HostConfig(
            **paths, **given, individual=individual, tensor_parallel=together and _daemon(together), arguments=arguments
        )
    except OSError as error:
        raise Refused(f"the configuration cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, TypeError, KeyError) as error:
        raise Refused(f"the configuration is wrong: {error}") from None
    _require_distinct(config)
    return config


def _daemon(entry: dict[str, Any]) -> Daemon:
    known = {each.name for each in fields(Daemon)}
    if unknown := set(entry) - known:
        raise Refused(f"the configuration is wrong: a daemon has no {', '.join(sorted(unknown))}")
    daemon = Daemon(**entry)
    if not _WORKER.fullmatch(daemon.worker):
        raise Refused("the configuration is wrong: a worker's name is letters, digits, dashes and underscores")
    return daemon


def _require_distinct(config: HostConfig) -> None:
    """Daemons of both modes run at once for a moment, so no two share a name or a port."""
    all_of_them = [*config.individual, *filter(None, [config.tensor_parallel])]
    for values in ([d.worker for d in all_of_them], [d.port for d in all_of_them]):
        if len(set(values)) < len(values):
            raise Refused("the configuration is wrong: two daemons share a worker name or a port")

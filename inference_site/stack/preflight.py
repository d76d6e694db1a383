"""What must hold before anything is started, each with one clear line when it does not."""

from __future__ import annotations

import fcntl
import shutil
import socket
from pathlib import Path
from typing import IO

from inference_site.stack.errors import StackError

STATE_BYTES = 300 << 20


def lock(folder: Path) -> IO[str]:
    """One stack per var/ folder. The lock lasts as long as the file object, and no longer than the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "up.lock").open("w")
    except OSError as error:
        raise StackError(f"cannot write to {folder}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise StackError("the stack already runs from this folder; stop it first, or set VAR_DIR to another") from None
    return file


def require_port(bind: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((bind, port))
        except OSError as error:
            raise StackError(f"port {port} is not free ({error.strerror}); set PORT to another") from None


def require_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < STATE_BYTES:
        raise StackError(f"the disk is too full: {STATE_BYTES >> 20} MiB are needed, {free >> 20} MiB are free")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

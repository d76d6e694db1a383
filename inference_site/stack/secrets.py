"""Secrets of the embedded stack: made once, kept in var/secrets, readable by their owner only."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def secret(folder: Path, name: str, prefix: str = "") -> str:
    """The secret `name`, made at first use."""
    path = folder / name
    if path.is_file():
        return path.read_text().strip()
    value = prefix + secrets.token_urlsafe(32)
    write_private(path, value)
    return value


def write_private(path: Path, text: str) -> None:
    """Writes a file of mode 0600, which at no moment is open to others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, 0o600)
        file.write(text + "\n")

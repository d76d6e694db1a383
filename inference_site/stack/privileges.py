"""Root is given up for the stores that refuse it."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path

# Reads and enters whatever the installation's folders allow, and owns nothing but its data.
SERVICE_USER = "nobody"
_SETPRIV = ("--clear-groups", "--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--")


def drop_root(command: list[str]) -> list[str]:
    """The command as an ordinary user; unchanged when we are not root."""
    if os.geteuid() != 0:
        return command
    user = pwd.getpwnam(SERVICE_USER)
    setpriv = shutil.which("setpriv") or "setpriv"
    return [setpriv, f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", *_SETPRIV, *command]


def give_to_service_user(path: Path) -> None:
    """Makes `path` the service user's, when we are root."""
    if os.geteuid() == 0:
        user = pwd.getpwnam(SERVICE_USER)
        os.chown(path, user.pw_uid, user.pw_gid)

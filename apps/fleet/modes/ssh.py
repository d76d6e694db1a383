"""The site's line to a host's hostctl: Fabric, one pinned key a host, one key of ours, and commands of fixed form.

A host that shows another key than the pinned one learns nothing: not even the name of our user is sent.
"""

from __future__ import annotations

import base64
import json
import re
import time
from dataclasses import dataclass
from typing import Any

import fabric
import paramiko
from django.conf import settings
from invoke.exceptions import CommandTimedOut

from apps.core.errors import InvalidRequest, Unavailable
from apps.fleet.models import HOST_ADDRESS, SSH_HOST_KEY, SSH_USER

CONNECT_SECONDS = 5.0
START_SECONDS = 50.0  # longer than hostctl takes at most by its defaults
OTHER_SECONDS = 30.0
KEEPALIVE_SECONDS = 5
TRIES = 3  # every command may be repeated, so a cut line is simply tried again
RETRY_SECONDS = 0.5
_EPOCH = "[0-9]{1,12}"
_START = f"start (?:individual|tensor_parallel) --epoch {_EPOCH}(?: --beside {_EPOCH})?"
_COMMAND = re.compile(f"status|verify|stop --epoch {_EPOCH}|{_START}")
_NOT_PINNED = ["rsa-sha2-256", "rsa-sha2-512", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"]


class HostError(Unavailable):
    """A host that cannot be reached over SSH, is not who it should be, or did not do what it was asked."""

    code = "host_failed"


@dataclass(frozen=True, slots=True)
class SshTarget:
    """Where and who a host is. Raises InvalidRequest for a value that could be read as anything else."""

    address: str
    port: int
    user: str
    host_key: str  # "ssh-ed25519 AAAA..."

    def __post_init__(self) -> None:
        shapes = {self.address: HOST_ADDRESS, self.user: SSH_USER, self.host_key: SSH_HOST_KEY}
        if not all(re.fullmatch(shape, value) for value, shape in shapes.items()) or not 0 < self.port < 65536:
            raise InvalidRequest("The host's address, SSH user or pinned key is not of the form that is allowed.")

    @property
    def key(self) -> paramiko.Ed25519Key:
        try:
            return paramiko.Ed25519Key(data=base64.b64decode(self.host_key.split()[1]))
        except paramiko.SSHException:
            raise InvalidRequest("The host's pinned key is none.") from None


def start(target: SshTarget, mode: str, epoch: int, beside: int = 0) -> dict[str, Any]:
    """Every daemon of the mode listens under the epoch. Raises HostError."""
    also = f" --beside {beside}" if beside else ""
    return call(target, f"start {mode} --epoch {epoch}{also}", START_SECONDS)


def stop(target: SshTarget, epoch: int) -> dict[str, Any]:
    """No daemon of the epoch is left. Raises HostError."""
    return call(target, f"stop --epoch {epoch}", OTHER_SECONDS)


def call(target: SshTarget, command: str, seconds: float) -> dict[str, Any]:
    """Has hostctl do it and returns what it answers. Blocks. Raises InvalidRequest for what is no command, and HostError."""
    if not _COMMAND.fullmatch(command):
        raise InvalidRequest("This is no command for a host.")
    for left in reversed(range(TRIES)):
        try:
            return _answer(*_run(target, command, seconds))
        except HostError as error:
            if not left or error.code not in ("ssh_unreachable", "ssh_cut"):
                raise
            time.sleep(RETRY_SECONDS)
    raise AssertionError("unreachable")


def _run(target: SshTarget, command: str, seconds: float) -> tuple[int, str]:
    try:
        with _connect(target) as connection:
            done = connection.run(command, hide=True, warn=True, in_stream=False, timeout=seconds)
    except CommandTimedOut:
        raise HostError("the command took too long", code="ssh_timeout") from None
    except (paramiko.SSHException, OSError, EOFError) as error:
        raise HostError(f"the line to the host was cut: {type(error).__name__}", code="ssh_cut") from None
    return done.exited, done.stdout


def _connect(target: SshTarget) -> fabric.Connection:
    """Authenticated, to the host with the pinned key."""
    connection = fabric.Connection(
        target.address, user=target.user, port=target.port, config=_config(), forward_agent=False,
        connect_timeout=CONNECT_SECONDS, connect_kwargs=_credentials(),
    )  # fmt: skip
    known = connection.client.get_host_keys()
    name = target.address if target.port == 22 else f"[{target.address}]:{target.port}"
    known.add(name, "ssh-ed25519", target.key)
    connection.client.set_missing_host_key_policy(paramiko.RejectPolicy())
    try:
        connection.open()
    except (paramiko.SSHException, OSError, EOFError) as error:
        connection.client.close()
        raise _refusal(error) from None
    connection.transport.set_keepalive(KEEPALIVE_SECONDS)
    return connection


def _refusal(error: Exception) -> HostError:
    if isinstance(error, paramiko.BadHostKeyException):
        return HostError("the host shows another key than the pinned one", code="ssh_wrong_key")
    if isinstance(error, paramiko.AuthenticationException):
        return HostError("the host refuses our key", code="ssh_auth_refused")
    return HostError(f"the host cannot be reached over SSH: {type(error).__name__}", code="ssh_unreachable")


def _config() -> fabric.Config:
    """Fabric's own defaults and nothing from this machine: no ssh_config, no fabric.yml."""
    return fabric.Config(lazy=True, overrides={"load_ssh_configs": False})


def _credentials() -> dict[str, Any]:
    key = settings.ENV.fleet_ssh_key
    if key is None or not key.is_file():
        raise HostError("FLEET_SSH_KEY names no private key", code="ssh_no_key")
    return {
        "key_filename": str(key), "allow_agent": False, "look_for_keys": False, "disabled_algorithms": {"keys": _NOT_PINNED},
        "banner_timeout": CONNECT_SECONDS, "auth_timeout": CONNECT_SECONDS,
    }  # fmt: skip


def _answer(status: int, output: str) -> dict[str, Any]:
    """hostctl's JSON. What a host says is not believed further than its type, and made fit for a page."""
    try:
        answer = json.loads(output)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise HostError("the host's answer is not hostctl's", code="ssh_cut" if status < 0 else "host_nonsense")
    if status or answer.get("ok") is not True:
        reason = "".join(filter(str.isprintable, str(answer.get("error", "no reason given"))))[:300]
        raise HostError(reason, code="host_refused" if status == 2 else "host_failed")
    return answer

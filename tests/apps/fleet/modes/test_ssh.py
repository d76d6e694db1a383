"""The line to a host, over a real sshd: who is believed, what is sent, and what comes back when it does not go well."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from pathlib import Path

import paramiko
import pytest
from django.conf import settings
from paramiko.common import MSG_KEXINIT, MSG_SERVICE_REQUEST

from apps.core.errors import InvalidRequest
from apps.fleet.modes import ssh
from apps.fleet.modes.ssh import HostError, SshTarget
from tests.apps.fleet.modes.host import SshHost, make_key

HOSTILE = [
    "a;id", "$(id)", "`id`", "a\nb", "a b", "'", '"', "-oProxyCommand=id", "--", "", "a\x00", "\u00e4", "\u0430", "../x", "a|b",
    "a&b", "{a,b}", "user@host", "host:22", "%h", "~", "*", "a" * 300, "host\n",
]  # fmt: skip
NO_COMMANDS = ["status; id", "status\n", "stop --epoch 1 && id", "start tensor --epoch 1", "stop --epoch \u0661"]


@pytest.fixture
def target(host: SshHost) -> SshTarget:
    return SshTarget("127.0.0.1", host.port, "root", host.host_key)


def test_a_host_answers_and_only_its_forced_command_runs(host: SshHost, target: SshTarget) -> None:
    assert ssh.call(target, "status", 20) == {"ok": True, "epoch": 0, "daemons": []}
    with pytest.raises(HostError, match="no daemon runs"):
        ssh.call(target, "verify", 20)


@pytest.mark.parametrize("part", ["address", "user", "host_key"])
@pytest.mark.parametrize("value", HOSTILE)
def test_no_part_of_a_target_can_be_read_as_anything_else(part: str, value: str) -> None:
    whole = SshTarget("rack1.example", 22, "inference", "ssh-ed25519 " + "A" * 68)
    with pytest.raises(InvalidRequest):
        dataclasses.replace(whole, **{part: value})


@pytest.mark.parametrize("value", [*HOSTILE, *NO_COMMANDS])
def test_what_is_no_command_is_not_sent(host: SshHost, target: SshTarget, value: str) -> None:
    with pytest.raises(InvalidRequest):
        ssh.call(target, value, 1)
    assert "Connection from" not in host.log


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        (("individual", 7), "start individual --epoch 7"),
        (("tensor_parallel", 8, 7), "start tensor_parallel --epoch 8 --beside 7"),
        *[((value, 1), None) for value in HOSTILE],
    ],
)
def test_the_remote_words_are_the_intended_bytes_or_none(host: SshHost, target: SshTarget, arguments, sent) -> None:
    """The forced command writes what sshd gives it, to the byte."""
    keys = host.folder / "authorized_keys"
    public = keys.read_text().split('" ', 1)[1]
    keys.write_text(f'restrict,command="printf %s \\"$SSH_ORIGINAL_COMMAND\\" > {host.folder}/sent; echo {{}}" {public}')
    with pytest.raises((HostError, InvalidRequest)):
        ssh.start(target, *arguments)
    path = host.folder / "sent"
    assert (path.read_bytes() if path.exists() else None) == (sent and sent.encode())


def test_a_host_with_another_key_learns_nothing(target: SshTarget, tmp_path: Path) -> None:
    """A listener that goes through the key exchange with another key and would let anybody in."""
    make_key(tmp_path / "other")
    heard: list[int] = []

    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        transport = paramiko.Transport(connection)
        read = transport.packetizer.read_message

        def record() -> tuple[int, paramiko.Message]:
            kind, message = read()
            heard.append(kind)
            return kind, message

        transport.packetizer.read_message = record
        transport.add_server_key(paramiko.Ed25519Key(filename=str(tmp_path / "other")))
        transport.start_server(event=threading.Event(), server=paramiko.ServerInterface())
        transport.join(10)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        with pytest.raises(HostError) as raised:
            ssh.call(dataclasses.replace(target, port=server.getsockname()[1]), "status", 5)
        thread.join()
    assert raised.value.code == "ssh_wrong_key"
    assert heard[0] == MSG_KEXINIT
    assert not {MSG_SERVICE_REQUEST, *range(50, 128)} & set(heard), "no service, no user, no channel was asked for"


def test_our_key_refused_is_said_and_no_other_is_tried(host: SshHost, target: SshTarget, tmp_path: Path, monkeypatch) -> None:
    make_key(tmp_path / "stranger")
    monkeypatch.setattr(settings, "ENV", settings.ENV.model_copy(update={"fleet_ssh_key": tmp_path / "stranger"}))
    with pytest.raises(HostError) as raised:
        ssh.call(target, "status", 5)
    assert raised.value.code == "ssh_auth_refused"
    assert host.log.count("Failed publickey") <= 1
    monkeypatch.setattr(settings, "ENV", settings.ENV.model_copy(update={"fleet_ssh_key": None}))
    with pytest.raises(HostError, match="no private key"):
        ssh.call(target, "status", 5)


def test_a_host_that_is_not_there_is_tried_again_and_then_said(host: SshHost, target: SshTarget, monkeypatch) -> None:
    monkeypatch.setattr(ssh, "RETRY_SECONDS", 0.6)
    host.stop()
    with pytest.raises(HostError) as raised:
        ssh.call(target, "status", 5)
    assert raised.value.code == "ssh_unreachable"
    threading.Timer(0.5, host.start).start()
    assert ssh.call(target, "status", 20)["ok"] is True


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # paramiko's own thread, when it is cut
def test_a_command_that_hangs_ends_in_time_and_one_that_is_cut_is_sent_again(host: SshHost, target: SshTarget) -> None:
    keys = host.folder / "authorized_keys"
    public = keys.read_text().split('" ', 1)[1]
    keys.write_text(f'restrict,command="sleep 60" {public}')
    began = time.monotonic()
    with pytest.raises(HostError) as raised:
        ssh.call(target, "status", 1)
    assert (raised.value.code, time.monotonic() - began < 5) == ("ssh_timeout", True)
    keys.write_text(f'restrict,command="test -e {host.folder}/second && echo \'{{\\"ok\\": true}}\' || '
                    f'{{ touch {host.folder}/second; sleep 60; }}" {public}')  # fmt: skip

    def cut() -> None:
        while not (host.folder / "second").exists():
            time.sleep(0.02)
        host.cut()

    thread = threading.Thread(target=cut)
    thread.start()
    assert ssh.call(target, "status", 20) == {"ok": True}
    thread.join()


@pytest.mark.parametrize("said", ["", "hello", "[1]", '{"ok": 1}', '{"ok": false, "error": "\\u001b[31mx"}', "{" * 1000])
def test_a_host_that_talks_nonsense_is_not_believed(host: SshHost, target: SshTarget, said: str) -> None:
    (host.folder / "said").write_text(said)
    keys = host.folder / "authorized_keys"
    keys.write_text(f'restrict,command="cat {host.folder}/said" {keys.read_text().split(chr(34) + " ", 1)[1]}')
    with pytest.raises(HostError) as raised:
        ssh.call(target, "status", 5)
    assert raised.value.message.isprintable()

"""The wire under TLS: both ends show a certificate of the same authority, or no word is exchanged."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
from django.conf import settings

from apps.fleet.daemon_client import DaemonClient, DaemonError
from gpu_daemon.__main__ import serve
from gpu_daemon.config import DaemonConfig, from_arguments
from tests.services import free_port

TOKEN = "t" * 32


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def authority(folder: Path) -> Path:
    """An authority, and what it signed for the daemon at 127.0.0.1 and for the site: as docs/deploy.md makes them."""
    folder.mkdir()
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")  # gRPC takes no ed25519 here
    _openssl(folder, "req", "-x509", *key, "-days", "2", "-subj", "/CN=fleet",
             "-keyout", "ca.key", "-out", "ca.pem")  # fmt: skip
    for name in ("daemon", "site"):
        _openssl(folder, "req", *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", "csr")
        (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
        _openssl(folder, "x509", "-req", "-in", "csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2",
                 "-extfile", "names", "-out", f"{name}.pem")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    return authority(tmp_path_factory.mktemp("tls") / "ours")


@asynccontextmanager
async def daemon(tls: Path, tmp_path: Path) -> AsyncIterator[str]:
    config = DaemonConfig("w", "127.0.0.1", free_port(), tmp_path, TOKEN, drain_seconds=0.1, tls_cert=tls / "daemon.pem",
                          tls_key=tls / "daemon.key", tls_ca=tls / "ca.pem")  # fmt: skip
    stop = asyncio.Event()
    task = asyncio.create_task(serve(config, stop))
    try:
        yield f"127.0.0.1:{config.port}"
    finally:
        stop.set()
        await asyncio.wait_for(task, 20)


async def name_of(address: str, monkeypatch, **files: Path | None) -> str:
    monkeypatch.setattr(settings, "ENV", settings.ENV.model_copy(update=files))
    client = DaemonClient(address, TOKEN)
    try:
        async with asyncio.timeout(10), aclosing(client.watch_status(100)) as statuses:
            return (await anext(statuses)).worker_id
    finally:
        await client.close()


async def test_both_ends_show_a_certificate_of_the_same_authority(ours: Path, tmp_path: Path, monkeypatch) -> None:
    strangers = authority(tmp_path / "strangers")
    site = {"daemon_ca": ours / "ca.pem", "daemon_cert": ours / "site.pem", "daemon_key": ours / "site.key"}
    async with daemon(ours, tmp_path) as address:
        assert await name_of(address, monkeypatch, **site) == "w"
        for wrong in (
            {"daemon_ca": None},
            {"daemon_cert": None, "daemon_key": None},
            {"daemon_cert": strangers / "site.pem", "daemon_key": strangers / "site.key"},
            {"daemon_ca": strangers / "ca.pem"},
        ):
            with pytest.raises(DaemonError, match="unavailable"):
                await name_of(address, monkeypatch, **{**site, **wrong})
        with pytest.raises(DaemonError, match="No such file"):
            await name_of(address, monkeypatch, **{**site, "daemon_ca": tmp_path / "none"})


def test_a_daemon_takes_all_three_files_or_none(ours: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("DAEMON_TOKEN", TOKEN)
    base = ["--worker-id", "w", "--port", "1", "--models-dir", "."]
    assert from_arguments(base).tls_cert is None
    for wrong in (["--tls-cert", str(ours / "daemon.pem")], ["--tls-cert", "x", "--tls-key", "y", "--tls-ca", "z"]):
        with pytest.raises(SystemExit):
            from_arguments([*base, *wrong])
        assert "go together" in capsys.readouterr().err

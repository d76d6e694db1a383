"""A host to switch: a real sshd on loopback, whose forced command is the real hostctl, which starts real daemons."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as bpe

from apps.fleet.models import Host, Modality, Model
from apps.fleet.services import host_add, worker_add
from gpu_daemon.hostctl import processes
from tests.gpu_daemon.conftest import make_tiny
from tests.services import ROOT, free_port

TINY = "tiny"
LIGHT = [sys.executable, "-m", "tests.apps.fleet.modes.light"]


def make_model(models: Path) -> None:
    """A tiny Qwen3 with a tokenizer of bytes."""
    make_tiny(models / TINY, "qwen3")
    alphabet = ["<eos>", "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(bpe.BPE(vocab={character: place for place, character in enumerate(alphabet)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<bos>"])
    tokenizer.save(str(models / TINY / "tokenizer.json"))
    (models / TINY / "tokenizer_config.json").write_text("{}")


def make_key(path: Path) -> str:
    """A new private key at `path`; returns its public line without the comment."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


@dataclass
class SshHost:
    """`start` and `stop` are sshd's; the daemons it started live on, as they do. Light ones compute by arithmetic."""

    folder: Path
    models: Path
    token: str
    workers: int = 1
    light: bool = False

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.port = free_port()
        self.ports = [free_port() for _ in range(self.workers + 1)]
        self.host_key = make_key(self.folder / "host_key")
        self.client_key = self.folder / "client_key"
        public = make_key(self.client_key)
        command = f"cd {ROOT} && exec {sys.executable} -m gpu_daemon.hostctl --config {self.config}"
        (self.folder / "authorized_keys").write_text(f'restrict,command="{command}" {public}\n')
        self._write_config()
        self._sshd: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Path:
        return self.folder / "host.toml"

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def log(self) -> str:
        return (self.folder / "sshd.log").read_text()

    def _write_config(self) -> None:
        token = self.folder / "token"
        token.write_text(self.token)
        token.chmod(0o600)
        common = {"listen": "127.0.0.1", "models_dir": str(self.models), "run_dir": str(self.run_dir),
                  "log_dir": str(self.folder / "log"), "token_file": str(token), "start_seconds": 25 if self.light else 60,
                  "kv_handover": str(self.folder / "kv") * (not self.light),
                  "arguments": ["--threads", "1", "--device", "cpu", "--max-model-len", "512"]}  # fmt: skip
        lines = [f"{name} = {json.dumps(value)}" for name, value in common.items()]
        for place in range(self.workers):
            lines += ["[[individual]]", f'worker = "{self.name(place)}"', f"port = {self.ports[place]}"]
            lines += [f"launcher = {json.dumps(LIGHT)}"] * self.light
        lines += ["[tensor_parallel]", f'worker = "{self.together}"', f"port = {self.ports[-1]}", "ranks = 2"]
        self.config.write_text("\n".join(lines) + "\n")
        if self.light:
            self.together_by(*LIGHT, "tensor_parallel")

    def name(self, place: int) -> str:
        return f"{self.folder.name}-gpu{place}"

    @property
    def together(self) -> str:
        return f"{self.folder.name}-tp"

    def together_by(self, *launcher: str) -> None:
        """What its configuration starts the tensor parallel daemon by, from now on."""
        text = re.sub(r"(\[tensor_parallel\]\n.*\n.*\n).*", rf"\1launcher = {json.dumps(launcher)}", self.config.read_text())
        self.config.write_text(text)

    # --- sshd ---

    def start(self) -> None:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        settings = [
            f"Port {self.port}", "ListenAddress 127.0.0.1", f"HostKey {self.folder}/host_key", "PidFile none", "UsePAM no",
            f"AuthorizedKeysFile {self.folder}/authorized_keys", "StrictModes no", "PasswordAuthentication no",
            "PermitRootLogin forced-commands-only", "LogLevel VERBOSE",
        ]  # fmt: skip
        path = self.folder / "sshd_config"
        path.write_text("\n".join(settings) + "\n")
        with (self.folder / "sshd.log").open("ab") as output:
            command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(path)]
            self._sshd = subprocess.Popen(command, stdout=output, stderr=output)
        deadline = time.monotonic() + 5
        while "Server listening" not in self.log:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def cut(self) -> None:
        """Ends every session that is open, as a network does."""
        with suppress(psutil.Error):
            for session in psutil.Process(self._sshd.pid).children(recursive=True):
                if session.name().startswith("sshd"):
                    session.kill()

    def stop(self) -> None:
        if self._sshd is not None:
            self.cut()
            self._sshd.terminate()
            self._sshd.wait(5)
            self._sshd = None

    def end(self) -> None:
        self.stop()
        processes.end(self.run_dir, lambda _: True, 0)

    # --- The site's record and the host's truth ---

    def add(self) -> Host:
        """The host as the site knows it, with the model placed on every worker."""
        Model.objects.get_or_create(
            name=TINY, defaults={"title": TINY, "modality": Modality.TEXT, "parameters": 1, "weight_bytes": 1,
                                 "context_length": 512, "published_at": "2026-01-01"},
        )  # fmt: skip
        host = host_add(
            name=self.folder.name, address="127.0.0.1", ssh_host_key=self.host_key, ssh_user="root", ssh_port=self.port
        )
        for place in range(self.workers):
            worker_add(name=self.name(place), host=host, port=self.ports[place], models=[TINY])
        worker_add(name=self.together, host=host, port=self.ports[-1], models=[TINY], mode="tensor_parallel")
        return host

    def living(self) -> set[tuple[str, int]]:
        """(mode, epoch) of every process on the host that hostctl's daemons are made of."""
        return {(each.mode, each.epoch) for each in processes.find(self.run_dir)}

    def kill(self, worker: str) -> None:
        for each in processes.find(self.run_dir):
            if each.worker == worker:
                each.process.kill()

"""The daemon's configuration: read once, from arguments and the environment (DAEMON_TOKEN, and what torchrun sets)."""

from __future__ import annotations

import argparse
import os
import stat
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Place:
    """Where torchrun has put this process: `rank` of `ranks` in all, `local_rank` of `local_ranks` on this host. The ranks
    meet at `store` (address, port), which torchrun serves when `hosted`, else rank 0."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int = 1
    store: tuple[str, int] = ("127.0.0.1", 0)
    hosted: bool = False


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """`max_sequences` run at once; `step_tokens` is a step's budget; `memory_bytes` is what models may use of the device,
    `kv_bytes` caps the KV cache of one there; host memory keeps `host_kv_bytes` of KV and `host_weights_bytes` of models
    that were unloaded; 0 is a share of the free memory; `static_window_ms` is how long a static batch gathers;
    `kv_handover` is where KV waits for the next daemon, None nowhere."""

    worker_id: str
    host: str
    port: int
    models_dir: Path
    token: str
    device: str = "auto"
    epoch: int = 1
    threads: int = 0
    max_sequences: int = 32
    max_model_len: int = 8192
    step_tokens: int = 512
    memory_bytes: int = 0
    kv_bytes: int = 0
    host_kv_bytes: int = 0
    host_weights_bytes: int = 0
    int8: bool = False
    static_window_ms: int = 20
    drain_seconds: float = 8.0
    preload: tuple[str, ...] = ()
    kv_handover: Path | None = None
    place: Place = Place()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None


def from_arguments(arguments: list[str]) -> DaemonConfig:
    """Exits with a line that says what is missing."""
    parser = argparse.ArgumentParser(prog="python -m gpu_daemon", description="Serves models on one device over gRPC.")
    parser.add_argument("--worker-id", required=True, help="this worker's name in the site's fleet")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--models-dir", type=Path, required=True, help="folder with one folder per model")
    parser.add_argument("--device", default="auto", help="cpu, cuda:N, or auto")
    parser.add_argument("--epoch", type=int, default=1, help="calls of another epoch are refused")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 is one a physical core, shared by the ranks")
    parser.add_argument("--max-sequences", type=int, default=32, help="sequences that run at once")
    parser.add_argument("--max-model-len", type=int, default=8192, help="longest sequence, in tokens")
    parser.add_argument("--step-tokens", type=int, default=512, help="token budget of one step")
    parser.add_argument(
        "--memory-bytes", type=int, default=0, help="what models may use of the device; 0 is a GPU's memory, half of a CPU's"
    )
    parser.add_argument(
        "--kv-bytes", type=int, default=0, help="cap of a model's KV cache on the device; 0 is a quarter of the device's"
    )
    parser.add_argument(
        "--host-weights-bytes", type=int, default=0,
        help="cap of unloaded models kept in host memory; 0 is a quarter of the free, below 0 is none",
    )  # fmt: skip
    parser.add_argument(
        "--host-kv-bytes", type=int, default=0, help="cap of the KV kept in host memory; 0 is a quarter of the free"
    )
    parser.add_argument(
        "--kv-handover",
        type=Path,
        help="folder, best on tmpfs, in which KV outlives this process for the next one, in any mode",
    )
    parser.add_argument("--int8", action="store_true", help="keep weights as int8 on a CPU: faster, a little less exact")
    parser.add_argument(
        "--static-window-ms", type=int, default=20, help="how long a batch gathers, for models of the static engine"
    )
    parser.add_argument("--preload", nargs="*", default=[], help="models to load at once")
    parser.add_argument("--tls-cert", type=Path, help="certificate chain to show; without it the wire is not encrypted")
    parser.add_argument("--tls-key", type=Path, help="its private key")
    parser.add_argument("--tls-ca", type=Path, help="who must have signed the site's certificate")
    given = vars(parser.parse_args(arguments))
    token = os.environ.get("DAEMON_TOKEN", "")
    if len(token) < 16:
        parser.error("set DAEMON_TOKEN to the secret of at least 16 characters that the site uses")
    tls = [given["tls_cert"], given["tls_key"], given["tls_ca"]]
    if any(tls) and not all(path is not None and path.is_file() for path in tls):
        parser.error("--tls-cert, --tls-key and --tls-ca are files, and go together")
    place = _place()
    if place.ranks > 1 and given["device"] not in ("auto", "cpu"):
        parser.error("under torchrun every rank takes a GPU of its own: --device is auto or cpu")
    if given["kv_handover"] and not _private(given["kv_handover"]):
        parser.error(f"--kv-handover {given['kv_handover']} must be a folder of yours that is closed to others (chmod 700)")
    return DaemonConfig(**{**given, "preload": tuple(given["preload"])}, token=token, place=place)


def _place() -> Place:
    """Alone, unless torchrun started this process."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" not in environment:
        return Place()
    return Place(
        rank=int(environment["RANK"]),
        ranks=int(environment["WORLD_SIZE"]),
        local_rank=int(environment["LOCAL_RANK"]),
        local_ranks=int(environment["LOCAL_WORLD_SIZE"]),
        store=(environment["MASTER_ADDR"], int(environment["MASTER_PORT"])),
        hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _private(folder: Path) -> bool:
    """Makes the folder if there is none; whether it is ours alone."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077

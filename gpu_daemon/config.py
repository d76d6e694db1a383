"""The daemon's configuration: read once, from arguments and two environment variables."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """`max_sequences` run at once; `step_tokens` is a step's budget; `kv_bytes` caps the KV cache on the device and
    `host_kv_bytes` what host memory keeps of it, 0 is a share of the free memory; `static_window_ms` is how long a
    static batch gathers."""

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
    kv_bytes: int = 0
    host_kv_bytes: int = 0
    int8: bool = False
    static_window_ms: int = 20
    drain_seconds: float = 8.0
    preload: tuple[str, ...] = ()
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
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 is one a physical core")
    parser.add_argument("--max-sequences", type=int, default=32, help="sequences that run at once")
    parser.add_argument("--max-model-len", type=int, default=8192, help="longest sequence, in tokens")
    parser.add_argument("--step-tokens", type=int, default=512, help="token budget of one step")
    parser.add_argument(
        "--kv-bytes", type=int, default=0, help="cap of a model's KV cache on the device; 0 is a share of what is free"
    )
    parser.add_argument(
        "--host-kv-bytes", type=int, default=0, help="cap of the KV kept in host memory; 0 is a quarter of the free"
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
    return DaemonConfig(**{**given, "preload": tuple(given["preload"])}, token=token)

"""`python -m tests.bench.compare vllm --venv DIR`: this project and a peer in turn, same weights, medians and their ratio.

Peers are installed by hand, each into a virtual environment of its own (docs/benchmarks.md says how). Only one server runs
at a time. Each round starts each side anew and measures every number of streams.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from tests.bench.__main__ import ROOT, measure, own_stack
from tests.bench.load import Result, Target

_START_SECONDS = 300
_PORT = 8101


@dataclass(frozen=True)
class Peer:
    """How a server is started. `{model}` and `{port}` are filled in; `served_as` is the name its clients use."""

    command: tuple[str, ...]
    served_as: str
    environment: dict[str, str]
    ignores_eos: bool = True


PEERS = {
    "vllm": Peer(
        ("vllm", "serve", "{model}", "--served-model-name", "smol", "--dtype", "bfloat16", "--max-model-len", "4096",
         "--port", "{port}"),
        served_as="smol",
        environment={"VLLM_CPU_KVCACHE_SPACE": "4", "HF_HUB_OFFLINE": "1"},
    ),
    "transformers": Peer(
        ("transformers", "serve", "{model}", "--continuous-batching", "--dtype", "bfloat16", "--port", "{port}"),
        served_as="{model}",
        environment={"HF_HUB_OFFLINE": "1"},
        ignores_eos=False,
    ),
}  # fmt: skip


@contextmanager
def peer_server(peer: Peer, venv: Path, model: Path) -> Iterator[Target]:
    """The peer on a loopback port, stopped with all its processes at the end."""
    words = [word.format(model=model, port=_PORT) for word in peer.command]
    log = (ROOT / "var" / "log" / "peer.log").open("w")
    environment = {**os.environ, **peer.environment, "PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}
    server = subprocess.Popen(
        [str(venv / "bin" / words[0]), *words[1:]], env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        _wait_until_up(server)
        extra = {"ignore_eos": True} if peer.ignores_eos else {}
        yield Target(f"http://127.0.0.1:{_PORT}/v1", peer.served_as.format(model=model), "none", extra)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def _wait_until_up(server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{_PORT}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise SystemExit("the peer did not start; see var/log/peer.log")


def rounds(sides: dict[str, AbstractContextManager[Target]], streams: list[int], max_tokens: int) -> dict[str, list[Result]]:
    """One round: each side once."""
    results = {}
    for name, side in sides.items():
        with side as target:
            results[name] = measure(target, streams, max_tokens)
    return results


def table(peer: str, streams: list[int], collected: list[dict[str, list[Result]]]) -> Table:
    drawn = Table(title=f"medians of {len(collected)} rounds, in turn")
    speeds_and_firsts = ("ours, tokens/s", f"{peer}, tokens/s", "ratio", "ours, first token p50", f"{peer}, first token p50")
    for column in ("streams", *speeds_and_firsts):
        drawn.add_column(column, justify="right")
    for i, count in enumerate(streams):
        speeds = {name: statistics.median(r[name][i].tokens_per_second for r in collected) for name in ("ours", peer)}
        firsts = {name: statistics.median(r[name][i].ttft_ms(0.5) for r in collected) for name in ("ours", peer)}
        drawn.add_row(
            str(count), f"{speeds['ours']:.1f}", f"{speeds[peer]:.1f}", f"{speeds['ours'] / speeds[peer]:.2f}",
            f"{firsts['ours']:.0f} ms", f"{firsts[peer]:.0f} ms",
        )  # fmt: skip
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.compare", description=__doc__)
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("--venv", type=Path, required=True, help="the virtual environment the peer is installed in")
    parser.add_argument("--model-dir", type=Path, default=ROOT / "var" / "models" / "smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    console, collected = Console(), []
    for _ in range(args.rounds):
        sides = {"ours": own_stack(), args.peer: peer_server(PEERS[args.peer], args.venv, args.model_dir)}
        collected.append(rounds(sides, args.streams, args.max_tokens))
        console.print(table(args.peer, args.streams, collected))


if __name__ == "__main__":
    main()

"""`make bench`: output tokens/s and time to first token through HTTP at 1, 8 and 32 streams.

Starts the whole stack, unless --base-url names a server that is already there: ours, or a peer with the same weights.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from tests.bench.load import Result, Target, run

ROOT = Path(__file__).resolve().parents[2]
REQUESTS_PER_STREAM = 2


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def own_stack() -> Iterator[Target]:
    """The whole stack on a free port, stopped again at the end. Its own output goes to var/log/bench.log."""
    port, key = _free_port(), "sk-" + os.urandom(24).hex()
    log = ROOT / "var" / "log" / "bench.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        stack = subprocess.Popen(
            [sys.executable, "manage.py", "up"],
            cwd=ROOT,
            env={**os.environ, "PORT": str(port), "INFERENCE_BOOTSTRAP_KEY": key, "METRICS_TOKEN": key},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}/readyz", stack, log)
        yield Target(f"http://127.0.0.1:{port}/v1", "smollm2-135m", key)
    finally:
        stack.send_signal(signal.SIGTERM)
        stack.wait(timeout=30)


def _wait_until_ready(url: str, stack: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if stack.poll() is not None:
            raise SystemExit(f"the stack did not start; see {log.relative_to(ROOT)}")
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"the stack was not ready in 300 s; see {log.relative_to(ROOT)}")


def measure(target: Target, concurrencies: list[int], max_tokens: int) -> list[Result]:
    asyncio.run(run(target, concurrency=1, requests=1, max_tokens=8, seed=99))  # warm
    return [
        asyncio.run(run(target, concurrency=c, requests=max(2, REQUESTS_PER_STREAM * c), max_tokens=max_tokens))
        for c in concurrencies
    ]


def forward_share(target: Target) -> float:
    """The share of the engine's last busy seconds inside the forward pass, as /metrics tells it, after 8 steady streams."""
    asyncio.run(run(target, concurrency=8, requests=16, max_tokens=128, seed=7))
    url, headers = f"{target.base_url.removesuffix('/v1')}/metrics", {"Authorization": f"Bearer {target.api_key}"}
    lines = httpx.get(url, headers=headers, timeout=10).text.splitlines()
    return float(next(line for line in lines if line.startswith("inference:engine_forward_share{")).split()[-1])


def table(title: str, results: list[Result]) -> Table:
    drawn = Table(title=title)
    for column in ("streams", "output tokens/s", "time to first token p50", "p99", "time per token p50"):
        drawn.add_column(column, justify="right")
    for result in results:
        drawn.add_row(
            str(result.concurrency),
            f"{result.tokens_per_second:.1f}",
            f"{result.ttft_ms(0.5):.0f} ms",
            f"{result.ttft_ms(0.99):.0f} ms",
            f"{result.time_per_token_ms():.1f} ms",
        )
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--base-url", help="measure this server, such as http://127.0.0.1:8101/v1")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--key", default="none", help="the API key for --base-url")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--no-ignore-eos", action="store_true", help="for servers that refuse the field")
    args = parser.parse_args()
    console = Console()
    if args.base_url:
        extra = {} if args.no_ignore_eos else {"ignore_eos": True}
        results = measure(Target(args.base_url, args.model, args.key, extra), args.streams, args.max_tokens)
    else:
        with own_stack() as target:
            results = measure(target, args.streams, args.max_tokens)
            console.print(f"8 streams, steady: {forward_share(target):.1%} of the engine's time inside the forward pass")
    console.print(table(f"{args.model}, {args.max_tokens} tokens a request", results))


if __name__ == "__main__":
    main()

"""`python -m tests.bench.static`: continuous batching against static, on one started stack, in turn.

Two tables: eight streams whose answers are 16 to 256 tokens long, where a static batch waits for its longest; and equal answers
at 1, 8 and 32 streams. Static at one stream is also what serving without any batching gives at every number of streams.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from operator import attrgetter

import httpx
from rich.console import Console
from rich.table import Table

from tests.bench.__main__ import ROOT, own_stack
from tests.bench.load import Result, Target, run

ENGINES = ("static", "continuous")
_RELOAD_SECONDS = 120


def switch(target: Target, engine: str) -> None:
    """Has the model run by another engine, and waits until it answers."""
    command = [sys.executable, "manage.py", "models", "engine", target.model, engine]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    time.sleep(5)  # the controller looks every 2 s
    deadline = time.monotonic() + _RELOAD_SECONDS
    body = {"model": target.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    headers = {"Authorization": f"Bearer {target.api_key}"}
    while time.monotonic() < deadline:
        answer = httpx.post(f"{target.base_url}/chat/completions", json=body, headers=headers, timeout=60)
        if answer.status_code == 200:
            return
        time.sleep(1)
    raise SystemExit(f"{target.model} does not answer with the {engine} engine")


def in_turn(target: Target, rounds: int, work: Callable[[], Result]) -> dict[str, Result]:
    """The median of each engine's runs by tokens/s, engines in turn."""
    results: dict[str, list[Result]] = {engine: [] for engine in ENGINES}
    for _ in range(rounds):
        for engine in ENGINES:
            switch(target, engine)
            results[engine].append(work())
    return {engine: sorted(runs, key=attrgetter("tokens_per_second"))[len(runs) // 2] for engine, runs in results.items()}


def row(table: Table, name: str, results: dict[str, Result]) -> None:
    static, continuous = (results[engine] for engine in ENGINES)
    table.add_row(
        name, f"{static.tokens_per_second:.1f}", f"{continuous.tokens_per_second:.1f}",
        f"{continuous.tokens_per_second / static.tokens_per_second:.2f}",
        f"{static.ttft_ms(0.5):.0f} ms", f"{continuous.ttft_ms(0.5):.0f} ms",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.static", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=4, help="a stream, of mixed lengths")
    args = parser.parse_args()
    table = Table(title=f"medians of {args.rounds}")
    for column in ("work", "static, tokens/s", "continuous, tokens/s", "ratio", "static, first token p50", "continuous"):
        table.add_column(column, justify="right")
    with own_stack() as target:
        mixed = {"concurrency": 8, "requests": 8 * args.requests, "max_tokens": 256, "shortest": 16}
        row(table, "8 streams, 16-256", in_turn(target, args.rounds, lambda: asyncio.run(run(target, **mixed))))
        for count in args.streams:
            equal = {"concurrency": count, "requests": 2 * count, "max_tokens": 64}
            row(
                table, f"{count} streams, 64", in_turn(target, args.rounds, lambda work=equal: asyncio.run(run(target, **work)))
            )
        switch(target, "continuous")
    Console().print(table)


if __name__ == "__main__":
    main()

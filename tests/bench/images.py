"""`python -m tests.bench.images`: eight pictures asked for at once against the same one by one, in turn, through HTTP."""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
from rich.console import Console

from tests.bench.http import stack_with

MODEL, COUNT = "sd-turbo", 8


def ask(client: httpx.Client, steps: int, size: str, seed: int) -> bytes:
    body = {"model": MODEL, "prompt": "a lighthouse", "size": size, "steps": steps, "seed": seed, "response_format": "b64_json"}
    return client.post("/images/generations", json=body).raise_for_status().content


def seconds(client: httpx.Client, streams: int, steps: int, size: str) -> float:
    started = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(lambda seed: ask(client, steps, size, seed), range(COUNT)))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.images", description=__doc__)
    parser.add_argument("--size", default="64x64")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with stack_with(MODEL) as client:
        for steps in args.steps:
            taken: dict[int, list[float]] = {1: [], COUNT: []}
            for _ in range(args.rounds + 1):
                for streams, times in taken.items():
                    times.append(seconds(client, streams, steps, args.size))
            alone, together = (COUNT / statistics.median(times[1:]) for times in taken.values())  # the first ones warm
            ratio = statistics.median(one / all_ for one, all_ in zip(taken[1][1:], taken[COUNT][1:], strict=True))
            Console().print(f"{args.size}, {steps} step(s): {alone:.1f} images/s one by one, {together:.1f} at once; "
                            f"median of {args.rounds} ratios {ratio:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()

"""`python -m tests.bench.speech`: when the first sound of 500 characters comes, and when all of it was spoken, over HTTP."""

from __future__ import annotations

import argparse
import statistics
import time

import httpx
from rich.console import Console

from tests.bench.http import stack_with

TEXT = (
    "The harbor was quiet when the last ship came in. Nobody on the pier had expected it, and so nobody had lit the lamps. "
    "The captain, who knew every stone of the place, let the wind carry her past the market and the garden wall. "
    "By the time the bells rang she had tied up, paid the ledger clerk in copper, and walked up the hill to the house with "
    "the green window. Inside, her brother was mending an engine by candle light. He looked up once, nodded, and went on "
    "working until morning."
)[:500]  # fmt: skip
BYTES_A_SECOND = 2 * 24_000


def speak(client: httpx.Client) -> tuple[float, float, float]:
    """Seconds to the first byte and to the last, and of sound."""
    body = {"model": "kokoro-82m", "voice": "af_heart", "input": TEXT, "response_format": "pcm"}
    started, first, size = time.perf_counter(), 0.0, 0
    with client.stream("POST", "/audio/speech", json=body) as answer:
        answer.raise_for_status()
        for data in answer.iter_raw():
            first = first or time.perf_counter() - started
            size += len(data)
    return first, time.perf_counter() - started, size / BYTES_A_SECOND


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.speech", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with stack_with("kokoro-82m") as client:
        speak(client)
        taken = [speak(client) for _ in range(args.rounds)]
    first, whole, sound = (statistics.median(column) for column in zip(*taken, strict=True))
    ratio = statistics.median(all_ / begin for begin, all_, _ in taken)
    Console().print(f"{len(TEXT)} characters, {sound:.1f} s of sound: first byte after {first * 1000:.0f} ms, all after "
                    f"{whole * 1000:.0f} ms; {ratio:.1f} times sooner; real-time factor {whole / sound:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()

"""Closed-loop load on any OpenAI-compatible chat endpoint, so that this project and its peers do the same work.

Greedy, streamed, `ignore_eos`; output tokens are counted from `usage`, never from chunks. The prompts are a function
of the seed alone.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

WORDS = [
    "river",
    "stone",
    "quiet",
    "market",
    "ledger",
    "copper",
    "window",
    "garden",
    "signal",
    "orbit",
    "harbor",
    "winter",
    "method",
    "copper",
    "lantern",
    "paper",
    "cloud",
    "valley",
    "engine",
    "mirror",
]


@dataclass(frozen=True)
class Target:
    base_url: str
    model: str
    api_key: str = "none"
    extra_body: dict[str, Any] = field(default_factory=lambda: {"ignore_eos": True})


@dataclass(frozen=True)
class Sample:
    """One request: seconds, and output tokens."""

    ttft: float
    end_to_end: float
    tokens: int

    @property
    def time_per_token(self) -> float:
        return (self.end_to_end - self.ttft) / max(1, self.tokens - 1)


@dataclass(frozen=True)
class Result:
    concurrency: int
    samples: list[Sample]
    wall_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(sample.tokens for sample in self.samples) / self.wall_seconds

    def ttft_ms(self, quantile: float) -> float:
        return 1000 * _quantile([sample.ttft for sample in self.samples], quantile)

    def time_per_token_ms(self) -> float:
        return 1000 * statistics.median(sample.time_per_token for sample in self.samples)


def _quantile(values: list[float], quantile: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]


def prompts(count: int, words: int, seed: int) -> Iterator[str]:
    root = random.Random(seed)
    for _ in range(count):
        rng = random.Random(root.random())
        yield "Tell a long story using these words: " + " ".join(rng.choice(WORDS) for _ in range(words))


async def run(
    target: Target, *, concurrency: int, requests: int, max_tokens: int, shortest: int = 0, words: int = 40, seed: int = 1
) -> Result:
    """`concurrency` clients, each sending its next request when the last one ended. Raises on any failed request.

    With `shortest`, requests ask for between that many tokens and `max_tokens`, drawn by the seed.
    """
    rng = random.Random(seed)
    waiting = [(prompt, rng.randint(shortest or max_tokens, max_tokens)) for prompt in prompts(requests, words, seed)][::-1]
    samples: list[Sample] = []
    limits = httpx.Limits(max_connections=concurrency + 4)
    headers = {"Authorization": f"Bearer {target.api_key}"}
    async with httpx.AsyncClient(timeout=600, headers=headers, limits=limits) as client:

        async def worker() -> None:
            while waiting:
                samples.append(await _one(client, target, *waiting.pop()))

        started = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return Result(concurrency, samples, time.perf_counter() - started)


async def _one(client: httpx.AsyncClient, target: Target, prompt: str, max_tokens: int) -> Sample:
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra_body,
    }
    started = time.perf_counter()
    first, tokens = None, 0
    async with client.stream("POST", f"{target.base_url}/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if chunk.get("error"):
                raise RuntimeError(str(chunk["error"]))
            if first is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
                first = time.perf_counter() - started
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    ended = time.perf_counter() - started
    return Sample(first or ended, ended, tokens)

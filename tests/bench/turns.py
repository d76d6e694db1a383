"""`python -m tests.bench.turns`: what the KV cache saves in conversations.

Two measures. The second turn after a first of about 1,000 tokens: time to its first token, against the same turn of a
conversation the server has not seen. And conversations of six turns: the share of prompt tokens that were not computed again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

import httpx
from rich.console import Console

from tests.bench.__main__ import own_stack
from tests.bench.load import Target, prompts

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Turn:
    """`ttft` in seconds; token counts as `usage` tells them."""

    ttft: float
    text: str
    prompt_tokens: int
    cached_tokens: int


async def ask(client: httpx.AsyncClient, target: Target, messages: Messages, max_tokens: int) -> Turn:
    """One streamed answer. Raises RuntimeError for anything but 200."""
    body: dict[str, Any] = {
        "model": target.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True}, **target.extra_body,
    }  # fmt: skip
    started, first, text, usage = time.perf_counter(), 0.0, "", {}
    async with client.stream("POST", f"{target.base_url}/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode()[:300])
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            piece = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            first = first or (time.perf_counter() - started if piece else 0.0)
            text, usage = text + piece, chunk.get("usage") or usage
    return Turn(first, text, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"])


async def second_turns(client: httpx.AsyncClient, target: Target, pairs: int, words: int) -> tuple[list[float], list[float]]:
    """Seconds to the second turn's first token: (known conversation, unknown conversation), pair by pair in turn."""
    known, unknown = [], []
    for seed in range(pairs):
        first, other = prompts(2, words, seed=1000 + seed)
        answer = await ask(client, target, [_user(first)], 16)
        known.append((await ask(client, target, [_user(first), _assistant(answer.text), _user("Go on.")], 8)).ttft)
        unknown.append((await ask(client, target, [_user(other), _assistant(answer.text), _user("Go on.")], 8)).ttft)
    return known, unknown


async def conversation(client: httpx.AsyncClient, target: Target, turns: int, seed: int) -> list[Turn]:
    """One conversation: the answers go back in, as a chat's do."""
    rng = random.Random(seed)
    messages: Messages = []
    taken = []
    for text in prompts(turns, rng.randint(20, 80), seed=seed):
        messages.append(_user(text))
        taken.append(await ask(client, target, messages, 48))
        messages.append(_assistant(taken[-1].text))
    return taken


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


async def measure(target: Target, pairs: int, words: int, conversations: int, console: Console) -> None:
    headers = {"Authorization": f"Bearer {target.api_key}"}
    async with httpx.AsyncClient(timeout=600, headers=headers) as client:
        await ask(client, target, [_user("Hello")], 4)
        known, unknown = (statistics.median(side) for side in await second_turns(client, target, pairs, words))
        ratio = unknown / known
        console.print(f"second turn, first token: {known * 1000:.0f} ms cached, {unknown * 1000:.0f} ms not: {ratio:.1f}x")
        traces = await asyncio.gather(*(conversation(client, target, 6, seed) for seed in range(conversations)))
    everything = [turn for trace in traces for turn in trace]
    prompt, cached = sum(t.prompt_tokens for t in everything), sum(t.cached_tokens for t in everything)
    console.print(f"{conversations} conversations of 6 turns: {cached} of {prompt} prompt tokens reused: {cached / prompt:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.turns", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--words", type=int, default=500, help="words of the first turn; two tokens each, about")
    parser.add_argument("--conversations", type=int, default=4)
    args = parser.parse_args()
    with own_stack() as target:
        asyncio.run(measure(target, args.pairs, args.words, args.conversations, Console()))


if __name__ == "__main__":
    main()

"""`python -m tests.bench.beside`: how long a chat waits for its first token while a video is made, on real daemons.

Alone and beside the video in turn, first with the video on another worker, a core for each, then on the same one, where a
chat may wait for one denoising step. SmolLM2-135M is real; CogVideoX is tiny, and its video so large that a step takes long.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.bench.site import run, weights, workers

CHAT, VIDEO = "smollm2-135m", "cogvideox-2b"
PROMPT_TOKENS = 128


async def first_token(seed: int) -> float:
    """Seconds, of a prompt that nobody has seen."""
    from apps.core.types import SamplingParams, TextDelta
    from apps.scheduler import services
    from tests.apps.scheduler.factories import make_request
    from tests.apps.scheduler.site import principal

    rng = random.Random(seed)
    prompt = tuple(rng.randrange(100, 40_000) for _ in range(PROMPT_TOKENS))
    sampling = SamplingParams(4, seed=1, ignore_eos=True)
    request = make_request(model=CHAT, prompts=(prompt,), sampling=sampling)
    started, first = time.perf_counter(), 0.0
    await services.submit(request, principal())
    async for _, event in services.events(request.id):
        if isinstance(event, TextDelta) and not first:
            first = time.perf_counter() - started
    return first


class Video:
    """One that is being made; `steps` has the seconds from each denoising step's end to the next one's."""

    def __init__(self, side: int, frames: int) -> None:
        from apps.core.types import VideoWork
        from tests.apps.scheduler.factories import make_request

        work = VideoWork("a lighthouse", side, side, frames, steps=50)
        self.request = make_request(model=VIDEO, prompts=(), work=work, max_tokens=work.output_units)
        self.steps: list[float] = []

    async def follow(self) -> None:
        from apps.api.answer import followed
        from apps.core.types import MediaDelta
        from apps.scheduler import services
        from tests.apps.scheduler.site import principal

        await services.submit(self.request, principal())
        last = 0.0
        async with aclosing(followed(self.request.id)) as events:
            async for event in events:
                if isinstance(event, MediaDelta) and event.units:
                    now = time.perf_counter()
                    self.steps.extend([now - last] if last else [])
                    last = now


async def compare(rounds: int, side: int, frames: int) -> tuple[list[float], list[float], list[float]]:
    """First tokens alone and beside a video, and denoising steps that no chat ran beside; seconds."""
    alone, beside, steps = list[float](), list[float](), list[float]()
    for number in range(-1, rounds):  # the first round warms
        alone.append(await first_token(2 * number))
        video = Video(side, frames)
        making = asyncio.create_task(video.follow())
        while len(video.steps) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        steps += video.steps
        await asyncio.sleep(random.random() * statistics.median(steps))  # at any moment of a step
        beside.append(await first_token(2 * number + 1))
        making.cancel()
        await asyncio.gather(making, return_exceptions=True)
        await asyncio.sleep(2 * statistics.median(steps))
    return alone[1:], beside[1:], steps


async def bench(redis: Any, rounds: int, side: int, frames: int) -> None:
    folder = Path(os.environ.get("MODELS_DIR", "var/models"))
    weights(folder, CHAT, VIDEO)
    for where, loads in (("another worker", ((CHAT,), (VIDEO,))), ("the same worker", ((CHAT, VIDEO),))):
        await redis.flushdb()
        threads = ("--threads", "1") if len(loads) > 1 else ()
        async with workers(redis, folder, *loads, arguments=threads):
            alone, beside, steps = await compare(rounds, side, frames)
        ms = [1000 * statistics.median(each) for each in (alone, beside, steps)]
        over = sum(late > 1.1 * (statistics.median(alone) + max(steps)) for late in beside)
        Console().print(f"video on {where}: first token after {ms[0]:.0f} ms alone, {ms[1]:.0f} ms beside it "
                        f"(longest {1000 * max(beside):.0f}); a denoising step takes {ms[2]:.0f} ms (longest "
                        f"{1000 * max(steps):.0f}); beyond one step and its own time: {over} of {rounds}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.beside", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--frames", type=int, default=25)
    args = parser.parse_args()
    run(lambda redis: bench(redis, args.rounds, args.side, args.frames))


if __name__ == "__main__":
    main()

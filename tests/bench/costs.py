"""`python -m tests.bench.costs`: how well a request's cost is predicted, for each modality, on real daemons.

Eighty varied requests, one at a time and then four at once; what is told is of the last thirty, whose costs were predicted from
those before: the median of |predicted - true| / true. The noise is what no prediction can do away with: one request sent ten
times, each predicted by the median of all. `--cpu` has the dispatcher meter the daemon's processor time in the clock's place,
which other work on the machine does not lengthen.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.bench.load import WORDS
from tests.bench.site import run, weights, workers

COUNT, LAST, REPEATS = 80, 30, 10
Fields = dict[str, Any]
SPENT: dict[str, float] = {}  # GPU-ms by request, as the dispatcher measured them
SOUND: list[bytes] = []  # what was spoken, for the transcriber to hear


def sentences(rng: random.Random, characters: int) -> str:
    text = ""
    while len(text) < characters:
        words = [rng.choice(WORDS) for _ in range(rng.randint(4, 12))]
        text += " ".join(words).capitalize() + ". "
    return text.strip()


def speech(rng: random.Random) -> Fields:
    from apps.core.types import SpeechWork

    return {"work": SpeechWork(sentences(rng, rng.randint(10, 90)), "af_heart")}


def embedding(rng: random.Random) -> Fields:
    from apps.core.types import EmbedWork

    texts = [tuple(rng.randrange(1000, 20_000) for _ in range(rng.randint(4, 200))) for _ in range(rng.randint(1, 8))]
    return {"work": EmbedWork(), "prompts": tuple(texts)}


def transcription(rng: random.Random) -> Fields:
    from apps.core.types import TranscribeWork

    heard = b"".join(rng.sample(SOUND, rng.randint(1, 4)))
    return {"work": TranscribeWork(len(heard) / 32_000), "attachments": [heard]}


def image(rng: random.Random) -> Fields:
    from apps.core.types import ImageWork

    width, height = (64 * rng.randint(2, 7) for _ in range(2))
    return {"work": ImageWork("a lighthouse", width, height, rng.randint(1, 4)), "n": rng.choice([1, 1, 2])}


def video(rng: random.Random) -> Fields:
    from apps.core.types import VideoWork

    width, height = (16 * rng.randint(8, 13) for _ in range(2))
    return {"work": VideoWork("a lighthouse", width, height, rng.choice([9, 13, 17]), rng.randint(2, 4))}


def chat(rng: random.Random) -> Fields:
    from apps.core.types import SamplingParams

    prompt = tuple(rng.randrange(100, 40_000) for _ in range(rng.randint(20, 400)))
    sampling = SamplingParams(rng.randint(4, 64), seed=rng.randrange(1000), ignore_eos=True)
    return {"prompts": (prompt,), "sampling": sampling}


MODALITIES: dict[str, tuple[str, Callable[[random.Random], Fields]]] = {
    "chat": ("smollm2-135m", chat),
    "embedding": ("minilm-l6-v2", embedding),
    "speech": ("kokoro-82m", speech),
    "transcription": ("whisper-tiny.en", transcription),
    "image": ("sd-turbo", image),
    "video": ("cogvideox-2b", video),
}


class ProcessorTime:
    """A clock that tells the seconds of processor time that a process has had; the machine's until it is given one."""

    def __init__(self) -> None:
        self.pid = 0

    def __call__(self) -> float:
        return time.clock_gettime(~self.pid << 3 | 2) if self.pid else time.monotonic()  # man clock_getcpuclockid


def meter_by(clock: ProcessorTime) -> None:
    from apps.scheduler.meter import Meter

    begin = Meter.__init__
    Meter.__init__ = lambda self: begin(self, clock)  # type: ignore[method-assign, misc]


def listen() -> None:
    """Has each request's measured cost in SPENT."""
    from apps.scheduler.meter import Meter

    end = Meter.end

    def ended(self: Meter, request_id: str) -> Any:
        if (spent := end(self, request_id)) is not None:
            SPENT[request_id] = spent.gpu_ms
        return spent

    Meter.end = ended  # type: ignore[method-assign]


async def measured(redis: Any, model: str, *, attachments: Any = (), **fields: Any) -> tuple[float, float]:
    """Predicted and true GPU-ms of one request."""
    from apps.core.blobs import keyed
    from apps.core.types import MediaDelta, RequestFinished
    from apps.scheduler import services
    from tests.apps.scheduler.factories import make_request
    from tests.apps.scheduler.site import principal

    units = fields["work"].output_units if "work" in fields else 1
    kept = keyed(attachments)
    request = make_request(**{"prompts": (), "max_tokens": units, "blobs": tuple(kept), "model": model, **fields})
    await services.submit(request, principal(), kept)
    sound = b""
    async for _, event in services.events(request.id):
        if isinstance(event, MediaDelta) and event.mime == "audio/pcm":
            sound += at_16_khz(event.media)
        if isinstance(event, RequestFinished):
            assert event.outcome == "succeeded", event
    SOUND.extend([sound] if sound else [])
    return float(await redis.hget(f"request:{request.id}", "cost_ms")), SPENT[request.id]


async def speak(redis: Any, folder: Path) -> None:
    """Fills SOUND."""
    model, make = MODALITIES["speech"]
    weights(folder, model)
    async with workers(redis, folder, (model,)):
        for seed in range(12):
            await measured(redis, model, **make(random.Random(seed)))


def at_16_khz(media: str) -> bytes:
    """Of 24 kHz."""
    samples = np.frombuffer(base64.b64decode(media), "<i2").astype(np.float32)
    return np.interp(np.arange(0, len(samples), 1.5), np.arange(len(samples)), samples).astype("<i2").tobytes()


async def errors(redis: Any, model: str, requests: list[Fields], streams: int) -> list[float]:
    """Relative errors in the order in which the requests ended, from a cost model that knew nothing at first."""
    for key in [*await redis.keys("cost:*"), "costs"]:
        await redis.delete(key)
    waiting, found = requests[::-1], list[float]()

    async def client() -> None:
        while waiting:
            predicted, true = await measured(redis, model, **waiting.pop())
            found.append(abs(predicted - true) / true)

    await asyncio.gather(*(client() for _ in range(streams)))
    return found


async def noise(redis: Any, model: str, fields: Fields) -> float:
    spent = [(await measured(redis, model, **fields))[1] for _ in range(REPEATS)]
    usual = statistics.median(spent)
    return statistics.median(abs(value - usual) / value for value in spent)


async def bench(redis: Any, args: argparse.Namespace, folder: Path) -> None:
    listen()
    clock = ProcessorTime() if args.cpu else None
    if clock:
        meter_by(clock)
    table = Table("modality", "model", *(f"{streams} at a time" for streams in args.streams), "noise",
                  title=f"median error of the predicted {'processor ' if clock else ''}time")  # fmt: skip
    for name in args.modalities:
        model, make = MODALITIES[name]
        weights(folder, model)
        if name == "transcription" and not SOUND:
            await speak(redis, folder)
        async with workers(redis, folder, (model,), arguments=("--threads", "1") if clock else ()) as (daemon,):
            if clock:
                clock.pid = daemon.process.pid
            rng, found = random.Random(1), list[float]()
            for streams in args.streams:
                each = await errors(redis, model, [make(rng) for _ in range(COUNT)], streams)
                found.append(statistics.median(each[-LAST:]))
            found.append(await noise(redis, model, make(rng)))
        table.add_row(name, model, *(f"{error:.1%}" for error in found))
        Console(width=110).print(table)  # after each: all of them take minutes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.costs", description=__doc__)
    parser.add_argument("modalities", nargs="*", default=list(MODALITIES), help=", ".join(MODALITIES))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4], help="requests at a time (1 4)")
    parser.add_argument("--cpu", action="store_true", help="predict processor time, on one thread")
    args = parser.parse_args()
    folder = Path(os.environ.get("MODELS_DIR", "var/models"))
    run(lambda redis: bench(redis, args, folder))


if __name__ == "__main__":
    main()

"""The event log outside Redis: a file of JSON lines, one transition each, that `manage.py replay` and `simulate` read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

from redis.asyncio import Redis

from apps.scheduler import queue
from apps.scheduler.replay import BrokenLog

STREAM = "log"
BATCH = 1000
WAIT_MS = 500


async def export(redis: Redis, path: Path, stop: asyncio.Event) -> None:
    """Appends every transition from now on to the file, after a checkpoint to begin from, until `stop`."""
    position = await queue.checkpoint(redis)
    await asyncio.to_thread(_append, path, [fields for _, fields in await redis.xrange(STREAM, position, position)])
    while not stop.is_set():
        found = await redis.xread({STREAM: position}, count=BATCH, block=WAIT_MS)
        for batch in found.get(STREAM, []) if found else []:
            position = batch[-1][0]
            await asyncio.to_thread(_append, path, [fields for _, fields in batch])


def _append(path: Path, entries: list[dict[str, str]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries)


def read(path: Path) -> Iterator[dict[str, str]]:
    """Raises BrokenLog for a line that is no entry; a last line that was cut off in the middle is left out."""
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                entry = json.loads(line)
            except ValueError:
                raise BrokenLog(f"line {number} is not JSON") from None
            if not isinstance(entry, dict):
                raise BrokenLog(f"line {number} is not an entry")
            yield entry

"""Server-sent events: `data:` frames, comments that keep the line alive, and OpenAI's end mark."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def frame(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def named(body: dict[str, Any]) -> bytes:
    """A frame that says its body's type on a line of its own."""
    return f"event: {body['type']}\n".encode() + frame(body)


async def kept_alive(frames: AsyncIterator[bytes], every_ms: int) -> AsyncIterator[bytes]:
    """`frames`, with a comment whenever nothing came for `every_ms`. Frames that are ready together go out as one."""
    pending: asyncio.Task[bytes] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(frames))
            done, _ = await asyncio.wait({pending}, timeout=every_ms / 1000)
            if not done:
                yield KEEP_ALIVE
                continue
            try:
                data = pending.result()
            except StopAsyncIteration:
                return
            pending = None
            yield data
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
        await frames.aclose()  # type: ignore[attr-defined]

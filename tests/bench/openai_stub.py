"""`python -m tests.bench.openai_stub PORT`: a chat endpoint that streams one token every 50 ms, for a proxy to stand before."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

STEP_SECONDS = 0.05


def _frame(data: str) -> bytes:
    line = f"data: {data}\n\n".encode()
    return f"{len(line):x}\r\n".encode() + line + b"\r\n"


def _chunk(delta: dict[str, Any], reason: str | None = None, **fields: Any) -> bytes:
    choices = [] if fields else [{"index": 0, "delta": delta, "finish_reason": reason}]
    body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "stub", "choices": choices, **fields}
    return _frame(json.dumps(body))


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = next(
                int(v) for k, _, v in (x.partition(b":") for x in head.split(b"\r\n")) if k.lower() == b"content-length"
            )
            body = json.loads(await reader.readexactly(length))
            count = body.get("max_completion_tokens") or body["max_tokens"]
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            for i in range(count):
                await asyncio.sleep(STEP_SECONDS)
                writer.write(_chunk({"content": " word"} if i else {"role": "assistant", "content": " word"}))
            usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
            writer.write(_chunk({}, "length") + _chunk({}, usage=usage) + _frame("[DONE]") + b"0\r\n\r\n")
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def _serve(port: int) -> None:
    server = await asyncio.start_server(_answer, "127.0.0.1", port, backlog=256)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))

"""What is too large for the queue: pictures and audio of a request, in Redis under the hash of their bytes.

Keys: `blob:{sha256}`, a string of bytes, which lapses after the longest a request may take. Equal bytes are kept once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from redis.asyncio import Redis
from redis.client import NEVER_DECODE

from apps.core.errors import Unavailable


def key_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def keyed(attachments: Iterable[bytes]) -> dict[str, bytes]:
    """Each by its key, in order."""
    return {key_of(data): data for data in attachments}


async def put(redis: Redis, attachments: Mapping[str, bytes], ttl_ms: int) -> None:
    for key, data in attachments.items():
        await redis.set(f"blob:{key}", data, px=ttl_ms)


async def take(redis: Redis, keys: Sequence[str]) -> list[bytes]:
    """In the order of `keys`. Raises Unavailable when one is gone or is not what its key says."""
    found = []
    for key in keys:
        data = await redis.execute_command("GET", f"blob:{key}", **{NEVER_DECODE: []})
        if data is None or key_of(data) != key:
            raise Unavailable("A picture or recording of this request was lost. Send it again.", code="attachment_lost")
        found.append(data)
    return found

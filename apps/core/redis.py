"""The one Redis client factory, and the one way Lua is run.

Connections are made with `protocol=3` and decoded responses. A task that is cancelled while a command is in flight
must not hand its connection back (CVE-2023-28858): redis-py from 4.5.5 disconnects it, which is why the pin is newer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from django.conf import settings
from redis.asyncio import BlockingConnectionPool, Redis
from redis.commands.core import AsyncScript

# Commands beyond these wait for a connection, for up to 5 s.
MAX_CONNECTIONS = 64


def connect(url: str) -> Redis:
    """A client with its own pool. One per process and event loop; close it with `aclose()`."""
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=5,
        protocol=3,
        decode_responses=True,
        socket_connect_timeout=2,
        health_check_interval=15,
        client_name="inference-stack",
    )
    return Redis.from_pool(pool)


class LuaScript:
    """A Lua file that documents its keys in its header. Runs by hash, and sends the text again when Redis forgot it.

    `libraries` are Lua files of local functions put in front of it, so that one transition can span two owners' keys.
    """

    def __init__(self, path: Path, *libraries: Path) -> None:
        self.path = path
        self.libraries = libraries

    @cached_property
    def source(self) -> str:
        return "\n".join(part.read_text() for part in (*self.libraries, self.path))

    async def __call__(self, redis: Redis, *, keys: Sequence[str], args: Sequence[str | int | float | bytes]) -> Any:
        return await AsyncScript(redis, self.source)(keys=list(keys), args=list(args))


async def server_time_ms(redis: Redis) -> int:
    """Redis server time: the one clock that deadlines, leases and quotas are measured by."""
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


_CLIENTS: WeakKeyDictionary[asyncio.AbstractEventLoop, Redis] = WeakKeyDictionary()


def shared() -> Redis:
    """This process's client for the running event loop, made at first use from `settings.ENV.redis_url`."""
    loop = asyncio.get_running_loop()
    if loop not in _CLIENTS:
        _CLIENTS[loop] = connect(settings.ENV.redis_url)
    return _CLIENTS[loop]

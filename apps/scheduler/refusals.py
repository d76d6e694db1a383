"""A ledger row for every refusal. While Redis cannot take them, they wait here, the latest 10,000."""

from __future__ import annotations

import json
from collections import deque

from redis.asyncio import Redis
from redis.exceptions import RedisError

from apps.core.errors import ServiceError
from apps.core.redis import server_time_ms
from apps.core.types import Outcome, Priority

LEDGER_LENGTH = 1_000_000
_spool: deque[dict[str, object]] = deque(maxlen=10_000)


async def record(
    redis: Redis,
    error: ServiceError,
    *,
    request_id: str,
    org_id: str,
    key_id: str,
    model: str,
    priority: Priority = Priority.DEFAULT,
    stream: bool = False,
) -> None:
    """Never raises for Redis: the client's answer matters more than when we count it."""
    _spool.append({
        "request_id": request_id, "org_id": org_id, "key_id": key_id, "model": model,
        "outcome": Outcome.REFUSED.value, "code": error.code, "priority": int(priority), "stream": stream,
        "prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0, "queue_ms": 0, "ttft_ms": 0, "total_ms": 0,
        "attempts": 0, "worker_id": "",
    })  # fmt: skip
    try:
        now = await server_time_ms(redis)
        while _spool:
            row = _spool.popleft()
            try:
                entry = json.dumps({**row, "arrived_ms": now, "finished_ms": now})
                await redis.xadd("ledger", {"entry": entry}, maxlen=LEDGER_LENGTH, approximate=True)
            except RedisError:
                _spool.appendleft(row)
                raise
    except RedisError:
        return

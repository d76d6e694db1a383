"""What this gateway answers for: its clients' requests, and what they have seen of them.

Redis may lose everything at any moment. A request belongs to the gateway that holds its client, which puts it back at its
old place with its tokens, so that the client's stream goes on where it was.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from redis.asyncio import Redis

from apps.accounts import quota
from apps.core import blobs
from apps.core.errors import QuotaExceeded
from apps.core.types import InferenceRequest, MediaDelta, Principal, TextDelta
from apps.scheduler import queue
from apps.scheduler.codec import decode_event
from apps.scheduler.queue import Place

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class Held:
    """One request. `payloads` are the events that its client was given, as they were in the log."""

    request: InferenceRequest
    principal: Principal
    place: Place
    attachments: Mapping[str, bytes]
    ttl_ms: int
    until: float  # monotonic; past it the request has ended by its deadline
    payloads: list[str] = field(default_factory=list)
    generation: int = 0

    async def restore(self, redis: Redis) -> None:
        """Puts the request back. Its quota too, but what was admitted once is not refused now."""
        self.generation += 1
        tokens = self.request.max_total_tokens
        try:
            await quota.reserve(redis, request_id=self.request.id, principal=self.principal, tokens=tokens, ttl_ms=self.ttl_ms)
        except QuotaExceeded:
            _LOG.info("request %s runs beyond its quota after a flush", self.request.id)
        await blobs.put(redis, self.attachments, self.ttl_ms)
        if await queue.restore(redis, self.place, generation=self.generation, payloads=self.payloads, seen=self._tokens_seen()):
            _LOG.warning("request %s was lost by Redis and is queued again", self.request.id)

    def _tokens_seen(self) -> dict[int, int]:
        seen: defaultdict[int, int] = defaultdict(int)
        for payload in self.payloads:
            event = decode_event(payload)
            if isinstance(event, TextDelta):
                seen[event.choice] += len(event.token_ids)
            elif isinstance(event, MediaDelta):
                seen[event.choice] += event.units
        return dict(seen)


class Inflight:
    """Every request held, oldest first."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}

    def hold(self, held: Held) -> None:
        now = time.monotonic()
        for request_id in [key for key, old in self._oldest(2) if old.until < now]:
            self.release(request_id)
        self._held[held.request.id] = held

    def _oldest(self, count: int) -> list[tuple[str, Held]]:
        return [entry for entry, _ in zip(self._held.items(), range(count), strict=False)]

    def get(self, request_id: str) -> Held | None:
        return self._held.get(request_id)

    def release(self, request_id: str) -> None:
        self._held.pop(request_id, None)

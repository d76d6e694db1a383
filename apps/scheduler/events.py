"""What a client sees of its request: a numbered log in a Redis Stream, followed live through one subscription a process.

A message on the channel carries the event itself, so nothing is read twice; the log is read on joining, on a gap, and
when the channel has been quiet, because Redis does not promise delivery.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from weakref import WeakKeyDictionary

from redis.asyncio import Redis
from redis.exceptions import RedisError

from apps.core.errors import NotFound
from apps.core.types import Event, RequestFinished
from apps.scheduler.codec import decode_event

QUIET_SECONDS = 2.0
_LOG = logging.getLogger(__name__)
_Inbox = asyncio.Queue[tuple[int, str]]
# Never spoken on, never left: while it has no subscription the client checks the connection's health by reading an answer,
# which the reader, who has not noticed yet that nobody is left, would be reading too.
_IDLE = "events:"


class EventHub:
    """One process's subscription: hands each message to whoever follows that request."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._pubsub = redis.pubsub(ignore_subscribe_messages=True)
        self._inboxes: defaultdict[str, set[_Inbox]] = defaultdict(set)
        self._reader: asyncio.Task[None] | None = None
        self._subscribing = asyncio.Lock()

    async def follow(self, request_id: str, after: int, payloads: list[str] | None = None) -> AsyncIterator[tuple[int, Event]]:
        """(id, event) for every event past `after`, ending with RequestFinished. Raises NotFound when the log is gone.

        `payloads`, when given, is made to hold what the log held up to the latest event.
        """
        async with self._joined(request_id) as inbox:
            waiting = await self._read(request_id, after)
            while True:
                for number, payload in waiting:
                    event = decode_event(payload)
                    after = number
                    if payloads is not None and number == len(payloads) + 1:
                        payloads.append(payload)
                    yield number, event
                    if isinstance(event, RequestFinished):
                        return
                waiting = await self._next(request_id, inbox, after)

    async def _next(self, request_id: str, inbox: _Inbox, after: int) -> list[tuple[int, str]]:
        """The events that follow `after`: from the channel when it continues there, else from the log."""
        try:
            number, payload = await asyncio.wait_for(inbox.get(), QUIET_SECONDS)
        except TimeoutError:
            return await self._read(request_id, after)
        if number <= after:
            return []
        return [(number, payload)] if number == after + 1 else await self._read(request_id, after)

    async def _read(self, request_id: str, after: int) -> list[tuple[int, str]]:
        entries = await self._redis.xrange(f"events:{request_id}", min=f"({after}-0" if after else "-")
        if not entries and not await self._redis.exists(f"request:{request_id}"):
            raise NotFound("The events of this request are no longer kept.")
        return [(int(number.partition("-")[0]), fields["e"]) for number, fields in entries]

    @asynccontextmanager
    async def _joined(self, request_id: str) -> AsyncIterator[_Inbox]:
        inbox: _Inbox = asyncio.Queue()
        channel = f"events:{request_id}"
        self._inboxes[channel].add(inbox)
        try:
            async with self._subscribing:
                await self._pubsub.subscribe(_IDLE, channel)
            if self._reader is None or self._reader.done():
                self._reader = asyncio.create_task(self._deliver())
            yield inbox
        finally:
            self._inboxes[channel].discard(inbox)
            if not self._inboxes[channel]:
                del self._inboxes[channel]
                await asyncio.shield(self._pubsub.unsubscribe(channel))

    async def _deliver(self) -> None:
        while self._inboxes:
            try:
                message: dict[str, Any] | None = await self._pubsub.get_message(timeout=QUIET_SECONDS)
            except RedisError as error:
                # The client reconnects and subscribes again; followers read the log meanwhile.
                _LOG.warning("event subscription interrupted: %s", type(error).__name__)
                await asyncio.sleep(0.2)
                continue
            if message is not None:
                number, _, payload = message["data"].partition(" ")
                for inbox in self._inboxes.get(message["channel"], ()):
                    inbox.put_nowait((int(number), payload))


_HUBS: WeakKeyDictionary[Redis, EventHub] = WeakKeyDictionary()


def hub(redis: Redis) -> EventHub:
    """The process's one hub on this client."""
    if redis not in _HUBS:
        _HUBS[redis] = EventHub(redis)
    return _HUBS[redis]

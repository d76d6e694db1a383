"""The metrics writer: reads the ledger once and tells Postgres, Prometheus' counters and ClickHouse.

Usage in Postgres comes first and never waits for ClickHouse. Each reader of the ledger has its own consumer group, so
ClickHouse can be down for hours: its entries wait in the stream, and nothing is lost or counted twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from asgiref.sync import sync_to_async
from clickhouse_connect.driver.client import Client
from django.conf import settings
from django.db import DatabaseError
from django.utils.module_loading import import_string
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from apps.metrics import clickhouse, prometheus
from apps.metrics.records import LedgerEntry, parse_entry

STREAM = "ledger"
QUARANTINE = "ledger:quarantine"
BATCH = 1000
WAIT_MS = 500
BACKOFF_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)
_LOG = logging.getLogger(__name__)
Entries = list[tuple[str, LedgerEntry]]


class Consumer:
    """One reader of the ledger with a group of its own. `handle` may be called again with the same entries."""

    def __init__(self, redis: Redis, group: str, handle: Callable[[Entries], Awaitable[None]]) -> None:
        self._redis = redis
        self._group = group
        self._handle = handle

    async def run(self, stop: asyncio.Event) -> None:
        failures = 0
        while not stop.is_set():
            try:
                await self._once()
                failures = 0
            except (RedisError, DatabaseError, *clickhouse.UNAVAILABLE) as error:
                delay = BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS) - 1)]
                failures += 1
                _LOG.warning("%s waits %s s: %s", self._group, delay, type(error).__name__)
                await _pause(stop, delay)

    async def _once(self) -> None:
        """One batch: first what was read and not acknowledged, then what is new."""
        for position in ("0", ">"):
            entries = await self._read(position)
            if entries:
                await self._process(entries)

    async def _read(self, position: str) -> list[tuple[str, dict[str, str]]]:
        block = WAIT_MS if position == ">" else None
        try:
            found = await self._redis.xreadgroup(self._group, "writer", {STREAM: position}, count=BATCH, block=block)
        except ResponseError:  # no such group: the first run, or Redis came back empty
            await self._create_group()
            return []
        # A stream is one list of entries in RESP2's shape and one batch of lists in RESP3's.
        batches = found.get(STREAM, []) if found else []
        return [entry for batch in batches for entry in batch if entry[1]]

    async def _create_group(self) -> None:
        try:
            await self._redis.xgroup_create(STREAM, self._group, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def _process(self, found: list[tuple[str, dict[str, str]]]) -> None:
        entries: Entries = []
        for stream_id, fields in found:
            try:
                entries.append((stream_id, parse_entry(fields.get("entry", ""))))
            except ValueError:
                await self._quarantine(stream_id, fields)
        if entries:
            await self._handle(entries)
            await self._redis.xack(STREAM, self._group, *(stream_id for stream_id, _ in entries))

    async def _quarantine(self, stream_id: str, fields: dict[str, str]) -> None:
        _LOG.error("ledger entry %s is damaged; moved to %s", stream_id, QUARANTINE)
        await self._redis.xadd(QUARANTINE, fields, maxlen=1000)
        await self._redis.xack(STREAM, self._group, stream_id)


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return


class Writer:
    """The two readers: the accounts (usage and counters), and the history (ClickHouse)."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._client: Client | None = None
        self._record_usage = sync_to_async(import_string(settings.USAGE_RECORDER))

    async def run(self, stop: asyncio.Event) -> None:
        await asyncio.gather(
            Consumer(self._redis, "accounts", self._account).run(stop),
            Consumer(self._redis, "history", self._insert).run(stop),
        )

    async def _account(self, entries: Entries) -> None:
        await self._record_usage(entries)
        await prometheus.count(self._redis, entries)

    async def _insert(self, entries: Entries) -> None:
        """The batch's token is its range of ledger ids: a batch sent again is the same batch."""
        token = f"{entries[0][0]}..{entries[-1][0]}"
        try:
            await asyncio.to_thread(self._insert_now, [entry for _, entry in entries], token)
        except clickhouse.UNAVAILABLE:
            self._client = None
            raise

    def _insert_now(self, entries: list[LedgerEntry], token: str) -> None:
        if self._client is None:
            self._client = clickhouse.connect()
            clickhouse.migrate(self._client)
        clickhouse.insert(self._client, entries, token)

"""The fleet controller: one leader, which keeps a watch on every enabled worker; the others wait for its place.

Key: `fleet:leader`, a string with the leader's name, which lapses when the leader does not renew it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from pathlib import Path

from django.db import Error as DatabaseError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from apps.core.database import in_database
from apps.core.redis import LuaScript
from apps.core.tasks import end
from apps.fleet import registry
from apps.fleet.modes.keeper import ModeKeeper
from apps.fleet.selectors import Assignment, assignments
from apps.fleet.watch import WorkerWatch

LEADER_KEY = "fleet:leader"
LEASE_SECONDS = 5.0
RESCAN_SECONDS = 1.0
GOODBYE_SECONDS = 1.0
_LOG = logging.getLogger(__name__)


class Controller:
    """Leads while it holds the lock. `run` returns when `stop` is set."""

    def __init__(self, redis: Redis, name: str) -> None:
        self._redis = redis
        self._name = name
        self._watches: dict[int, WorkerWatch] = {}
        self._leads_until = 0.0
        self._rescan = asyncio.Event()
        self._modes = ModeKeeper(redis, name, self._rescan.set)

    async def run(self, stop: asyncio.Event) -> None:
        """Never waits for a store that is away once `stop` is set."""
        rounds, stopping = asyncio.create_task(self._rounds()), asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({rounds, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if rounds.done():
                rounds.result()  # a bug: say so, and let the supervisor start afresh
        finally:
            await end(rounds, stopping)
            await self._step_down()
            await self._give_up_lock()

    async def _rounds(self) -> None:
        while True:
            try:
                async with asyncio.timeout(LEASE_SECONDS):
                    await self._round()
            except (RedisError, DatabaseError, TimeoutError) as error:
                _LOG.warning("the fleet's stores: %s", type(error).__name__)
            if time.monotonic() > self._leads_until:
                await self._step_down()
            await self._pause()

    async def _pause(self) -> None:
        """Until the next round, or until the record is known to have changed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(RESCAN_SECONDS):
                await self._rescan.wait()
        self._rescan.clear()

    async def _round(self) -> None:
        asked = time.monotonic()
        if await _LOCK(self._redis, keys=[LEADER_KEY], args=[self._name, int(LEASE_SECONDS * 1000)]):
            self._leads_until = asked + LEASE_SECONDS
            await self._sync(await in_database(assignments))
            await self._modes.sync()
        else:
            self._leads_until = 0.0

    async def _sync(self, wanted: dict[int, Assignment]) -> None:
        """One watch for each enabled worker, told what is placed there now."""
        for worker_id, watch in list(self._watches.items()):
            assignment = wanted.get(worker_id)
            if assignment is None or not assignment.same_worker(watch.wanted) or watch.ended:
                del self._watches[worker_id]
                await watch.stop()
                await registry.forget(self._redis, watch.wanted.name)
        for worker_id, assignment in wanted.items():
            if worker_id in self._watches:
                self._watches[worker_id].wanted = assignment
            else:
                self._watches[worker_id] = WorkerWatch(self._redis, assignment)

    async def _step_down(self) -> None:
        """What is published stays, so that routing does not stop before the next leader has spoken to the workers."""
        await self._modes.stop()
        watches = list(self._watches.values())
        self._watches.clear()
        await asyncio.gather(*(watch.stop() for watch in watches))

    async def _give_up_lock(self) -> None:
        try:
            async with asyncio.timeout(GOODBYE_SECONDS):
                await _UNLOCK(self._redis, keys=[LEADER_KEY], args=[self._name])
        except (RedisError, TimeoutError):
            _LOG.warning("the leader's lock was left to lapse")


_LOCK = LuaScript(Path(__file__).parent / "lua/lock.lua")
_UNLOCK = LuaScript(Path(__file__).parent / "lua/unlock.lua")

"""The fleet controller: one leader, which keeps a watch on every enabled worker and has the model manager decide for all of
them; the others wait for its place.

Key: `fleet:leader`, a string with the leader's name, which lapses when the leader does not renew it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import Error as DatabaseError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from apps.core.database import in_database
from apps.core.redis import LuaScript
from apps.core.tasks import end
from apps.fleet import registry
from apps.fleet.manager import Planner
from apps.fleet.modes.keeper import ModeKeeper
from apps.fleet.planning import Demand, Policy, Rules
from apps.fleet.selectors import Assignment, assignments, policies
from apps.fleet.watch import WorkerWatch

LEADER_KEY = "fleet:leader"
LEASE_SECONDS = 5.0
RESCAN_SECONDS = 1.0
PLAN_SECONDS = 0.1
GOODBYE_SECONDS = 1.0
_LOG = logging.getLogger(__name__)


class Since:
    """When each of some things began to be so."""

    def __init__(self) -> None:
        self._since: dict[Any, int] = {}

    def mark(self, those: Iterable[Any], now_ms: int) -> dict[Any, int]:
        """Those that are so now, each with when it began."""
        self._since = {thing: self._since.get(thing, now_ms) for thing in those}
        return self._since


class Controller:
    """Leads while it holds the lock. `run` returns when `stop` is set."""

    def __init__(self, redis: Redis, name: str) -> None:
        self._redis = redis
        self._name = name
        self._watches: dict[int, WorkerWatch] = {}
        self._leads_until = 0.0
        self._policies: dict[str, Policy] = {}
        self._starving = Since()
        self._ready = Since()
        self._rescan = asyncio.Event()
        self._modes = ModeKeeper(redis, name, self._rescan.set)

    async def run(self, stop: asyncio.Event) -> None:
        """Never waits for a store that is away once `stop` is set."""
        work = {asyncio.create_task(self._rounds()), asyncio.create_task(self._plans())}
        stopping = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait({*work, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in done & work:
                task.result()  # a bug: say so, and let the supervisor start afresh
        finally:
            await end(*work, stopping)
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
            wanted, self._policies = await in_database(lambda: (assignments(), policies()))
            await self._sync(wanted)
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
                self._watches[worker_id].policies = self._policies
            else:
                self._watches[worker_id] = WorkerWatch(self._redis, assignment, self._policies)

    # --- Planning ---

    async def _plans(self) -> None:
        while True:
            await asyncio.sleep(PLAN_SECONDS)
            try:
                if self._watches:
                    await self._plan()
            except RedisError as error:
                _LOG.warning("the demand for models cannot be read: %s", type(error).__name__)

    async def _plan(self) -> None:
        waiting = await registry.demand(self._redis)
        now = round(time.monotonic() * 1000)
        watches = {watch.wanted.name: watch for watch in self._watches.values()}
        heard = {name: watch.snapshot for name, watch in watches.items() if watch.snapshot is not None}
        ready = [(name, r.folder) for name, snapshot in heard.items() for r in snapshot.models if r.state == "ready"]
        since = self._ready.mark(ready, now)
        open_ones = [snapshot for snapshot in heard.values() if not snapshot.draining]
        served = {r.model for snapshot in open_ones for r in snapshot.models if r.state == "ready"}
        starving = self._starving.mark([model for model in waiting if model not in served], now)
        demand = {model: Demand(count, starving.get(model, 0)) for model, count in waiting.items()}
        sites = [
            site for name, watch in watches.items()
            if (site := watch.site({folder: at for (worker, folder), at in since.items() if worker == name})) is not None
        ]  # fmt: skip
        env = settings.ENV
        rules = Rules(env.model_residency_ms, env.model_turn_ms, env.load_on_demand)
        plan = Planner(now, sites, self._policies, demand, rules).plan()
        for site in sites:
            watches[site.name].loadable, watches[site.name].refused = plan.loadable[site.name], plan.refused[site.name]
        for action in plan.actions:
            watches[action.worker].act(action)

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

"""The fleet controller: watches every worker, publishes what it says, and loads what is placed on it.

One leader at a time, by a lock in Redis; the others wait for it. Key: `fleet:leader`, a string with its name.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from django.conf import settings
from django.utils import timezone
from redis.asyncio import Redis
from redis.exceptions import RedisError

from apps.core.errors import ServiceError
from apps.core.redis import LuaScript
from apps.core.types import WorkerSnapshot
from apps.fleet import registry
from apps.fleet.daemon_client import DaemonClient
from apps.fleet.models import Gpu, Placement, Worker

LEASE_SECONDS = 5
STATUS_INTERVAL_MS = 500
RESCAN_SECONDS = 1.0
RETRY_SECONDS = 1.0
LOAD_RETRY_SECONDS = 10.0
_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class StuckDetector:
    """Tells a worker whose step counter stands still while sequences run from one that works."""

    timeout_seconds: float
    _step: int = -1
    _moved: float = field(default_factory=time.monotonic)

    def stuck(self, snapshot: WorkerSnapshot, now: float) -> bool:
        running = any(model.running for model in snapshot.models)
        if snapshot.step != self._step or not running:
            self._step, self._moved = snapshot.step, now
        return now - self._moved > self.timeout_seconds


class Controller:
    """Leads while it holds the lock. `run` returns when `stop` is set."""

    def __init__(self, redis: Redis, name: str) -> None:
        self._redis = redis
        self._name = name
        self._watches: dict[int, tuple[str, asyncio.Task[None]]] = {}

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                leading = await self._lead()
                if leading:
                    await self._sync_watches()
                else:
                    await self._stop_watches()
            except RedisError as error:
                _LOG.warning("Redis: %s", type(error).__name__)
            try:
                await asyncio.wait_for(stop.wait(), RESCAN_SECONDS)
            except TimeoutError:
                continue
        await self._stop_watches()
        await _UNLOCK(self._redis, keys=["fleet:leader"], args=[self._name])

    async def _lead(self) -> bool:
        return bool(await _LOCK(self._redis, keys=["fleet:leader"], args=[self._name, LEASE_SECONDS * 1000]))

    async def _sync_watches(self) -> None:
        """One watch for each enabled worker; changed or removed ones end."""
        wanted = {w.pk: w async for w in Worker.objects.filter(is_enabled=True)}
        for pk, (address, task) in list(self._watches.items()):
            if pk not in wanted or wanted[pk].address != address or task.done():
                task.cancel()
                del self._watches[pk]
        for pk, worker in wanted.items():
            if pk not in self._watches:
                self._watches[pk] = (worker.address, asyncio.create_task(WorkerWatch(self._redis, worker).run()))

    async def _stop_watches(self) -> None:
        tasks = [task for _, task in self._watches.values()]
        self._watches.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class WorkerWatch:
    """Follows one worker's status for as long as it is wanted."""

    def __init__(self, redis: Redis, worker: Worker) -> None:
        self._redis = redis
        self._worker = worker
        self._stuck = StuckDetector(settings.ENV.worker_timeout_ms / 1000)
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._status = worker.status
        self._states: dict[str, str] = {}
        self._device = ""

    async def run(self) -> None:
        try:
            while True:
                client = DaemonClient(self._worker.address, settings.ENV.daemon_token.get_secret_value())
                try:
                    async for snapshot in client.watch_status(STATUS_INTERVAL_MS):
                        await self._heard(client, snapshot)
                except (ServiceError, RedisError) as error:
                    await self._lost(error)
                finally:
                    await asyncio.shield(client.close())
                await asyncio.sleep(RETRY_SECONDS)
        finally:
            for task in self._loads.values():
                task.cancel()
            await asyncio.shield(registry.forget(self._redis, self._worker.name))

    async def _lost(self, error: Exception) -> None:
        """Once a loss, not once a try."""
        reason = error.code if isinstance(error, ServiceError) else type(error).__name__
        if await self._record(f"unreachable: {reason}"):
            _LOG.warning("worker %s is unreachable: %s", self._worker.name, error)

    async def _heard(self, client: DaemonClient, snapshot: WorkerSnapshot) -> None:
        if snapshot.worker_id != self._worker.name:
            await self._record(f"calls itself {snapshot.worker_id!r}; start it with --worker-id {self._worker.name}")
            return
        if self._stuck.stuck(snapshot, time.monotonic()):
            await registry.forget(self._redis, self._worker.name)
            await self._record("stuck: its step stands still while requests run")
            return
        await registry.publish(self._redis, dataclasses.replace(snapshot, address=self._worker.address))
        await self._record("draining" if snapshot.draining else "serving")
        await self._record_device(snapshot)
        await self._place(client, snapshot)

    async def _place(self, client: DaemonClient, snapshot: WorkerSnapshot) -> None:
        """Starts a load for each placed model that is not there; writes each placement's state."""
        async for placement in Placement.objects.select_related("model").filter(worker_id=self._worker.pk):
            name = placement.model.name
            resident = snapshot.resident(name)
            if resident is not None and resident.state in ("ready", "loading", "unloading"):
                await self._record_placement(placement, resident.state)
            elif name not in self._loads or self._loads[name].done():
                self._loads[name] = asyncio.create_task(self._load(client, placement, snapshot.epoch))

    async def _load(self, client: DaemonClient, placement: Placement, epoch: int) -> None:
        try:
            async for _ in client.load_model(placement.model.name, epoch):
                continue
        except ServiceError as error:
            _LOG.warning("loading %s on %s: %s", placement.model.name, self._worker.name, error)
            await self._record_placement(placement, f"failed: {error}")
            await asyncio.sleep(LOAD_RETRY_SECONDS)

    async def _record(self, status: str) -> bool:
        """Keeps the worker's row in step, written only when it changes. True when it did."""
        if status == self._status:
            return False
        self._status = status
        await Worker.objects.filter(pk=self._worker.pk).aupdate(status=status[:200], seen_at=timezone.now())
        return True

    async def _record_device(self, snapshot: WorkerSnapshot) -> None:
        """Once, when the worker knows its device: with the first model it loads."""
        if snapshot.device in ("?", self._device):
            return
        self._device = snapshot.device
        gpu, _ = await Gpu.objects.aupdate_or_create(
            host_id=self._worker.host_id,
            device=snapshot.device,
            defaults={"memory_bytes": snapshot.memory_total_bytes},
        )
        await Worker.objects.filter(pk=self._worker.pk).aupdate(gpu=gpu)

    async def _record_placement(self, placement: Placement, state: str) -> None:
        if self._states.get(placement.model.name) != state:
            self._states[placement.model.name] = state
            await Placement.objects.filter(pk=placement.pk).aupdate(state=state[:200])


_LOCK = LuaScript(Path(__file__).parent / "lua/lock.lua")
_UNLOCK = LuaScript(Path(__file__).parent / "lua/unlock.lua")

"""One worker, followed for as long as it is wanted: heard, published, and given what is placed on it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from contextlib import aclosing
from dataclasses import dataclass, field

from django.conf import settings
from redis.asyncio import Redis
from redis.exceptions import RedisError

from apps.core.errors import ServiceError
from apps.core.tasks import end
from apps.core.types import ResidentModel, WorkerSnapshot
from apps.fleet import registry
from apps.fleet.daemon_client import DaemonClient
from apps.fleet.loading import Loader
from apps.fleet.mirror import Mirror
from apps.fleet.selectors import Assignment

STATUS_INTERVAL_MS = 500
RECONNECT_SECONDS = (0.25, 0.5, 1.0, 2.0)  # the pause after each failure in a row; the last is for all further ones
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


class WorkerWatch:
    """Follows the worker from its creation to `stop`. `wanted` may change what is placed, not where the worker is."""

    def __init__(self, redis: Redis, wanted: Assignment) -> None:
        self.wanted = wanted
        self._redis = redis
        self._mirror = Mirror(wanted.worker_id)
        self._loader = Loader()
        self._stuck = StuckDetector(settings.ENV.worker_timeout_ms / 1000)
        self._failures = 0
        self._tasks = [
            asyncio.create_task(self._run(), name=f"watch {wanted.name}"),
            asyncio.create_task(self._mirror.run(), name=f"mirror {wanted.name}"),
        ]

    @property
    def ended(self) -> bool:
        """Whether a bug has ended it; `stop` says which, in the log."""
        return any(task.done() for task in self._tasks)

    async def stop(self) -> None:
        await end(*self._tasks)
        for task in self._tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                _LOG.error("the watch of worker %s ended", self.wanted.name, exc_info=error)

    async def _run(self) -> None:
        while True:
            try:
                await self._follow()
            except (ServiceError, RedisError) as error:
                self._lost(error)
                if self.wanted.cordoned and isinstance(error, ServiceError):
                    await self._hold()
            pause = RECONNECT_SECONDS[min(self._failures, len(RECONNECT_SECONDS) - 1)]
            self._failures += 1
            await asyncio.sleep(pause)

    async def _follow(self) -> None:
        """Returns never: raises when the worker or Redis is lost."""
        client = DaemonClient(self.wanted.address, settings.ENV.daemon_token.get_secret_value())
        try:
            async with aclosing(client.watch_status(STATUS_INTERVAL_MS)) as statuses:
                async for snapshot in statuses:
                    self._failures = 0
                    await self._heard(client, snapshot)
        finally:
            await self._loader.stop()
            await asyncio.shield(client.close())

    def _lost(self, error: Exception) -> None:
        """The registry is left alone: a worker that is back within the timeout keeps its requests."""
        if isinstance(error, RedisError):
            _LOG.warning("worker %s cannot be published: %s", self.wanted.name, type(error).__name__)
            return
        reason = error.code if isinstance(error, ServiceError) else type(error).__name__
        if self._mirror.status(f"unreachable: {reason}"):
            _LOG.warning("worker %s is unreachable: %s", self.wanted.name, error)
        for placement in self.wanted.placements:
            self._mirror.placement(placement.id, "unknown: the worker is unreachable")

    async def _hold(self) -> None:
        """While its host changes its mode, requests wait for a worker that is not there."""
        wanted = self.wanted
        absent = WorkerSnapshot(wanted.name, wanted.address, wanted.epoch or 0, 0, "", "", False, 0, 0)
        try:
            await registry.publish(self._redis, _cordoned(absent, wanted))
        except RedisError as error:
            _LOG.warning("worker %s cannot be published: %s", wanted.name, type(error).__name__)

    async def _heard(self, client: DaemonClient, snapshot: WorkerSnapshot) -> None:
        if snapshot.worker_id != self.wanted.name:
            self._mirror.status(f"calls itself {snapshot.worker_id!r}; start it with --worker-id {self.wanted.name}")
            return
        if self._stuck.stuck(snapshot, time.monotonic()):
            self._mirror.status("stuck: its step stands still while requests run")
            await registry.forget(self._redis, self.wanted.name)
            return
        if self.wanted.epoch not in (None, snapshot.epoch):
            self._mirror.status(f"of epoch {snapshot.epoch}, which is not {self.wanted.epoch}: fenced off")
            await (self._hold() if self.wanted.cordoned else registry.forget(self._redis, self.wanted.name))
            return
        snapshot = dataclasses.replace(snapshot, address=self.wanted.address)
        self._mirror.device(snapshot.device, snapshot.memory_total_bytes)
        if self.wanted.cordoned:
            self._mirror.status("cordoned: its host changes its mode")
            await registry.publish(self._redis, _cordoned(snapshot, self.wanted))
            return
        await registry.publish(self._redis, snapshot)
        self._mirror.status("draining" if snapshot.draining else "serving")
        for placement in self.wanted.placements:
            self._mirror.placement(placement.id, self._loader.place(client, snapshot, placement))


def _cordoned(snapshot: WorkerSnapshot, wanted: Assignment) -> WorkerSnapshot:
    """As the worker is, with what is placed there as on its way."""
    absent = [placed for placed in wanted.placements if snapshot.resident(placed.model) is None]
    coming = tuple(ResidentModel(placed.model, "loading", progress=0.0, engine=placed.engine) for placed in absent)
    return dataclasses.replace(snapshot, models=snapshot.models + coming, cordoned=True)

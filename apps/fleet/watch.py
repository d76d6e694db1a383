"""One worker, followed for as long as it is wanted: heard, published, and told what the manager decided for it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Mapping
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
from apps.fleet.loading import Loader, Moved
from apps.fleet.mirror import Mirror
from apps.fleet.planning import Action, Policy, Site
from apps.fleet.selectors import Assignment, PlacedModel

STATUS_INTERVAL_MS = 500
SETTLE_SECONDS = 2.0
UNIT_SECONDS = 60.0  # what one step of media may take: a video's last is its whole decoding
RECONNECT_SECONDS = (0.25, 0.5, 1.0, 2.0)  # the pause after each failure in a row; the last is for all further ones
_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class StuckDetector:
    """Tells a worker whose step counter stands still while sequences run from one that works. What keeps no KV in blocks is
    media, whose steps may be long and hold up those of text; a frozen process says nothing and is found anyway."""

    timeout_seconds: float
    _step: int = -1
    _moved: float = field(default_factory=time.monotonic)

    def stuck(self, snapshot: WorkerSnapshot, now: float) -> bool:
        running = [model for model in snapshot.models if model.running]
        if snapshot.step != self._step or not running:
            self._step, self._moved = snapshot.step, now
        media = any(model.engine == "continuous" and not model.kv_blocks_total for model in running)
        return now - self._moved > (UNIT_SECONDS if media else self.timeout_seconds)


class WorkerWatch:
    """Follows the worker from its creation to `stop`. `wanted` may change what is placed, not where the worker is."""

    def __init__(self, redis: Redis, wanted: Assignment, policies: Mapping[str, Policy]) -> None:
        self.wanted = wanted
        self.policies = policies
        self._redis = redis
        self._mirror = Mirror(wanted.worker_id)
        self.snapshot: WorkerSnapshot | None = None  # the latest; None while it is not heard
        self.loadable: tuple[str, ...] = ()
        self.refused: dict[str, str] = {}
        self._heard_at = 0.0
        self._client: DaemonClient | None = None
        self._loader = Loader(self._moved)
        self._dismissed: set[int] = set()  # wishes that were carried out; the record is slower
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
            self._client = client
            async with aclosing(client.watch_status(STATUS_INTERVAL_MS)) as statuses:
                async for snapshot in statuses:
                    self._failures = 0
                    await self._heard(client, snapshot)
        finally:
            self.snapshot = self._client = None
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
        absent = WorkerSnapshot(wanted.name, wanted.address, wanted.epoch or 0, 0, "", "", False, 0, 0, loadable=self.loadable)
        try:
            await registry.publish(self._redis, _cordoned(absent, wanted))
        except RedisError as error:
            _LOG.warning("worker %s cannot be published: %s", wanted.name, type(error).__name__)

    async def _heard(self, client: DaemonClient, snapshot: WorkerSnapshot) -> None:
        if snapshot.worker_id != self.wanted.name:
            self.snapshot = None
            self._mirror.status(f"calls itself {snapshot.worker_id!r}; start it with --worker-id {self.wanted.name}")
            return
        if self._stuck.stuck(snapshot, time.monotonic()):
            self.snapshot = None
            self._mirror.status("stuck: its step stands still while requests run")
            await registry.forget(self._redis, self.wanted.name)
            return
        if self.wanted.epoch not in (None, snapshot.epoch):
            self.snapshot = None
            self._mirror.status(f"of epoch {snapshot.epoch}, which is not {self.wanted.epoch}: fenced off")
            await (self._hold() if self.wanted.cordoned else registry.forget(self._redis, self.wanted.name))
            return
        self._heard_at = time.monotonic()
        ordered = self._in_order(snapshot)
        self._mirror.device(snapshot.device, snapshot.memory_total_bytes)
        if self.wanted.cordoned:
            self.snapshot = None  # the manager leaves it alone
            self._mirror.status("cordoned: its host changes its mode")
            await registry.publish(self._redis, _cordoned(ordered, self.wanted))
            return
        self.snapshot = ordered
        await registry.publish(self._redis, self.snapshot)
        self._mirror.status("draining" if ordered.draining else "serving")
        for folder in snapshot.folders:
            self._mirror.peak(folder.model, folder.measured_bytes)
        for placement in self.wanted.placements:
            self._mirror.placement(placement.id, self._state(snapshot, placement))

    def _in_order(self, snapshot: WorkerSnapshot) -> WorkerSnapshot:
        """With what only the controller knows; of a model's revisions, the one to be used first."""
        wanted = {policy.folder for policy in self.policies.values()}
        models = sorted(snapshot.models, key=lambda resident: (resident.state != "ready", resident.folder not in wanted))
        return dataclasses.replace(
            snapshot, address=self.wanted.address, models=tuple(models), loadable=self.loadable, refused=self.refused,
            draining=snapshot.draining or self.wanted.draining,
        )  # fmt: skip

    # --- The manager's ---

    def site(self, ready_since_ms: Mapping[str, int]) -> Site | None:
        """The worker as the manager is to see it; None while it is not heard."""
        if self.snapshot is None:
            return None
        placed = {placement.model: placement.is_pinned for placement in self.wanted.placements}
        acting = self._loader.acting or not self._settled(self.snapshot)
        unwanted = {wish.model: wish.once_elsewhere for wish in self.wanted.unwanted if wish.id not in self._dismissed}
        return Site(self.snapshot, placed, self._loader.failing, ready_since_ms, acting, unwanted)

    def _settled(self, snapshot: WorkerSnapshot) -> bool:
        """Whether what was heard shows what the latest action did: a status may be older than the time it comes at."""
        action, ended_at = self._loader.action, self._loader.ended_at
        if action is None or time.monotonic() - ended_at > SETTLE_SECONDS:
            return True
        there = {resident.folder for resident in snapshot.models}
        loaded = not action.load or action.load in there or action.load in self._loader.failing
        return self._heard_at > ended_at and loaded and not there.intersection(action.evict)

    def act(self, action: Action) -> None:
        if self._client is not None and self.snapshot is not None:
            asleep = any(folder.in_host_memory for folder in self.snapshot.folders if folder.model == action.load)
            self._loader.act(self._client, self.snapshot.epoch, action, asleep=asleep)

    def _moved(self, moved: Moved) -> None:
        if not moved.error:
            gone = {folder.partition("@")[0] for folder in moved.action.evict}
            self._dismissed |= {wish.id for wish in self.wanted.unwanted if wish.model in gone}
        self._mirror.moved(moved)

    def _state(self, snapshot: WorkerSnapshot, placed: PlacedModel) -> str:
        """How far a placement is, for people."""
        policy = self.policies.get(placed.model)
        resident = next((r for r in snapshot.models if r.model == placed.model), None)
        if resident is not None and resident.state == "loading":
            return f"loading: {int(resident.progress * 10) * 10} %"
        if resident is not None and resident.state in ("ready", "unloading"):
            return resident.state
        failure = self._loader.failing.get(policy.folder) if policy is not None else None
        return failure or self.refused.get(placed.model) or "waiting for room"


def _cordoned(snapshot: WorkerSnapshot, wanted: Assignment) -> WorkerSnapshot:
    """As the worker is, with what is placed there as on its way."""
    absent = [placed for placed in wanted.placements if snapshot.resident(placed.model) is None]
    coming = tuple(ResidentModel(placed.model, "loading", progress=0.0, engine=placed.engine) for placed in absent)
    return dataclasses.replace(snapshot, models=snapshot.models + coming, cordoned=True)

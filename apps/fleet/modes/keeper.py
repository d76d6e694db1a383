"""The leader's care for modes: carries every open switch through, and has managed hosts run what they should and no more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from django.conf import settings
from redis.asyncio import Redis

from apps.core.database import in_database
from apps.core.errors import InvalidRequest, ServiceError
from apps.core.tasks import end
from apps.fleet import registry
from apps.fleet.models import Host, ModeSwitch
from apps.fleet.modes import demand, record, ssh
from apps.fleet.modes.saga import Saga

ABSENT_SECONDS = 8.0  # unheard for so long, a daemon is started again
REPAIR_SECONDS = 20.0  # between two tries at one host
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kept:
    """A managed host at rest: which workers it should have, and how to have them."""

    id: int
    name: str
    target: ssh.SshTarget
    mode: str
    epoch: int
    workers: frozenset[str]
    unswept: int | None


class ModeKeeper:
    """Lives while its controller leads. `sync` looks at the record and never waits for a host."""

    def __init__(self, redis: Redis, name: str, rescan: Callable[[], None]) -> None:
        self._redis, self._name, self._rescan = redis, name, rescan
        self._switches: dict[int, asyncio.Task[None]] = {}
        self._repairs: dict[int, asyncio.Task[None]] = {}
        self._whole: dict[int, float] = {}  # when each host was last seen with all of its workers, or repaired

    async def sync(self) -> None:
        try:
            await demand.act(self._redis)
        except ServiceError as error:
            _LOG.info("no switch on demand: %s", error)
        switches, hosts = await in_database(_record)
        for switch_id in switches:
            if switch_id not in self._switches or self._switches[switch_id].done():
                self._switches[switch_id] = asyncio.create_task(self._carry(switch_id), name=f"switch {switch_id}")
        self._switches = {pk: task for pk, task in self._switches.items() if pk in switches or not task.done()}
        alive = {w.worker_id for w in await registry.workers(self._redis, timeout_ms=settings.ENV.worker_timeout_ms)}
        now = time.monotonic()
        for host in hosts:
            if host.workers <= alive and host.unswept is None:
                self._whole[host.id] = now
            elif now - self._whole.setdefault(host.id, now) > ABSENT_SECONDS:
                self._whole[host.id] = now + REPAIR_SECONDS - ABSENT_SECONDS
                self._repairs[host.id] = asyncio.create_task(_repair(host), name=f"repair {host.name}")

    async def stop(self) -> None:
        """What a switch was at is done again by the next leader."""
        tasks = [*self._switches.values(), *self._repairs.values()]
        self._switches, self._repairs, self._whole = {}, {}, {}
        await end(*tasks)

    async def _carry(self, switch_id: int) -> None:
        try:
            job = await in_database(partial(record.take_over, switch_id, self._name))
            self._rescan()
            await Saga(self._redis, job, self._name, self._rescan).run()
        except record.Superseded:
            _LOG.info("switch %s is another controller's, or over", switch_id)
        except Exception:  # noqa: BLE001  The next round takes it up again, where it was.
            _LOG.exception("switch %s stopped", switch_id)


def _record() -> tuple[set[int], list[Kept]]:
    """The open switches, and the managed hosts that have none."""
    switches = dict(ModeSwitch.objects.filter(ended_at=None).values_list("host_id", "pk"))
    hosts = Host.objects.filter(is_managed=True).exclude(pk__in=switches)
    return set(switches.values()), [kept for host in hosts if (kept := _kept(host)) is not None]


def _kept(host: Host) -> Kept | None:
    """None for a host whose record cannot be connected to."""
    try:
        target = record.target_of(host)
    except InvalidRequest:
        return None
    workers = frozenset(worker.name for worker in record.workers_of(host, host.mode))
    return Kept(host.pk, host.name, target, host.mode, host.epoch, workers, host.unswept_epoch)


async def _repair(host: Kept) -> None:
    """Ends what a switch left behind, and has the daemons that should be there."""
    try:
        if host.unswept is not None:
            await asyncio.to_thread(ssh.stop, host.target, host.unswept)
            left = Host.objects.filter(pk=host.id, unswept_epoch=host.unswept)
            await in_database(lambda: left.update(unswept_epoch=None))
        await asyncio.to_thread(ssh.start, host.target, host.mode, host.epoch)
        _LOG.warning("host %s: daemons that were gone were started again, and those of no use ended", host.name)
    except ServiceError as error:
        _LOG.warning("host %s: its daemons cannot be started: %s", host.name, error)

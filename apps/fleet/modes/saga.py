"""Carries one mode switch through: does the step that plan.py names, records how it went, until it has ended.

Whoever leads next goes on from the record when this controller dies: every step may be done again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

from django.conf import settings
from redis.asyncio import Redis

from apps.core.database import in_database
from apps.core.errors import ServiceError
from apps.core.types import WorkerSnapshot
from apps.fleet import registry
from apps.fleet.models import Mode
from apps.fleet.modes import daemons, record, ssh
from apps.fleet.modes.daemons import work_of
from apps.fleet.modes.plan import End, Step, decide
from apps.fleet.selectors import Assignment

POLL_SECONDS = 0.05
HEAR_SECONDS = 60.0  # from listening to being ready to load: on a GPU host torch takes its time
PROBE_SECONDS = 3.0
SHOW_SECONDS = 6.0  # until a change of the record shows in the registry
LEAVE_SECONDS = 5.0  # until the dispatchers have let go of what was handed over
INSIST_SECONDS = 40.0  # a way back is not given up at the first failure
INSIST_PAUSE_SECONDS = 1.0
_LOG = logging.getLogger(__name__)


class Saga:
    """One switch in one controller. `rescan` has the controller look at the record at once."""

    def __init__(self, redis: Redis, job: record.Job, runner: str, rescan: Callable[[], None]) -> None:
        self._redis, self._job, self._runner, self._rescan = redis, job, runner, rescan
        self._do: dict[Step, Callable[[], Awaitable[str]]] = {
            Step.START: lambda: self._start(job.to_mode, job.epoch, job.from_epoch),
            Step.VERIFY: lambda: self._hear(job.new, job.to_mode, job.epoch),
            Step.CORDON: self._cordon,
            Step.DRAIN: self._drain,
            Step.HAND_OVER: self._hand_over,
            Step.STOP: lambda: self._stop(job.from_epoch),
            Step.LOAD: lambda: self._load(job.new, job.epoch),
            Step.UNCORDON: lambda: self._reopen(job.new),
            Step.PROBE: self._probe,
            Step.RETURN: self._return,
            Step.SWEEP: self._sweep,
            Step.RENEW: lambda: self._set(mode=job.from_mode, epoch=job.epoch + 1, is_cordoned=True),
            Step.RESTART: lambda: self._insist(lambda: self._start(job.from_mode, job.epoch + 1, 0)),
            Step.RECHECK: lambda: self._hear(job.old, job.from_mode, job.epoch + 1),
            Step.RELOAD: lambda: self._load(job.old, job.epoch + 1),
            Step.REOPEN: lambda: self._reopen(job.old),
        }

    async def run(self) -> End:
        """Raises Superseded when another controller has it, and database errors."""
        while True:
            step = decide(await in_database(partial(record.history, self._job.id)))
            if isinstance(step, End):
                await in_database(partial(record.finish, self._job.id, self._runner, step))
                self._rescan()
                return step
            await self._take(step)

    async def _take(self, step: Step) -> None:
        row = await in_database(partial(record.begin, self._job.id, self._runner, step))
        try:
            succeeded, detail = True, await self._do[step]()
        except ServiceError as error:
            succeeded, detail = False, f"{error.message} ({error.code})"
        except TimeoutError:
            succeeded, detail = False, "it took too long"
        _LOG.info("host %s to %s: %s %s %s", self._job.host, self._job.to_mode, step, "done" if succeeded else "failed", detail)
        await in_database(partial(record.end, self._job.id, self._runner, row, succeeded=succeeded, detail=detail))

    async def _set(self, **values: object) -> str:
        await in_database(partial(record.host_set, self._job.id, self._runner, **values))
        self._rescan()
        return ""

    # --- Over SSH ---

    async def _start(self, mode: str, epoch: int, beside: int) -> str:
        await asyncio.to_thread(ssh.start, self._job.target, Mode(mode), epoch, beside)
        return f"epoch {epoch}"

    async def _stop(self, epoch: int) -> str:
        answer = await asyncio.to_thread(ssh.stop, self._job.target, epoch)
        return f"epoch {epoch}: {answer.get('stopped', 0)} processes"

    async def _insist(self, act: Callable[[], Awaitable[str]]) -> str:
        deadline = time.monotonic() + INSIST_SECONDS
        while True:
            try:
                return await act()
            except ssh.HostError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(INSIST_PAUSE_SECONDS)

    # --- Over gRPC ---

    async def _hear(self, workers: tuple[Assignment, ...], mode: str, epoch: int) -> str:
        """Every worker answers under its own name, in the mode and of the epoch. Raises ServiceError or TimeoutError."""
        async with asyncio.timeout(HEAR_SECONDS):
            await asyncio.gather(*(daemons.heard_as(worker, mode, epoch) for worker in workers))
        return f"{len(workers)} workers"

    async def _probe(self) -> str:
        """Raises unless every old daemon is there and not on its way out."""
        async with asyncio.timeout(PROBE_SECONDS):
            found = await asyncio.gather(*(daemons.status(worker) for worker in self._job.old))
        if any(status.draining or status.epoch != self._job.from_epoch for status in found):
            raise ServiceError("the old daemons are leaving")
        return "the old daemons still serve"

    async def _load(self, workers: tuple[Assignment, ...], epoch: int) -> str:
        async with asyncio.timeout(settings.ENV.switch_load_ms / 1000):
            counts = await asyncio.gather(*(daemons.load(worker, epoch) for worker in workers))
        return f"{sum(counts)} models"

    # --- In the record and the registry ---

    async def _cordon(self) -> str:
        await self._set(is_cordoned=True)
        await self._until(lambda shown: all(w.cordoned for w in _among(shown, self._job.old)))
        return ""

    async def _drain(self) -> str:
        """A moment for what is about to end anyway; more is not needed, since the rest moves."""
        try:
            seconds = settings.ENV.switch_drain_ms / 1000
            await self._until(lambda shown: not sum(map(work_of, _among(shown, self._job.old))), seconds)
        except TimeoutError:
            left = sum(map(work_of, _among(await self._registry(), self._job.old)))
            return f"{left} sequences move"
        return "nothing runs"

    async def _hand_over(self) -> str:
        """Old workers leave the registry, so dispatchers give back what runs there, without blame, to wait for the new ones."""
        await self._until(lambda shown: len(_among(shown, self._job.new)) == len(self._job.new))
        await self._set(mode=self._job.to_mode, epoch=self._job.epoch, is_cordoned=True)
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await asyncio.gather(*(daemons.empty(worker) for worker in self._job.old))
        except (TimeoutError, ServiceError):
            return "some had not left in time"
        return "all have left"

    async def _return(self) -> str:
        job = self._job
        await self._set(mode=job.from_mode, epoch=job.from_epoch, is_cordoned=False, unswept_epoch=job.epoch)
        return f"{job.from_mode}, epoch {job.from_epoch}"

    async def _sweep(self) -> str:
        detail = await self._insist(lambda: self._stop(self._job.epoch))
        await self._set(unswept_epoch=None)
        return detail

    async def _reopen(self, workers: tuple[Assignment, ...]) -> str:
        await self._set(is_cordoned=False)
        try:
            await self._until(lambda shown: any(not w.cordoned for w in _among(shown, workers)))
        except TimeoutError:
            return "not yet heard"
        return ""

    async def _registry(self) -> list[WorkerSnapshot]:
        return await registry.workers(self._redis, timeout_ms=settings.ENV.worker_timeout_ms)

    async def _until(self, holds: Callable[[list[WorkerSnapshot]], bool], seconds: float = SHOW_SECONDS) -> None:
        """Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while not holds(await self._registry()):  # noqa: ASYNC110  It is in Redis, which raises no event here.
                await asyncio.sleep(POLL_SECONDS)


def _among(shown: list[WorkerSnapshot], workers: tuple[Assignment, ...]) -> list[WorkerSnapshot]:
    names = {worker.name for worker in workers}
    return [snapshot for snapshot in shown if snapshot.worker_id in names]

"""What runs durable jobs: each claimed from Postgres, its requests followed in the queue by names that no crash changes.

A runner that dies leaves its claims to lapse; the next one finds the requests where they are, or their results where they
were written, and nothing runs or is charged twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from django.db import Error as DatabaseError
from redis.exceptions import RedisError

from apps.api.batch_runner import run_batch
from apps.api.video_runner import run_video
from apps.api.webhooks import deliver_due
from apps.core.database import in_database
from apps.core.errors import ServiceError
from apps.core.tasks import end
from apps.jobs import services as jobs
from apps.jobs.models import Batch, Claimed, Video

POLL_SECONDS = 0.5
PURGE_SECONDS = 600.0
VIDEOS_AT_ONCE = 16
BATCHES_AT_ONCE = 4
_LOG = logging.getLogger(__name__)
J = TypeVar("J", bound=Claimed)


class Background:
    """One process's share of the jobs; any number may run beside each other."""

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set; what still runs is given back."""
        loops = [
            asyncio.create_task(self._claim(Video, run_video, VIDEOS_AT_ONCE)),
            asyncio.create_task(self._claim(Batch, run_batch, BATCHES_AT_ONCE)),
            asyncio.create_task(self._every(POLL_SECONDS, deliver_due)),
            asyncio.create_task(self._every(PURGE_SECONDS, lambda: in_database(jobs.purge))),
        ]
        await stop.wait()
        await end(*loops)

    async def _every(self, seconds: float, work: Callable[[], Awaitable[object]]) -> None:
        while True:
            try:
                await work()
            except (DatabaseError, RedisError, OSError) as error:
                _LOG.warning("a store is unavailable: %s", type(error).__name__)
            await asyncio.sleep(seconds)

    async def _claim(self, kind: type[J], run: Callable[[J], Awaitable[None]], most: int) -> None:
        """Takes what is due while there is room for it."""
        running: set[asyncio.Task[None]] = set()

        async def take() -> None:
            while len(running) < most and (job := await in_database(lambda: jobs.claim(kind))) is not None:
                task = asyncio.create_task(_guarded(job, run), name=f"job {job.pk}")
                running.add(task)
                task.add_done_callback(running.discard)

        try:
            await self._every(POLL_SECONDS, take)
        finally:
            await end(*running)


async def _guarded(job: J, run: Callable[[J], Awaitable[None]]) -> None:
    """Whatever stops a run but its own end, the job is there for the next one."""
    try:
        await run(job)
    except asyncio.CancelledError:
        await asyncio.shield(in_database(lambda: jobs.give_back(job)))
        raise
    except (ServiceError, DatabaseError, RedisError, OSError) as error:
        _LOG.warning("job %s waits: %s", job.pk, error if isinstance(error, ServiceError) else type(error).__name__)
        await in_database(lambda: jobs.give_back(job, seconds=5))
    except Exception:  # noqa: BLE001  A bug met by one job must not end the others; its claim lapses.
        _LOG.exception("job %s met a bug", job.pk)

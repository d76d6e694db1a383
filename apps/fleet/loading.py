"""Carries out what the manager decided for one worker: one action at a time, and a failed load again after a growing pause."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from django.utils import timezone

from apps.core.errors import ServiceError
from apps.core.tasks import end
from apps.fleet.daemon_client import DaemonClient
from apps.fleet.planning import Action

RETRY_SECONDS = 10.0
MAX_RETRY_SECONDS = 300.0
GRACE_MS = 60_000  # for what runs on a model that leaves
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Failure:
    count: int
    until: float  # time.monotonic() of the next try
    text: str


@dataclass(frozen=True, slots=True)
class Moved:
    """An action that has ended, for the record; `error` is empty when it did what it should."""

    action: Action
    asleep: bool  # what was loaded came from host memory
    started_at: datetime
    error: str = ""
    ended_at: datetime = field(default_factory=timezone.now)


class Loader:
    """`act` never blocks. `ended_at` is when the latest action was over, by time.monotonic(); `tell` hears of each."""

    def __init__(self, tell: Callable[[Moved], None]) -> None:
        self._tell = tell
        self.action: Action | None = None
        self.ended_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._failures: dict[str, _Failure] = {}

    @property
    def acting(self) -> bool:
        return self._task is not None and not self._task.done()

    @property
    def failing(self) -> dict[str, str]:
        """Folders that are not to be tried yet, with why."""
        now = time.monotonic()
        return {folder: failure.text for folder, failure in self._failures.items() if now < failure.until}

    def act(self, client: DaemonClient, epoch: int, action: Action, *, asleep: bool) -> None:
        """Begins an action. Only while no other is under way."""
        self.action = action
        work = self._act(client, epoch, action, asleep)
        self._task = asyncio.create_task(work, name=f"{action.worker}: {action.load or 'unload'}")

    async def _act(self, client: DaemonClient, epoch: int, action: Action, asleep: bool) -> None:
        started = timezone.now()
        _LOG.info("%s: loading %r, evicting %r: %s", action.worker, action.load, action.evict, action.reason)
        try:
            for folder in action.evict:
                await client.unload_model(folder, epoch, GRACE_MS)
            if action.load:
                async for _ in client.load_model(action.load, epoch, action.engine):
                    continue  # the worker's status tells how far it is
                self._failures.pop(action.load, None)
            self._tell(Moved(action, asleep, started))
        except ServiceError as error:
            _LOG.warning("%r on %s failed: %s", action.load or action.evict, action.worker, error)
            if action.load:
                self._failures[action.load] = self._failed(action.load, str(error))
            self._tell(Moved(action, asleep, started, str(error)))
        finally:
            self.ended_at = time.monotonic()

    def _failed(self, folder: str, reason: str) -> _Failure:
        known = self._failures.get(folder)
        count = 1 if known is None else known.count + 1
        pause = min(MAX_RETRY_SECONDS, RETRY_SECONDS * 2 ** min(count - 1, 10))
        text = f"failed: {reason[:120]}; tried {count} times, again within {pause:.0f} s"
        return _Failure(count, time.monotonic() + pause, text)

    async def stop(self) -> None:
        """Lets go of what is under way; the daemon goes on with it, and the next call joins it."""
        if self._task is not None:
            await end(self._task)

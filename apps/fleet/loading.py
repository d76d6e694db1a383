"""Loads what is placed on one worker: one model at a time, and a failure again after a growing pause."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from apps.core.errors import ServiceError
from apps.core.types import ResidentModel, WorkerSnapshot
from apps.fleet.daemon_client import DaemonClient
from apps.fleet.selectors import PlacedModel

RETRY_SECONDS = 10.0
MAX_RETRY_SECONDS = 300.0
SWITCH_GRACE_MS = 60_000  # for what runs under the engine that a model leaves
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Failure:
    count: int
    until: float  # time.monotonic() of the next try
    text: str


class Loader:
    """Asked about each placed model whenever the worker is heard; never blocks."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None
        self._loading = ""
        self._failures: dict[str, _Failure] = {}

    def place(self, client: DaemonClient, worker: WorkerSnapshot, placed: PlacedModel) -> str:
        """Sees to it that the worker will hold the model, under its engine. Returns how far that is, for people."""
        model, resident = placed.model, worker.resident(placed.model)
        leaves = resident is not None and resident.state == "ready" and resident.engine != placed.engine
        if resident is not None and resident.state in ("ready", "loading", "unloading") and not leaves:
            return self._known(resident)
        if self._task is not None and not self._task.done():
            return "loading" if model == self._loading else f"waiting: {self._loading} is loading"
        failure = self._failures.get(model)
        if failure is not None and time.monotonic() < failure.until:
            return failure.text
        self._loading = model
        self._task = asyncio.create_task(self._load(client, worker, placed, leaves), name=f"load {model}")
        return f"going over to the {placed.engine} engine" if leaves else "loading"

    def _known(self, resident: ResidentModel) -> str:
        if resident.state == "ready":
            self._failures.pop(resident.model, None)
        if resident.state == "loading":
            return f"loading: {int(resident.progress * 10) * 10} %"
        return resident.state

    async def _load(self, client: DaemonClient, worker: WorkerSnapshot, placed: PlacedModel, leaves: bool) -> None:
        """`leaves`: it is there under the other engine, and has to go first."""
        model = placed.model
        try:
            if leaves:
                await client.unload_model(model, worker.epoch, SWITCH_GRACE_MS)
            async for _ in client.load_model(model, worker.epoch, placed.engine):
                continue  # the worker's status tells how far it is
        except ServiceError as error:
            _LOG.warning("loading %s on %s failed: %s", model, worker.worker_id, error)
            self._failures[model] = self._failed(model, str(error))

    def _failed(self, model: str, reason: str) -> _Failure:
        known = self._failures.get(model)
        count = 1 if known is None else known.count + 1
        pause = min(MAX_RETRY_SECONDS, RETRY_SECONDS * 2 ** min(count - 1, 10))
        text = f"failed: {reason[:120]}; tried {count} times, again within {pause:.0f} s"
        return _Failure(count, time.monotonic() + pause, text)

    async def stop(self) -> None:
        """Lets go of a load under way; the daemon goes on with it, and the next call joins it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

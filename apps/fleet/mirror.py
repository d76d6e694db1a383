"""Keeps one worker's rows in Postgres in step with what is known of it: what changed, and at most once a second.

Nobody waits for these rows. While Postgres is away the newest values wait here, and serving goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

from django.db import Error, transaction
from django.db.models import F
from django.utils import timezone

from apps.core.database import in_database
from apps.fleet.loading import Moved
from apps.fleet.models import Gpu, Model, Movement, Placement, UnloadWish, Worker

WRITE_SECONDS = 1.0
RETRY_SECONDS = 5.0
MAX_BYTES = 2**63 - 1  # a bigint's
MAX_MOVES = 1000  # that wait for Postgres
KEEP_MOVES = timedelta(days=30)
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Status:
    """`minute` changes once a minute, so that `seen_at` is never older than that while the worker is heard."""

    text: str
    minute: int


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Peak:
    memory_bytes: int


Value: TypeAlias = "Status | Device | Peak | str"


class Mirror:
    """`run` writes what the other methods were last told."""

    def __init__(self, worker_id: int) -> None:
        self._worker_id = worker_id
        self._wanted: dict[str | int, Value] = {}
        self._written: dict[str | int, Value] = {}
        self._moves: deque[Moved] = deque(maxlen=MAX_MOVES)
        self._changed = asyncio.Event()

    def status(self, text: str) -> bool:
        """What the worker is doing. True when this is news."""
        known = self._wanted.get("status")
        self._want("status", Status(text[:200], int(timezone.now().timestamp()) // 60))
        return not isinstance(known, Status) or known.text != text[:200]

    def device(self, name: str, memory_bytes: int) -> None:
        """Where it runs; a name of "?" means that it does not know yet."""
        if name not in ("", "?"):
            self._want("device", Device(name, min(memory_bytes, MAX_BYTES)))

    def peak(self, model: str, memory_bytes: int) -> None:
        """The most that a model was measured to take here; 0 is not known."""
        if memory_bytes:
            self._want(model, Peak(min(memory_bytes, MAX_BYTES)))

    def placement(self, placement_id: int, state: str) -> None:
        self._want(placement_id, state[:200])

    def moved(self, moved: Moved) -> None:
        """An action has ended."""
        self._moves.append(moved)
        self._changed.set()

    def _want(self, key: str | int, value: Value) -> None:
        self._wanted[key] = value
        if self._written.get(key) != value:
            self._changed.set()

    async def run(self) -> None:
        """Writes until it is cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            pause = WRITE_SECONDS if await self._write() else RETRY_SECONDS
            await asyncio.sleep(pause)

    async def _write(self) -> bool:
        news = {key: value for key, value in self._wanted.items() if self._written.get(key) != value}
        moves = list(self._moves)
        try:
            await in_database(lambda: _save(self._worker_id, news, moves))
        except Error as error:
            _LOG.warning("the record of worker %s waits: %s", self._worker_id, type(error).__name__)
            self._changed.set()
            return False
        self._written.update(news)
        self._moves = deque((moved for moved in self._moves if moved not in moves), MAX_MOVES)
        return True


@transaction.atomic
def _save(worker_id: int, news: dict[str | int, Value], moves: Sequence[Moved]) -> None:
    """A row that was deleted meanwhile takes no update, which is right."""
    worker = Worker.objects.filter(pk=worker_id)
    for key, value in news.items():
        if isinstance(value, Status):
            worker.update(status=value.text, seen_at=timezone.now() if _alive(value.text) else F("seen_at"))
        elif isinstance(value, Device):
            _save_device(worker_id, value)
        elif isinstance(value, Peak):
            Model.objects.filter(name=key, measured_bytes__lt=value.memory_bytes).update(measured_bytes=value.memory_bytes)
        else:
            Placement.objects.filter(pk=key).update(state=value)
    if moves and worker.exists():
        _save_moves(worker_id, moves)


def _save_moves(worker_id: int, moves: Sequence[Moved]) -> None:
    """Wishes to unload what has left are fulfilled. Old movements are forgotten."""
    for moved in moves:
        action = moved.action
        Movement.objects.create(
            worker_id=worker_id, loaded=action.load, evicted=" ".join(action.evict)[:500], reason=action.reason[:200],
            from_host_memory=moved.asleep, started_at=moved.started_at, ended_at=moved.ended_at, error=moved.error[:200],
        )  # fmt: skip
        if not moved.error and action.evict:
            gone = {folder.partition("@")[0] for folder in action.evict}
            UnloadWish.objects.filter(worker_id=worker_id, model__name__in=gone).delete()
    Movement.objects.filter(worker_id=worker_id, ended_at__lt=timezone.now() - KEEP_MOVES).delete()


def _alive(status: str) -> bool:
    return not status.startswith("unreachable")


def _save_device(worker_id: int, device: Device) -> None:
    worker = Worker.objects.filter(pk=worker_id).first()
    if worker is not None:
        gpu, _ = Gpu.objects.update_or_create(
            host_id=worker.host_id, device=device.name, defaults={"memory_bytes": device.memory_bytes}
        )
        Worker.objects.filter(pk=worker_id).update(gpu=gpu)

"""What the placement board shows: the record of the fleet, with what is known of it live."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from django.conf import settings
from pydantic import BaseModel
from redis.asyncio import Redis
from redis.exceptions import RedisError

from apps.console.cards import Chip, Memory, chips, memory
from apps.core.database import in_database
from apps.core.errors import ServiceError
from apps.core.redis import connect, server_time_ms
from apps.core.types import WorkerSnapshot
from apps.fleet import registry
from apps.fleet.controller import LEADER_KEY
from apps.fleet.models import Host, Model, ModeSwitch, Movement, Worker
from apps.metrics import selectors as metrics
from apps.scheduler import services

RECENT_SWITCHES, RECENT_MOVEMENTS = 5, 8
Rates = Mapping[tuple[str, str], float]


@dataclass(frozen=True, slots=True)
class WorkerCard:
    """`state` is serving, draining, drained, cordoned, stuck, unreachable, fenced, resting, disabled or unknown."""

    id: int
    name: str
    address: str
    device: str
    mode: str
    state: str
    status: str
    is_draining: bool
    epoch: int
    step: int
    seen_ms_ago: int | None  # None: not heard
    memory: Memory
    models: list[Chip]


@dataclass(frozen=True, slots=True)
class HostCard:
    id: int
    name: str
    address: str
    mode: str
    epoch: int
    is_managed: bool
    is_cordoned: bool
    is_switching: bool
    workers: list[WorkerCard]


@dataclass(frozen=True, slots=True)
class LaneCard:
    model: str
    waiting: int
    running: int
    cause: str


@dataclass(frozen=True, slots=True)
class StepCard:
    step: str
    started_at: datetime
    ended_at: datetime | None
    succeeded: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class SwitchCard:
    id: int
    host: str
    from_mode: str
    to_mode: str
    state: str
    reason: str
    requested_by: str
    created_at: datetime
    ended_at: datetime | None
    steps: list[StepCard]


@dataclass(frozen=True, slots=True)
class MovementCard:
    id: int
    worker: str
    loaded: str
    evicted: str
    reason: str
    from_host_memory: bool
    seconds: float
    ended_at: datetime
    error: str


class Board(BaseModel):
    """`problem` says which store does not answer; `leader` is the fleet controller at work, empty when there is none."""

    leader: str
    problem: str
    models: list[str]  # that may be placed
    hosts: list[HostCard]
    lanes: list[LaneCard]
    switches: list[SwitchCard]
    movements: list[MovementCard]


@dataclass(frozen=True, slots=True)
class Live:
    """What Redis and ClickHouse know."""

    workers: dict[str, WorkerSnapshot] = field(default_factory=dict)
    now_ms: int = 0
    leader: str = ""
    lanes: list[LaneCard] = field(default_factory=list)
    rates: Rates = field(default_factory=dict)
    problem: str = ""


async def board() -> Board:
    live = await _live()
    return await in_database(lambda: _board(live))


async def _live() -> Live:
    try:
        async with connect(settings.ENV.redis_url) as redis:
            return await _ask(redis)
    except (RedisError, ServiceError):
        return Live(problem="Redis does not answer: what is live is unknown.")


async def _ask(redis: Redis) -> Live:
    alive = await registry.workers(redis, timeout_ms=settings.ENV.worker_timeout_ms)
    load = await services.load()
    lanes = [LaneCard(name, lane["waiting"], lane["running"], lane["cause"]) for name, lane in load["lanes"].items()]
    return Live(
        {snapshot.worker_id: snapshot for snapshot in alive}, await server_time_ms(redis), await redis.get(LEADER_KEY) or "",
        [lane for lane in lanes if lane.waiting or lane.running], await metrics.rates(),
    )  # fmt: skip


def _board(live: Live) -> Board:
    hosts = Host.objects.prefetch_related("workers__placements__model", "workers__unload_wishes__model", "workers__gpu")
    switches = ModeSwitch.objects.select_related("host").prefetch_related("steps")[:RECENT_SWITCHES]
    under_way = set(ModeSwitch.objects.filter(ended_at=None).values_list("host_id", flat=True))
    return Board(
        leader=live.leader, problem=live.problem,
        models=list(Model.objects.filter(is_enabled=True).order_by("name").values_list("name", flat=True)),
        hosts=[_host(host, host.pk in under_way, live) for host in hosts],
        lanes=live.lanes,
        switches=[_switch(switch) for switch in switches],
        movements=[_movement(row) for row in Movement.objects.select_related("worker")[:RECENT_MOVEMENTS]],
    )  # fmt: skip


def _host(host: Host, is_switching: bool, live: Live) -> HostCard:
    return HostCard(host.pk, host.name, host.address, host.mode, host.epoch, host.is_managed, host.is_cordoned, is_switching,
                    [_worker(worker, host, live) for worker in host.workers.all()])  # fmt: skip


def _worker(worker: Worker, host: Host, live: Live) -> WorkerCard:
    snapshot = live.workers.get(worker.name)
    return WorkerCard(
        id=worker.pk, name=worker.name, address=worker.address,
        device=snapshot.device if snapshot else worker.gpu.device if worker.gpu else "",
        mode=worker.mode, state=_state(worker, host, snapshot), status=worker.status, is_draining=worker.is_draining,
        epoch=snapshot.epoch if snapshot else 0, step=snapshot.step if snapshot else 0,
        seen_ms_ago=max(0, live.now_ms - snapshot.seen_ms) if snapshot else None,
        memory=memory(snapshot), models=chips(worker, snapshot, live.rates),
    )  # fmt: skip


def _state(worker: Worker, host: Host, snapshot: WorkerSnapshot | None) -> str:
    if not worker.is_enabled:
        return "disabled"
    if snapshot is None:
        return _absence(worker, host)
    if snapshot.cordoned:
        return "cordoned"
    if snapshot.draining or worker.is_draining:
        return "draining" if any(resident.in_flight for resident in snapshot.models) else "drained"
    return "serving"


def _absence(worker: Worker, host: Host) -> str:
    """Why a worker that is wanted is not heard: the controller's last word."""
    if host.is_managed and worker.mode != host.mode:
        return "resting"
    words: Iterable[tuple[str, str]] = (("stuck", "stuck"), ("of epoch", "fenced"), ("never", "unknown"))
    return next((state for beginning, state in words if worker.status.startswith(beginning)), "unreachable")


def _switch(switch: ModeSwitch) -> SwitchCard:
    steps = [StepCard(s.step, s.started_at, s.ended_at, s.succeeded, s.detail) for s in switch.steps.all()]
    return SwitchCard(
        switch.pk, switch.host.name, switch.from_mode, switch.to_mode, switch.state, switch.reason, switch.requested_by,
        switch.created_at, switch.ended_at, steps,
    )  # fmt: skip


def _movement(row: Movement) -> MovementCard:
    seconds = round((row.ended_at - row.started_at).total_seconds(), 1)
    return MovementCard(
        row.pk, row.worker.name, row.loaded, row.evicted, row.reason, row.from_host_memory, seconds, row.ended_at, row.error
    )

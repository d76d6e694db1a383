"""The only writer of the queue's keys. lua/common.lua lists them; every function here is one atomic transition."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.conf import settings
from redis.asyncio import Redis

from apps.accounts.quota import SETTLE_LUA
from apps.core.redis import LuaScript
from apps.core.types import InferenceRequest, Outcome
from apps.scheduler.affinity import beginnings, tokens_of
from apps.scheduler.codec import Garbled, decode_request, encode_request
from apps.scheduler.cost import Cost
from apps.scheduler.policy import REAP_LIMIT
from apps.scheduler.router import Waiting

_LUA = Path(__file__).parent / "lua"
_COMMON, _END = _LUA / "common.lua", _LUA / "end_request.lua"
_ENQUEUE = LuaScript(_LUA / "enqueue.lua", _COMMON)
_RESTORE = LuaScript(_LUA / "restore.lua", _COMMON)
_EXPLAIN = LuaScript(_LUA / "explain.lua", _COMMON)
_STATUS = LuaScript(_LUA / "status.lua", _COMMON)
_PEEK = LuaScript(_LUA / "peek.lua", _COMMON)
_LEASE = LuaScript(_LUA / "lease.lua", _COMMON)
_EMIT = LuaScript(_LUA / "emit.lua", _COMMON)
_RENEW = LuaScript(_LUA / "renew.lua", _COMMON)
_FINISH = LuaScript(_LUA / "finish.lua", _COMMON, SETTLE_LUA, _END)
_REQUEUE = LuaScript(_LUA / "requeue.lua", _COMMON, SETTLE_LUA, _END)
_CHECKPOINT = LuaScript(_LUA / "checkpoint.lua", _COMMON)
_REAP = LuaScript(_LUA / "reap.lua", _COMMON, SETTLE_LUA, _END)
ENOUGH_ENDS = 5  # before a measured pace is believed
MAX_PACE = 10_000.0


@dataclass(frozen=True, slots=True)
class Lease:
    """A request that this dispatcher runs until it ends, fails or the lease lapses. `attempt` fences it."""

    request: InferenceRequest
    attempt: int
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Emission:
    """What one step produced for one request: (choice, first_index, count, encoded event) for each delta."""

    request_id: str
    attempt: int
    cached_tokens: int
    deltas: tuple[tuple[int, int, int, str], ...]
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request was put: enough to put it there again. The floats are as Redis wrote them, to the bit."""

    args: tuple[str | int | float, ...]
    arrival: str
    start: str
    virtual: str
    arrived_ms: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """The bound that stands against a request, and when another try would be admitted."""

    verdict: str
    retry_ms: int


async def enqueue(redis: Redis, request: InferenceRequest, cost: Cost, *, pace: float) -> Place | Refusal:
    """Admits the request unless a bound of its lane stands against it. The lane's drain is its work over `pace`."""
    env = settings.ENV
    limits = env.classes[request.priority]
    args: tuple[str | int | float, ...] = (
        request.id, request.model, request.org_id, request.key_id, encode_request(request),
        request.num_choices, request.num_prompt_tokens, cost.fixed_ms, cost.token_ms, cost.tokens,
        request.weight, limits.boost_ms, limits.queue_timeout_ms, limits.total_timeout_ms,
        limits.max_wait_ms, env.queue_max_requests, env.queue_max_requests_per_org,
        env.queue_max_drain_ms, pace, int(request.priority), int(request.stream), request.image_tokens,
        " ".join(beginnings(request.model, request.org_id, request.prompts[0])) if request.prompts else "",
    )  # fmt: skip
    verdict, retry_ms, *place = await _ENQUEUE(redis, keys=[], args=args)
    return Place(args, *place) if verdict == "admitted" else Refusal(verdict, int(retry_ms))


async def restore(redis: Redis, place: Place, *, generation: int, payloads: Sequence[str], seen: dict[int, int]) -> bool:
    """Puts back a request that Redis has lost: `payloads` are its events so far, `seen` the tokens of each choice.
    `generation` grows with every loss. False when the request is there."""
    again = (place.arrival, place.start, place.virtual, place.arrived_ms, generation, json.dumps(payloads), json.dumps(seen))
    return bool(await _RESTORE(redis, keys=[], args=[*place.args, *again]))


async def explain(redis: Redis, lane: str, cause: str) -> None:
    """Says why the lane's head waits, from now on."""
    await _EXPLAIN(redis, keys=[], args=[lane, cause])


@dataclass(frozen=True, slots=True)
class Status:
    """A request's record, where its wait went so far (ms by cause), and its lane while it waits."""

    fields: dict[str, str]
    wait: dict[str, int]
    lane: dict[str, Any]


async def status(redis: Redis, request_id: str) -> Status | None:
    """None when the request is unknown, or no longer kept."""
    parts = await _STATUS(redis, keys=[], args=[request_id])
    return Status(*map(json.loads, parts)) if parts else None


async def peek(redis: Redis, lane: str, count: int) -> list[Waiting]:
    """The lane's next requests, in the order they will be leased."""
    rows = await _PEEK(redis, keys=[], args=[lane, count])
    return [
        Waiting(request_id, int(choices), int(prompt_tokens), int(tokens),
                {worker: tokens_of(depth) for worker, depth in json.loads(taken).items()})
        for request_id, choices, prompt_tokens, tokens, taken in rows
    ]  # fmt: skip


async def lease(
    redis: Redis,
    *,
    lane: str,
    worker: str,
    max_sequences: int,
    limit: int,
    chosen: Sequence[tuple[str, str]] = (),
    remember: bool = False,
) -> list[Lease]:
    """The next requests of the lane, leased to the worker. What cannot be read is failed here, and harms nobody.

    With `chosen`, (id, route) of those that were chosen for it, it ends at the first that is not the next any more.
    `remember` keeps in mind that the worker took their beginnings."""
    env = settings.ENV
    flat = [part for pair in chosen for part in pair]
    affinity_ms = env.affinity_ms if remember else 0
    args: list[str | int | float] = [lane, worker, max_sequences, limit, env.lease_ms, affinity_ms, *flat]
    rows = await _LEASE(redis, keys=[], args=args)
    leases = []
    for request_id, attempt, payload, timeout_ms in rows:
        try:
            leases.append(Lease(decode_request(payload), int(attempt), int(timeout_ms)))
        except Garbled:
            message = "The queue's record of this request was damaged. Send it again."
            await finish(redis, request_id, Outcome.FAILED, code="damaged_record", message=message)
    return leases


async def emit(redis: Redis, emissions: Sequence[Emission]) -> list[str]:
    """Publishes one step. Returns the ids whose lease is no longer ours."""
    items = [[e.request_id, e.attempt, e.cached_tokens, e.deltas, e.reasoning_tokens] for e in emissions]
    refused: list[str] = await _EMIT(redis, keys=[], args=[settings.ENV.lease_ms, json.dumps(items)])
    return refused


async def renew(redis: Redis, held: Iterable[tuple[str, int]]) -> list[str]:
    """Returns the ids whose lease is no longer ours."""
    flat: list[str | int] = [part for pair in held for part in pair]
    lost: list[str] = await _RENEW(redis, keys=[], args=[int(settings.ENV.lease_ms), *flat])
    return lost


async def finish(
    redis: Redis, request_id: str, outcome: Outcome, *, attempt: int = -1, code: str = "", message: str = ""
) -> bool:
    """Ends a request. True when this call did; False when it had ended, is unknown, or `attempt` is stale."""
    args: list[str | int] = [request_id, attempt, outcome.value, code, message, settings.ENV.events_ttl_ms]
    return bool(await _FINISH(redis, keys=[], args=args))


async def fail_waiting(redis: Redis, lane: str, *, code: str, message: str) -> int:
    """Ends what waits in a lane, because nobody will ever serve it. Returns how many that were."""
    members = await redis.zrange(f"lane:{lane}", 0, REAP_LIMIT - 1)
    ended = [await finish(redis, member[17:], Outcome.FAILED, code=code, message=message) for member in members]
    return sum(ended)


async def requeue(redis: Redis, held: Iterable[tuple[str, int]], *, blame: bool) -> int:
    """Gives leases back. With `blame` the worker failed, and a request that met `max_attempts` failures ends as failed.
    Returns how many requests wait again or ended."""
    flat: list[str | int] = [part for pair in held for part in pair]
    if not flat:
        return 0
    args = [settings.ENV.max_attempts, settings.ENV.events_ttl_ms, int(blame), *flat]
    return int(await _REQUEUE(redis, keys=[], args=args))


async def reap(redis: Redis) -> int:
    """Ends what is past its deadline, gives back what is past its lease. Returns how many requests it moved."""
    ended, lapsed = await _REAP(redis, keys=[], args=[settings.ENV.events_ttl_ms, REAP_LIMIT])
    pairs = list(zip(lapsed[::2], map(int, lapsed[1::2]), strict=True))
    return int(ended) + await requeue(redis, pairs, blame=True)


async def checkpoint(redis: Redis) -> str:
    """Puts the whole state into the event log: a replay can begin there. Returns the entry's stream id."""
    return str(await _CHECKPOINT(redis, keys=[], args=[]))


@dataclass(frozen=True, slots=True)
class LaneDepth:
    waiting: int
    running: int
    work_ms: float
    cause: str = ""  # why the head waits, as it was said last

    @property
    def waiting_ms(self) -> float:
        """Of the predicted work, what has not begun: an equal share a request."""
        return self.work_ms * self.waiting / max(1, self.waiting + self.running)


async def pace(redis: Redis, lane: str, workers: int) -> float:
    """Predicted ms of work that the lane gets done a ms: measured while requests waited, or one for each worker."""
    cost_ms, ms, ends = map(float, [value or 0 for value in await redis.hmget(f"pace:{lane}", "cost_ms", "ms", "n")])
    return min(MAX_PACE, max(1 / MAX_PACE, cost_ms / ms)) if ends >= ENOUGH_ENDS and ms > 0 else max(1, workers)


async def depths(redis: Redis) -> tuple[dict[str, LaneDepth], dict[str, int]]:
    """Every lane's depth, and each worker's leased sequences."""
    async with redis.pipeline(transaction=False) as pipe:
        lanes, depth, busy = await pipe.smembers("lanes").hgetall("depth").hgetall("busy").execute()
    return (
        {
            lane: LaneDepth(
                int(depth.get(f"waiting:{lane}", 0)),
                int(depth.get(f"running:{lane}", 0)),
                max(0.0, float(depth.get(f"work:{lane}", 0))),
                depth.get(f"cause:{lane}", ""),
            )
            for lane in sorted(lanes)
        },
        {worker: int(count) for worker, count in busy.items()},
    )

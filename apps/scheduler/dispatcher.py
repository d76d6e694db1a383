"""The dispatcher: lease what workers can take now, gather it, route it, and keep the leases alive."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from django.conf import settings
from redis.asyncio import Redis
from redis.exceptions import RedisError

from apps.core.redis import server_time_ms
from apps.core.tasks import end
from apps.core.types import WorkerSnapshot
from apps.fleet import registry
from apps.scheduler import queue
from apps.scheduler.admission import absence_refusal
from apps.scheduler.collector import BatchCollector, LaneView
from apps.scheduler.link import WorkerLink
from apps.scheduler.log import export
from apps.scheduler.queue import LaneDepth
from apps.scheduler.router import Candidate, Choice, assign, candidates, cause_of_waiting, runs

IDLE_SECONDS = 0.25
DEMAND_SECONDS = 0.25
LEFT_SECONDS = 0.6  # by then a worker that unloaded a model has said so
RETRY_SECONDS = 0.5
_LOG = logging.getLogger(__name__)


class Dispatcher:
    """One process's share of the dispatching; any number may run beside each other."""

    def __init__(self, redis: Redis, name: str, log: Path | None = None) -> None:
        """`log` is a file to which every dispatcher's transitions are appended."""
        self._redis = redis
        self._name = name
        self._log = log
        self._work = asyncio.Event()
        self._links: dict[str, WorkerLink] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._told: set[str] = set()  # lanes whose demand the controller knows
        self._told_at = 0.0
        self._collectors: defaultdict[str, BatchCollector] = defaultdict(
            lambda: BatchCollector(settings.ENV.batch_window_ms, settings.ENV.batch_max_cost_ms)
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Dispatches until `stop` is set; then lets what runs end or hands it over."""
        beats = [
            asyncio.create_task(self._every(settings.ENV.lease_ms / 3000, self._keep_alive)),
            asyncio.create_task(self._every(IDLE_SECONDS, self._listen)),
        ]
        if self._log is not None:
            self._closing.add(asyncio.create_task(self._export(self._log, stop)))
        try:
            while not stop.is_set():
                await self._guarded(self._pass)
        finally:
            await end(*beats)
            await asyncio.gather(*(link.close() for link in self._links.values()), *self._closing)
            await self._guarded(lambda: self._redis.zrem("dispatchers", self._name))

    async def _guarded(self, step: Callable[[], Awaitable[object]]) -> None:
        """Redis down is waited out: leases and requests are there when it is back, or their owners send them again."""
        try:
            await step()
        except RedisError as error:
            _LOG.warning("Redis: %s", type(error).__name__)
            await asyncio.sleep(RETRY_SECONDS)

    async def _every(self, seconds: float, step: Callable[[], Awaitable[object]]) -> None:
        while True:
            await self._guarded(step)
            await asyncio.sleep(seconds)

    async def _export(self, path: Path, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self._guarded(lambda: export(self._redis, path, stop))

    # --- Leasing ---

    async def _pass(self) -> None:
        """One round over the lanes, then a wait for work, a free worker or the end of a collector's window."""
        self._work.clear()
        workers = await registry.workers(self._redis, timeout_ms=settings.ENV.worker_timeout_ms)
        self._connect(workers)
        usable = [worker for worker in workers if self._links[worker.worker_id].connected]
        ours = {worker_id: link.sequences for worker_id, link in self._links.items()}
        lanes, busy = await queue.depths(self._redis)  # in which none of ours that ended meanwhile is counted
        await self._tell_demand(lanes)
        for worker_id, link in self._links.items():
            link.others = max(0, busy.get(worker_id, 0) - ours[worker_id])
        holds = [await self._serve(lane, depth, usable, busy) for lane, depth in lanes.items()]
        pause = min([hold for hold in holds if hold > 0], default=IDLE_SECONDS)
        try:
            await asyncio.wait_for(self._work.wait(), pause)
        except TimeoutError:
            return

    def _connect(self, workers: list[WorkerSnapshot]) -> None:
        """A link for each live worker. One whose address or epoch changed is replaced; one that vanished is closed."""
        seen = {worker.worker_id: worker for worker in workers}
        for worker_id, link in list(self._links.items()):
            worker = seen.get(worker_id)
            if worker is None or (worker.address, worker.epoch) != (link.worker.address, link.worker.epoch):
                del self._links[worker_id]
                closing = asyncio.create_task(link.close())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
        for worker_id, worker in seen.items():
            if worker_id not in self._links:
                self._links[worker_id] = WorkerLink(self._redis, worker, self._work)
            self._links[worker_id].worker = worker

    async def _serve(self, lane: str, depth: LaneDepth, workers: list[WorkerSnapshot], busy: dict[str, int]) -> float:
        """Leases the lane's next requests to the workers with room. Returns seconds to hold the lane, or 0."""
        recently = time.monotonic() - LEFT_SECONDS
        there = [worker for worker in workers if self._links[worker.worker_id].left.get(lane, 0) < recently]
        open_to = candidates(lane, there, busy)
        view = LaneView(
            waiting=depth.waiting,
            waiting_ms=depth.waiting_ms,
            free=sum(candidate.free for candidate in open_to),
            busy=sum(candidate.busy for candidate in open_to),
            idle=any(candidate.busy == 0 for candidate in open_to),
        )
        hold_ms = self._collectors[lane].hold_ms(time.monotonic() * 1000, view)
        left = depth.waiting
        if not hold_ms and left and open_to:
            left -= await self._lease(lane, left, open_to)
        elif left and not open_to:
            await self._give_up(lane, workers)
        cause = cause_of_waiting(lane, workers, held_back=bool(hold_ms))
        if depth.waiting and cause != depth.cause and (left or hold_ms):
            await queue.explain(self._redis, lane, cause)
        return hold_ms / 1000

    async def _lease(self, lane: str, waiting: int, open_to: list[Candidate]) -> int:
        """Leases to the workers with room, each request to the best for it. Returns how many were leased."""
        if len(open_to) == 1:
            return await self._lease_to(lane, open_to[0], waiting, [])
        by_id = {candidate.worker.worker_id: candidate for candidate in open_to}
        head = await queue.peek(self._redis, lane, min(waiting, sum(candidate.free for candidate in open_to)))
        if not head:  # the next entry is none of ours: a lease puts it aside
            return await self._lease_to(lane, open_to[0], 1, [])
        count = 0
        for run in runs(assign(head, open_to)):
            leased = await self._lease_to(lane, by_id[run[0].worker_id], len(run), run)
            count += leased
            if leased < len(run):
                self._work.set()  # another dispatcher took of these, so the head is another one
                break
        return count

    async def _lease_to(self, lane: str, candidate: Candidate, limit: int, chosen: Sequence[Choice]) -> int:
        worker_id = candidate.worker.worker_id
        leases = await queue.lease(
            self._redis, lane=lane, worker=worker_id, max_sequences=candidate.max_sequences, limit=limit,
            chosen=[(choice.request_id, choice.route) for choice in chosen], remember=bool(chosen),
        )  # fmt: skip
        link = self._links[worker_id]
        for lease in leases:
            await link.submit(lease)
        return len(leases)

    async def _give_up(self, lane: str, workers: list[WorkerSnapshot]) -> None:
        """Ends what waits for a model that cannot be loaded, with the reason, rather than at its deadline."""
        state, reason = registry.state_of(lane, workers)
        if state == "load_failed":
            error = absence_refusal(state, lane, reason)
            await queue.fail_waiting(self._redis, lane, code=error.code, message=error.message)

    async def _tell_demand(self, lanes: dict[str, LaneDepth]) -> None:
        """What waits, for the model manager: at once when it is news, else now and then."""
        waiting = {lane: depth.waiting for lane, depth in lanes.items() if depth.waiting}
        now = time.monotonic()
        if waiting and (waiting.keys() - self._told or now - self._told_at >= DEMAND_SECONDS):
            await registry.report_demand(self._redis, waiting)
            self._told_at = now
        self._told = set(waiting)

    # --- Keeping what is leased ---

    async def _keep_alive(self) -> None:
        """Renews leases that produce nothing yet (a long prefill), and ends what is overdue anywhere."""
        await self._redis.zadd("dispatchers", {self._name: await server_time_ms(self._redis)})
        held = [(link, pair) for link in self._links.values() for pair in link.held]
        if held:
            lost = set(await queue.renew(self._redis, [pair for _, pair in held]))
            for link, (request_id, _) in held:
                if request_id in lost:
                    await link.abort(request_id)
        if await queue.reap(self._redis):
            self._work.set()

    async def _listen(self) -> None:
        """Wakes for new work, and drops requests that ended elsewhere before their next step."""
        async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
            await channel.subscribe("wake", "abort")
            async for message in channel.listen():
                if message["channel"] == "wake":
                    self._work.set()
                else:
                    await self._abort(message["data"])

    async def _abort(self, data: str) -> None:
        request_id, _, attempt = data.partition(" ")
        for link in self._links.values():
            running = link.running.get(request_id)
            if running is not None and str(running.lease.attempt) == attempt:
                await link.abort(request_id)

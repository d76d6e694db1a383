"""A dispatcher's connection to one worker: one `Execute` stream that every request leased to the worker shares."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict

from django.conf import settings
from redis.asyncio import Redis
from redis.exceptions import RedisError

from apps.core import blobs
from apps.core.errors import ServiceError
from apps.core.tasks import end
from apps.core.types import Event, FinishReason, Outcome, SequenceDelta, StepOutput, TranscribeWork, WorkerSnapshot
from apps.fleet.daemon_client import DaemonClient, ExecuteStream
from apps.fleet.tokenizers import tokenizer_for
from apps.scheduler import costs, queue
from apps.scheduler.codec import Garbled, decode_event
from apps.scheduler.meter import Meter
from apps.scheduler.queue import Lease
from apps.scheduler.running import RunningMedia, RunningRequest, RunningText

RECONNECT_SECONDS = 0.5
# Engine failures that another attempt may not meet.
_WORTH_RETRYING = frozenset({"out_of_memory", "model_not_ready", "engine_error", "draining"})
# Of those, the ones that are nobody's fault: the model left between the choice of the worker and the request's arrival.
_UNLOADED = frozenset({"model_not_ready", "draining"})
_LOG = logging.getLogger(__name__)


class WorkerLink:
    """Runs leases on a worker until it is closed. `on_free` is called whenever a request left the worker."""

    def __init__(self, redis: Redis, worker: WorkerSnapshot, on_free: asyncio.Event) -> None:
        self.worker = worker
        self.running: dict[str, RunningRequest] = {}
        self.others = 0  # sequences that other dispatchers have on this worker
        self.left: dict[str, float] = {}  # models that were found unloaded, by time.monotonic()
        self._meter = Meter()
        self._redis = redis
        self._on_free = on_free
        self._stream: ExecuteStream | None = None
        self._task = asyncio.create_task(self._run(), name=f"link {worker.worker_id}")

    @property
    def connected(self) -> bool:
        return self._stream is not None

    @property
    def held(self) -> list[tuple[str, int]]:
        return [(request.id, request.lease.attempt) for request in self.running.values()]

    @property
    def sequences(self) -> int:
        return self._meter.sequences

    async def close(self) -> None:
        """Gives back what still runs, without blame."""
        await end(self._task)
        await self._give_back(blame=False)

    async def submit(self, lease: Lease) -> None:
        """Starts a leased request on the worker, from the tokens it already has."""
        request = lease.request
        try:
            log = [] if lease.attempt == 1 else await self._published(request.id)
            running = _running(lease)
            running.replay(log)
            attachments = await blobs.take(self._redis, request.blobs)
        except (ServiceError, Garbled) as error:
            message = error.message if isinstance(error, ServiceError) else "The record of this request was damaged."
            await queue.finish(self._redis, request.id, Outcome.FAILED, attempt=lease.attempt, code="failed", message=message)
            return
        if not running.open:  # The worker was lost after its last token and before the end was written.
            await self._finish(running)
            return
        self.running[request.id] = running
        self._meter.begin(request.id, request.num_choices)
        if self._stream is None:
            return  # The link broke meanwhile: _run gives this back with the rest.
        await self._stream.submit(
            request,
            folder=self._folder_of(request.model),
            attempt=lease.attempt,
            epoch=self.worker.epoch,
            done={choice: (running.tokens(choice), running.units(choice)) for choice in sorted(running.open)},
            attachments=attachments,
            timeout_ms=lease.timeout_ms,
            cache_salt=f"{request.org_id}{request.salt and ':'}{request.salt}".encode(),
        )

    def _folder_of(self, model: str) -> str:
        """The revision that this worker is to run, by the latest word of it."""
        resident = self.worker.resident(model)
        return model if resident is None else resident.folder

    async def _published(self, request_id: str) -> list[Event]:
        entries = await self._redis.xrange(f"events:{request_id}")
        return [decode_event(fields["e"]) for _, fields in entries]

    async def abort(self, request_id: str) -> None:
        """Drops a request whose lease is void; the engine leaves it before its next step."""
        running = self.running.pop(request_id, None)
        self._meter.end(request_id)
        if running is not None and self._stream is not None:
            await self._stream.abort(request_id, running.lease.attempt)
        self._on_free.set()

    async def _run(self) -> None:
        while True:
            client = DaemonClient(self.worker.address, settings.ENV.daemon_token.get_secret_value())
            try:
                async with client.execute() as stream:
                    self._stream = stream
                    self._on_free.set()
                    async for step in stream:
                        await self._apply(step)
            except (ServiceError, RedisError) as error:
                _LOG.warning("worker %s: %s", self.worker.worker_id, error)
            except Exception:  # noqa: BLE001  A bug met by one step must not end the link; its requests go elsewhere.
                _LOG.exception("worker %s: a step could not be published", self.worker.worker_id)
            finally:
                self._stream = None
                await asyncio.shield(client.close())
            await self._give_back(blame=True)
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _give_back(self, *, blame: bool) -> None:
        held, self.running, self._meter = self.held, {}, Meter()
        try:
            await queue.requeue(self._redis, held, blame=blame)
        except RedisError as error:
            _LOG.warning("leases of %s will lapse: %s", self.worker.worker_id, type(error).__name__)

    async def _apply(self, step: StepOutput) -> None:
        """Publishes one step: one transition for all its tokens, one for each request that ended."""
        by_request: defaultdict[str, list[SequenceDelta]] = defaultdict(list)
        for delta in step.deltas:
            running = self.running.get(delta.request_id)
            if running is not None and running.lease.attempt == delta.attempt:
                by_request[delta.request_id].append(delta)
        self._meter.step(self.others, {name: sum(map(_units, deltas)) for name, deltas in by_request.items()})
        emissions = [self.running[request_id].apply(deltas) for request_id, deltas in by_request.items()]
        published = [emission for emission in emissions if emission.deltas]
        if published:
            for emission in published:
                self._meter.count(emission.request_id, sum(row[2] for row in emission.deltas), emission.cached_tokens)
            for request_id in await queue.emit(self._redis, published):
                await self.abort(request_id)
        for request_id, deltas in by_request.items():
            if request_id in self.running:
                await self._end_if_over(self.running[request_id], deltas)

    async def _end_if_over(self, running: RunningRequest, deltas: list[SequenceDelta]) -> None:
        reasons = {delta.finish_reason: delta.error for delta in deltas}
        if FinishReason.FAILED in reasons:
            await self._fail(running, reasons[FinishReason.FAILED])
        elif FinishReason.EXPIRED in reasons:
            await queue.reap(self._redis)  # Redis TIME decides; a daemon's clock only stopped the work early.
            await self.abort(running.id)
        elif not running.open:
            await self._finish(running)

    async def _finish(self, running: RunningRequest) -> None:
        ended = await queue.finish(self._redis, running.id, Outcome.SUCCEEDED, attempt=running.lease.attempt)
        spent = self._meter.end(running.id)
        if ended and spent is not None and running.lease.attempt == 1:
            request = running.lease.request
            computed = max(0, request.num_prompt_tokens - spent.cached_tokens)
            await costs.observe(
                self._redis, model=request.model, device=self.worker.device, prompt_tokens=computed,
                generated=spent.tokens, gpu_ms=spent.gpu_ms,
            )  # fmt: skip
        await self.abort(running.id)

    async def _fail(self, running: RunningRequest, code: str) -> None:
        attempt = running.lease.attempt
        if code in _WORTH_RETRYING:
            if code in _UNLOADED:
                self.left[running.lease.request.model] = time.monotonic()
            await queue.requeue(self._redis, [(running.id, attempt)], blame=code not in _UNLOADED)
        else:
            message = "The worker could not run this request."
            await queue.finish(self._redis, running.id, Outcome.FAILED, attempt=attempt, code=code, message=message)
        await self.abort(running.id)


def _units(delta: SequenceDelta) -> int:
    """Of media: a transcript's tokens cost little beside its listening."""
    return 0 if delta.token_ids else delta.units


def _running(lease: Lease) -> RunningRequest:
    """Raises ServiceError when the model's tokenizer is not here."""
    if lease.request.work is None or isinstance(lease.request.work, TranscribeWork):
        return RunningText(lease, tokenizer_for(lease.request.model).decoder)
    return RunningMedia(lease)

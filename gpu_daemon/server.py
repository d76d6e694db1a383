"""The gRPC servicer: checks and streams; wire.py translates. It decides nothing about scheduling."""

from __future__ import annotations

import asyncio
import hmac
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import psutil

from gpu_daemon import wire
from gpu_daemon.config import DaemonConfig
from gpu_daemon.engine.sequence import Delta, FinishReason, Sequence
from gpu_daemon.errors import (
    DaemonError,
    Draining,
    InvalidCommand,
    InvalidGrammar,
    InvalidPicture,
    LoadFailed,
    ModelNotReady,
    StaleEpoch,
)
from gpu_daemon.models import Models
from gpu_daemon.preparing import Preparing
from gpu_daemon.residents import Resident
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from gpu_daemon.runners.parallel import Group

MAX_MESSAGE_BYTES = 32 << 20
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),
]
_STATUS: dict[type[DaemonError], grpc.StatusCode] = {
    InvalidCommand: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotReady: grpc.StatusCode.NOT_FOUND,
    LoadFailed: grpc.StatusCode.FAILED_PRECONDITION,
    StaleEpoch: grpc.StatusCode.FAILED_PRECONDITION,
    Draining: grpc.StatusCode.UNAVAILABLE,
}
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call without the shared token; the health service is open."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        given = dict(details.invocation_metadata or ()).get("authorization", "")
        handler = await continuation(details)
        if handler is None or details.method.startswith("/grpc.health.v1."):
            return handler
        if hmac.compare_digest(str(given).encode(), self._expected):
            return handler
        return _refusing(handler)


def _refusing(handler: grpc.RpcMethodHandler[Any, Any]) -> Any:
    """A handler of the same shape that only says no."""

    async def unary(request: object, context: _Context) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "send the daemon's token")

    async def stream(request: object, context: _Context) -> AsyncIterator[None]:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "send the daemon's token")
        yield None  # type: ignore[unreachable]  # makes this a generator

    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(stream)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(stream)
    return grpc.unary_unary_rpc_method_handler(unary)


class GpuDaemon(pb_grpc.GpuDaemonServicer):
    """One daemon: its models, and the streams of its callers."""

    def __init__(self, config: DaemonConfig, group: Group | None = None) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._callers: dict[int, asyncio.Queue[pb.StepOutput]] = {}
        self._numbers = itertools.count(1)
        self._preparing = Preparing()
        self.models = Models(config, self._from_engine, group)
        self.draining = False

    def add_to(self, server: grpc.aio.Server) -> None:
        pb_grpc.add_GpuDaemonServicer_to_server(self, server)

    # --- Execute ---

    def _from_engine(self, step: int, deltas: list[Delta]) -> None:
        """Called by an engine's thread, once a step."""
        self._loop.call_soon_threadsafe(self._route, step, deltas)

    def _route(self, step: int, deltas: list[Delta]) -> None:
        by_caller: defaultdict[int, list[pb.SequenceDelta]] = defaultdict(list)
        for delta in deltas:
            by_caller[delta.caller].append(wire.delta_message(delta))
        for caller, messages in by_caller.items():
            if caller in self._callers:
                self._callers[caller].put_nowait(pb.StepOutput(step=step, deltas=messages))

    async def Execute(self, commands: AsyncIterator[pb.Command], context: _Context) -> AsyncIterator[pb.StepOutput]:
        caller = next(self._numbers)
        outputs = self._callers[caller] = asyncio.Queue()
        reader = asyncio.create_task(self._read(caller, commands))
        getter = asyncio.create_task(outputs.get())
        try:
            while True:
                await asyncio.wait({getter, reader}, return_when=asyncio.FIRST_COMPLETED)
                if not getter.done():
                    reader.result()
                    return
                yield getter.result()
                getter = asyncio.create_task(outputs.get())
        except DaemonError as error:
            await context.abort(_STATUS[type(error)], str(error))
        finally:
            getter.cancel()
            reader.cancel()
            del self._callers[caller]
            self._preparing.abort_caller(caller)
            for resident in self.models.residents.values():
                if resident.engine is not None:
                    resident.engine.abort_caller(caller)

    async def _read(self, caller: int, commands: AsyncIterator[pb.Command]) -> None:
        async for command in commands:
            if command.HasField("submit"):
                self._submit(caller, command.submit)
            else:
                self._abort(caller, command.abort)

    def _abort(self, caller: int, abort: pb.Abort) -> None:
        self._preparing.abort(caller, abort.request_id, abort.attempt)
        for resident in self.models.residents.values():
            if resident.engine is not None:
                resident.engine.abort(abort.request_id, abort.attempt)

    def _submit(self, caller: int, submit: pb.Submit) -> None:
        """A submit that cannot run fails alone; the stream and its other requests go on."""
        try:
            self._check_epoch(submit.epoch)
            if self.draining:
                raise Draining("draining")
            resident = self.models.ready(submit.model)
            if submit.WhichOneof("work"):
                resident.start_tasks(wire.tasks(caller, submit, resident.task_runner))
                return
            sequences = wire.sequences(caller, submit, resident.text_runner)
        except DaemonError as error:
            self._refuse(caller, submit, error)
            return
        if submit.sampling.grammar or submit.pictures:
            self._preparing.begin(caller, submit, self._submit_prepared(caller, submit, resident, sequences))
        else:
            resident.start(sequences)

    async def _submit_prepared(self, caller: int, submit: pb.Submit, resident: Resident, sequences: list[Sequence]) -> None:
        try:
            await self._preparing.prepare(submit, resident, sequences)
        except DaemonError as error:
            self._refuse(caller, submit, error)
            return
        resident.start(sequences)

    def _refuse(self, caller: int, submit: pb.Submit, error: DaemonError) -> None:
        failed = [
            Delta(caller, submit.request_id, submit.attempt, choice.index, len(choice.generated_ids) + choice.done_units,
                  finish_reason=FinishReason.FAILED, error=_FAILURES[type(error)])
            for choice in submit.choices
        ]  # fmt: skip
        self._route(0, failed)

    # --- Status ---

    async def WatchStatus(self, request: pb.WatchStatusRequest, context: _Context) -> AsyncIterator[pb.DaemonStatus]:
        interval = min(60.0, max(0.05, request.interval_ms / 1000))
        while True:
            news = self.models.news
            yield self._status()
            with suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), interval)

    def _status(self) -> pb.DaemonStatus:
        memory = psutil.virtual_memory()
        name, total, free = "cpu", memory.total, memory.available
        if self.models.device.startswith("cuda"):
            from gpu_daemon.runners.torch_runner import device_memory

            name, total, free = device_memory(self.models.device)
        if self.models.group is not None:
            name, (total, free) = f"{self.models.group.size} x {name}", self.models.group.memory
        held = self.models.budget.held
        models = [wire.model_status(resident, held.get(resident.name, 0)) for resident in self.models.residents.values()]
        return pb.DaemonStatus(
            worker_id=self._config.worker_id,
            epoch=self._config.epoch,
            step=sum(r.engine.load.step for r in self.models.residents.values() if r.engine is not None),
            device=self.models.device,
            device_name=name,
            mode="individual" if self.models.group is None else "tensor_parallel",
            draining=self.draining,
            memory_total_bytes=total,
            memory_free_bytes=free,
            models=models,
            memory_budget_bytes=self.models.budget.total,
            memory_reserved_bytes=sum(self.models.budget.held.values()),
            folders=[wire.folder_message(folder, self.models) for folder in self.models.folders],
        )

    # --- Models ---

    async def LoadModel(self, request: pb.LoadModelRequest, context: _Context) -> AsyncIterator[pb.LoadProgress]:
        try:
            self._check_epoch(request.epoch)
            if request.engine not in wire.KINDS:
                raise InvalidCommand("no such engine")
            resident = self.models.start_load(request.model, wire.KINDS[request.engine])
        except DaemonError as error:
            await context.abort(_STATUS[type(error)], str(error))
        while resident.state == "loading":
            told = (resident.stage, resident.progress)
            yield pb.LoadProgress(stage=told[0], progress=told[1])
            async with resident.changed:
                # What changed while the message went out will not wake us again.
                if resident.state == "loading" and told == (resident.stage, resident.progress):
                    await resident.changed.wait()
        if resident.state == "failed":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, resident.error)
        yield pb.LoadProgress(stage="ready", progress=1.0)

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: _Context) -> pb.UnloadModelResponse:
        try:
            self._check_epoch(request.epoch)
            await self.models.unload(request.model, request.grace_ms / 1000)
        except DaemonError as error:
            await context.abort(_STATUS[type(error)], str(error))
        return pb.UnloadModelResponse()

    async def Drain(self, request: pb.DrainRequest, context: _Context) -> pb.DrainResponse:
        try:
            self._check_epoch(request.epoch)
        except DaemonError as error:
            await context.abort(_STATUS[type(error)], str(error))
        self.draining = True
        return pb.DrainResponse(empty=await self.models.drain(request.grace_ms / 1000))

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self._config.epoch:
            raise StaleEpoch(f"this daemon is of epoch {self._config.epoch}")


_FAILURES: dict[type[DaemonError], str] = {
    InvalidCommand: "invalid_command",
    InvalidGrammar: "invalid_grammar",
    InvalidPicture: "invalid_image",
    ModelNotReady: "model_not_ready",
    StaleEpoch: "stale_epoch",
    Draining: "draining",
}

"""The gRPC servicer: checks, translates and streams. It decides nothing about scheduling."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

import grpc
import psutil

from gpu_daemon.config import DaemonConfig
from gpu_daemon.engine.sequence import Delta, EngineKind, FinishReason, Logprob, Sampling, Sequence
from gpu_daemon.errors import DaemonError, Draining, InvalidCommand, InvalidGrammar, LoadFailed, ModelNotReady, StaleEpoch
from gpu_daemon.folders import Folder
from gpu_daemon.models import Models, Resident
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc

MAX_MESSAGE_BYTES = 16 << 20
MAX_CHOICES = 256
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20
COMPILERS = 2  # threads that compile grammars, beside the engines'
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
_STATES = {
    "loading": pb.MODEL_STATE_LOADING,
    "ready": pb.MODEL_STATE_READY,
    "unloading": pb.MODEL_STATE_UNLOADING,
    "failed": pb.MODEL_STATE_FAILED,
}
_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.EXPIRED: pb.FINISH_REASON_EXPIRED,
    FinishReason.FAILED: pb.FINISH_REASON_FAILED,
}
_KINDS = {
    pb.ENGINE_KIND_UNSPECIFIED: EngineKind.CONTINUOUS,
    pb.ENGINE_KIND_CONTINUOUS: EngineKind.CONTINUOUS,
    pb.ENGINE_KIND_STATIC: EngineKind.STATIC,
}
_KIND_NUMBERS = {kind: number for number, kind in _KINDS.items()}
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

    def __init__(self, config: DaemonConfig) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._callers: dict[int, asyncio.Queue[pb.StepOutput]] = {}
        self._numbers = itertools.count(1)
        self._compilers = ThreadPoolExecutor(COMPILERS, "grammar")
        self._compiling: dict[tuple[int, str, int], asyncio.Task[None]] = {}  # by caller, request and attempt
        self.models = Models(config, self._from_engine)
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
            by_caller[delta.caller].append(_delta_message(delta))
        for caller, messages in by_caller.items():
            if caller in self._callers:
                self._callers[caller].put_nowait(pb.StepOutput(step=step, deltas=messages))

    async def Execute(self, commands: AsyncIterator[pb.Command], context: _Context) -> AsyncIterator[pb.StepOutput]:
        caller = next(self._numbers)
        outputs = self._callers[caller] = asyncio.Queue()
        reader = asyncio.create_task(self._read(caller, commands))
        try:
            while True:
                getter = asyncio.create_task(outputs.get())
                await asyncio.wait({getter, reader}, return_when=asyncio.FIRST_COMPLETED)
                if not getter.done():
                    getter.cancel()
                    reader.result()
                    return
                yield getter.result()
        except DaemonError as error:
            await context.abort(_STATUS[type(error)], str(error))
        finally:
            reader.cancel()
            del self._callers[caller]
            for key in [key for key in self._compiling if key[0] == caller]:
                self._compiling[key].cancel()
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
        if task := self._compiling.get((caller, abort.request_id, abort.attempt)):
            task.cancel()
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
            sequences = _sequences(caller, submit, resident)
        except DaemonError as error:
            self._refuse(caller, submit, error)
            return
        if not submit.sampling.grammar:
            _start(resident, sequences)
            return
        key = (caller, submit.request_id, submit.attempt)
        task = self._compiling[key] = asyncio.create_task(self._submit_constrained(caller, submit, resident, sequences))
        task.add_done_callback(lambda _: self._compiling.pop(key, None))

    async def _submit_constrained(self, caller: int, submit: pb.Submit, resident: Resident, sequences: list[Sequence]) -> None:
        """Compiles beside the event loop and the engine, so that others' commands and steps go on; then submits."""
        try:
            if resident.grammars is None:
                raise InvalidGrammar("the model's folder has no tokenizer")
            generated = [sequence.generated for sequence in sequences]
            job = partial(resident.grammars.compile, submit.sampling.grammar, generated)
            grammars = await self._loop.run_in_executor(self._compilers, job)
            if resident.engine is None:
                raise ModelNotReady(f"{resident.name} was unloaded")
        except DaemonError as error:
            self._refuse(caller, submit, error)
            return
        for sequence, grammar in zip(sequences, grammars, strict=True):
            sequence.grammar = grammar
        _start(resident, sequences)

    def _refuse(self, caller: int, submit: pb.Submit, error: DaemonError) -> None:
        failed = [
            Delta(caller, submit.request_id, submit.attempt, choice.index, len(choice.generated_ids),
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
        held = self.models.budget.held
        models = [_model_status(resident, held.get(resident.name, 0)) for resident in self.models.residents.values()]
        return pb.DaemonStatus(
            worker_id=self._config.worker_id,
            epoch=self._config.epoch,
            step=sum(r.engine.load.step for r in self.models.residents.values() if r.engine is not None),
            device=self.models.device,
            device_name=name,
            mode="individual",
            draining=self.draining,
            memory_total_bytes=total,
            memory_free_bytes=free,
            models=models,
            memory_budget_bytes=self.models.budget.total,
            memory_reserved_bytes=sum(self.models.budget.held.values()),
            folders=[_folder_message(folder, self.models) for folder in self.models.folders],
        )

    # --- Models ---

    async def LoadModel(self, request: pb.LoadModelRequest, context: _Context) -> AsyncIterator[pb.LoadProgress]:
        try:
            self._check_epoch(request.epoch)
            if request.engine not in _KINDS:
                raise InvalidCommand("no such engine")
            resident = self.models.start_load(request.model, _KINDS[request.engine])
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
    ModelNotReady: "model_not_ready",
    StaleEpoch: "stale_epoch",
    Draining: "draining",
}


def _start(resident: Resident, sequences: list[Sequence]) -> None:
    assert resident.engine is not None
    resident.engine.submit(sequences)


def _sequences(caller: int, submit: pb.Submit, resident: Resident) -> list[Sequence]:
    """Every choice as a sequence. Raises InvalidCommand unless each number is one the model can run with."""
    runner = resident.runner
    assert runner is not None
    sampling = _sampling(submit.sampling, runner.vocab_size)
    if not 0 < len(submit.choices) <= MAX_CHOICES or not submit.request_id:
        raise InvalidCommand("a submit has a request id and choices")
    deadline = time.monotonic() + submit.timeout_ms / 1000 if submit.timeout_ms else math.inf
    sequences = []
    for choice in submit.choices:
        prompt, generated = list(choice.prompt_ids), list(choice.generated_ids)
        if not prompt or max(prompt + generated) >= runner.vocab_size:
            raise InvalidCommand("a prompt is empty or holds an id the model does not have")
        if len(prompt) + sampling.max_tokens > runner.max_model_len or len(generated) >= sampling.max_tokens:
            raise InvalidCommand("a choice is longer than the model's context, or complete already")
        sequences.append(
            Sequence(
                caller=caller,
                request_id=submit.request_id,
                attempt=submit.attempt,
                choice=choice.index,
                tokens=prompt + generated,
                prompt_length=len(prompt),
                sampling=sampling,
                salt=submit.cache_salt,
                deadline=deadline,
            )
        )
    return sequences


def _sampling(message: pb.SamplingParams, vocab_size: int) -> Sampling:
    numbers = [message.temperature, message.top_p, message.min_p, message.presence_penalty, message.frequency_penalty]
    numbers += [entry.bias for entry in message.logit_bias]
    if not all(map(math.isfinite, numbers)) or message.max_tokens < 1:
        raise InvalidCommand("sampling parameters are finite, and max_tokens is 1 at least")
    if message.top_logprobs > MAX_TOP_LOGPROBS or len(message.logit_bias) > MAX_LOGIT_BIAS:
        raise InvalidCommand("too many logprobs or biases")
    if any(entry.token_id >= vocab_size for entry in message.logit_bias):
        raise InvalidCommand("a bias is for an id the model does not have")
    return Sampling(
        max_tokens=message.max_tokens,
        seed=message.seed,
        temperature=max(0.0, message.temperature),
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple((entry.token_id, entry.bias) for entry in message.logit_bias),
        top_logprobs=None if message.top_logprobs < 0 else message.top_logprobs,
        ignore_eos=message.ignore_eos,
    )


def _delta_message(delta: Delta) -> pb.SequenceDelta:
    return pb.SequenceDelta(
        request_id=delta.request_id,
        attempt=delta.attempt,
        choice=delta.choice,
        first_index=delta.first_index,
        token_ids=delta.token_ids,
        logprobs=[_logprob_message(entry) for entry in delta.logprobs],
        finish_reason=_REASONS[delta.finish_reason] if delta.finish_reason else pb.FINISH_REASON_UNSPECIFIED,
        cached_tokens=delta.cached_tokens,
        error=delta.error,
    )


def _logprob_message(entry: Logprob) -> pb.TokenLogprob:
    top = [pb.TokenAlternative(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top]
    return pb.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob, top=top)


def _folder_message(folder: Folder, models: Models) -> pb.ModelFolder:
    message = pb.ModelFolder(model=folder.name, error=folder.error, in_host_memory=folder.name in models.asleep)
    message.measured_bytes = measured = models.measured.get(folder.name, 0)
    if (size := folder.estimate) is not None:
        message.weight_bytes, message.activation_bytes = size.weights, size.activations
        message.kv_bytes_per_token, message.need_bytes = size.kv_token, max(size.need, measured)
    return message


def _model_status(resident: Resident, held: int) -> pb.ModelStatus:
    status = pb.ModelStatus(
        model=resident.name,
        state=_STATES[resident.state],
        progress=resident.progress,
        error=resident.error,
        engine=_KIND_NUMBERS[resident.kind],
        stage=resident.stage,
        resident_bytes=held,
        kv_bytes=resident.kv_bytes,
        measured_bytes=resident.measured_bytes,
        idle_ms=int(resident.idle_seconds * 1000),
    )
    if resident.engine is not None and resident.runner is not None:
        load, runner = resident.engine.load, resident.runner
        status.max_model_len, status.max_running = runner.max_model_len, resident.engine.max_sequences
        status.running, status.waiting = load.running, load.waiting
        status.kv_blocks_total, status.kv_blocks_free = load.tokens_total, max(0, load.tokens_free)
        status.weight_bytes = runner.weight_bytes
        status.prefill_ms_per_token = load.prefill_ms_per_token or runner.prefill_ms_per_token
        status.forward_share = load.forward_share
        status.decode_ms_per_token = load.decode_ms_per_token or runner.decode_ms_per_token
    return status

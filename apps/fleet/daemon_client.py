"""The site's end of the wire: gRPC in, core types out. A daemon's words are checked before anyone believes them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import grpc
from django.conf import settings

from apps.core.errors import ServiceError, Unavailable
from apps.core.types import (
    EmbedWork,
    FinishReason,
    ImageWork,
    InferenceRequest,
    ModelFolder,
    ResidentModel,
    SequenceDelta,
    SpeechWork,
    StepOutput,
    TokenLogprob,
    TranscribeWork,
    VideoWork,
    WorkerSnapshot,
)
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc

MAX_MESSAGE_BYTES = 32 << 20
CONNECT_SECONDS = 3
SILENCE_SECONDS = 5.0  # without a status, at the usual interval
MAX_TOKEN_ID = 1 << 24  # beyond any vocabulary; which ids a model has, its tokenizer knows
MAX_NAME_LENGTH = 100  # of request ids, workers and models
MAX_VOICES = 256
MAX_FOLDERS = 1000
STATES = {
    pb.MODEL_STATE_LOADING: "loading",
    pb.MODEL_STATE_READY: "ready",
    pb.MODEL_STATE_UNLOADING: "unloading",
    pb.MODEL_STATE_FAILED: "failed",
}
MIMES = frozenset({"", "audio/pcm", "image/png", "image/jpeg", "video/mp4", "application/octet-stream"})
ENGINES = {"continuous": pb.ENGINE_KIND_CONTINUOUS, "static": pb.ENGINE_KIND_STATIC}
REASONS = {
    pb.FINISH_REASON_UNSPECIFIED: None,
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
    pb.FINISH_REASON_EXPIRED: FinishReason.EXPIRED,
    pb.FINISH_REASON_FAILED: FinishReason.FAILED,
}
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


class DaemonError(Unavailable):
    """A daemon that cannot be reached, refuses a call or talks nonsense. Its code is the gRPC status, in small letters."""

    code = "worker_error"


def _translate(error: grpc.RpcError) -> ServiceError:
    status = error.code() if isinstance(error, grpc.aio.AioRpcError) else grpc.StatusCode.UNKNOWN
    details = error.details() if isinstance(error, grpc.aio.AioRpcError) else ""
    return DaemonError(f"{status.name.lower()}: {_words(details or '', 200)}", code=status.name.lower())


def _channel(address: str) -> grpc.aio.Channel:
    """Under TLS when the site knows who signs for daemons. Raises DaemonError when a file cannot be read."""
    env = settings.ENV
    if env.daemon_ca is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    try:
        ca, key, cert = (path.read_bytes() if path else None for path in (env.daemon_ca, env.daemon_key, env.daemon_cert))
    except OSError as error:
        raise DaemonError(f"DAEMON_CA, DAEMON_CERT or DAEMON_KEY: {error.strerror}", code="no_certificate") from None
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert), options=_OPTIONS)


class DaemonClient:
    """One daemon. Every method raises DaemonError."""

    def __init__(self, address: str, token: str) -> None:
        self._channel = _channel(address)
        self._stub = pb_grpc.GpuDaemonStub(self._channel)
        self._metadata = (("authorization", f"Bearer {token}"),)

    async def close(self) -> None:
        await self._channel.close()

    def execute(self) -> ExecuteStream:
        """Opens this caller's stream of commands and steps, with `async with`."""
        return ExecuteStream(self._channel, self._stub, self._metadata)

    async def watch_status(self, interval_ms: int) -> AsyncGenerator[WorkerSnapshot, None]:
        """The daemon's state, at once and then at least once an interval. A silent daemon ends it."""
        patience = max(SILENCE_SECONDS, 4 * interval_ms / 1000)
        call = self._stub.WatchStatus(pb.WatchStatusRequest(interval_ms=interval_ms), metadata=self._metadata)
        try:
            while True:
                message = await asyncio.wait_for(call.read(), timeout=patience)
                if not isinstance(message, pb.DaemonStatus):
                    raise DaemonError("the daemon ended its status stream")
                yield _snapshot(message)
        except TimeoutError:
            raise DaemonError("the daemon fell silent", code="silent") from None
        except grpc.RpcError as error:
            raise _translate(error) from None
        finally:
            call.cancel()

    async def load_model(self, model: str, epoch: int, engine: str = "continuous") -> AsyncGenerator[tuple[str, float], None]:
        """(stage, progress) until the model is ready. `engine` is one of ENGINES."""
        request = pb.LoadModelRequest(model=model, epoch=epoch, engine=ENGINES[engine])
        call = self._stub.LoadModel(request, metadata=self._metadata)
        try:
            async for message in call:
                yield _words(message.stage, 20), _share(message.progress)
        except grpc.RpcError as error:
            raise _translate(error) from None
        finally:
            call.cancel()

    async def unload_model(self, model: str, epoch: int, grace_ms: int) -> None:
        request = pb.UnloadModelRequest(model=model, epoch=epoch, grace_ms=grace_ms)
        try:
            await self._stub.UnloadModel(request, metadata=self._metadata, timeout=grace_ms / 1000 + 10)
        except grpc.RpcError as error:
            raise _translate(error) from None

    async def drain(self, epoch: int, grace_ms: int) -> bool:
        """Whether the daemon is empty."""
        request = pb.DrainRequest(epoch=epoch, grace_ms=grace_ms)
        try:
            reply = await self._stub.Drain(request, metadata=self._metadata, timeout=grace_ms / 1000 + 10)
        except grpc.RpcError as error:
            raise _translate(error) from None
        return reply.empty


class ExecuteStream:
    """Commands out, one StepOutput an engine step in."""

    def __init__(
        self, channel: grpc.aio.Channel, stub: pb_grpc.GpuDaemonAsyncStub, metadata: tuple[tuple[str, str], ...]
    ) -> None:
        self._channel, self._stub, self._metadata = channel, stub, metadata
        self._writing = asyncio.Lock()  # gRPC takes one message at a time, and drops the others

    async def __aenter__(self) -> ExecuteStream:
        try:
            await asyncio.wait_for(self._channel.channel_ready(), CONNECT_SECONDS)
        except TimeoutError:
            raise DaemonError("the daemon does not answer", code="unavailable") from None
        self._call = self._stub.Execute(metadata=self._metadata)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.cancel()

    async def submit(
        self,
        request: InferenceRequest,
        *,
        folder: str = "",
        attempt: int,
        epoch: int,
        done: Mapping[int, tuple[Sequence[int], int]],
        attachments: Sequence[bytes] = (),
        timeout_ms: int,
        cache_salt: bytes,
    ) -> None:
        """Starts the choices in `done`, each from the tokens or units it already has; `attachments` are the blobs, and `folder`
        names the model's revision."""
        choices = [_choice(request, index, tokens, units) for index, (tokens, units) in done.items()]
        submit = pb.Submit(
            request_id=request.id,
            attempt=attempt,
            model=folder or request.model,
            choices=choices,
            sampling=_sampling(request),
            timeout_ms=timeout_ms,
            cache_salt=cache_salt,
            epoch=epoch,
            **_work(request, attachments),
        )
        await self._write(pb.Command(submit=submit))

    async def abort(self, request_id: str, attempt: int) -> None:
        await self._write(pb.Command(abort=pb.Abort(request_id=request_id, attempt=attempt)))

    async def _write(self, command: pb.Command) -> None:
        """A broken stream is noticed by the reader, who gives everything back; the writer has nothing to add."""
        try:
            async with self._writing:
                await self._call.write(command)
        except (grpc.RpcError, asyncio.InvalidStateError):
            return

    async def __aiter__(self) -> AsyncIterator[StepOutput]:
        try:
            async for message in self._call:
                yield StepOutput(message.step, tuple(_delta(delta) for delta in message.deltas))
        except grpc.RpcError as error:
            raise _translate(error) from None
        raise DaemonError("the daemon closed the stream", code="closed")


def _choice(request: InferenceRequest, index: int, tokens: Sequence[int], units: int) -> pb.Choice:
    prompt = request.prompts[index // request.n] if request.prompts else ()
    given = () if request.work else tokens  # what a transcript has is counted, not given
    return pb.Choice(index=index, prompt_ids=prompt, generated_ids=given, done_units=units)


def _work(request: InferenceRequest, attachments: Sequence[bytes]) -> dict[str, Any]:
    """The fields of a Submit that say what is to be done."""
    match request.work:
        case None:
            return {"pictures": attachments, "picture_pixels": request.picture_pixels}
        case SpeechWork() as w:
            return {"speech": pb.SpeechWork(text=w.text, voice=w.voice, speed=w.speed)}
        case EmbedWork() as w:
            return {"embed": pb.EmbedWork(dimensions=w.dimensions)}
        case TranscribeWork() as w:
            return {
                "transcribe": pb.TranscribeWork(
                    audio=attachments[0], language=w.language, prompt_ids=w.prompt_ids, timestamps=w.timestamps
                )
            }
        case ImageWork() as w:
            image = pb.ImageWork(
                prompt=w.prompt, width=w.width, height=w.height, steps=w.steps, guidance=w.guidance, previews=w.previews
            )
            return {"image": image}
        case VideoWork() as w:
            video = pb.VideoWork(
                prompt=w.prompt, width=w.width, height=w.height, frames=w.frames, steps=w.steps, guidance=w.guidance, fps=w.fps
            )
            return {"video": video}


def _sampling(request: InferenceRequest) -> pb.SamplingParams:
    s = request.sampling
    return pb.SamplingParams(
        max_tokens=s.max_tokens,
        seed=s.seed,
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        min_p=s.min_p,
        presence_penalty=s.presence_penalty,
        frequency_penalty=s.frequency_penalty,
        logit_bias=[pb.LogitBias(token_id=token_id, bias=bias) for token_id, bias in s.logit_bias],
        top_logprobs=-1 if s.top_logprobs is None else s.top_logprobs,
        ignore_eos=s.ignore_eos,
        grammar=s.grammar,
    )


def _delta(message: pb.SequenceDelta) -> SequenceDelta:
    _require_sense(message)
    return SequenceDelta(
        request_id=message.request_id,
        attempt=message.attempt,
        choice=message.choice,
        first_index=message.first_index,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(_logprob(entry) for entry in message.logprobs),
        finish_reason=REASONS[message.finish_reason],
        cached_tokens=message.cached_tokens,
        error=_words(message.error, 100),
        units=message.units,
        media=message.media,
        mime=message.mime,
        preview=message.preview,
    )


def _require_sense(message: pb.SequenceDelta) -> None:
    if len(message.request_id) > MAX_NAME_LENGTH:
        raise DaemonError("the daemon sent a request id that is none", code="nonsense")
    if max(message.token_ids, default=0) >= MAX_TOKEN_ID:
        raise DaemonError("the daemon sent a token of no vocabulary", code="nonsense")
    if message.logprobs and len(message.logprobs) != len(message.token_ids):
        raise DaemonError("the daemon sent logprobs that do not match its tokens", code="nonsense")
    if message.mime not in MIMES or bool(message.media) != bool(message.mime):
        raise DaemonError("the daemon sent media of an unknown kind", code="nonsense")
    if message.finish_reason not in REASONS:
        raise DaemonError("the daemon ended a choice for an unknown reason", code="nonsense")


def _logprob(message: pb.TokenLogprob) -> TokenLogprob:
    top = tuple((entry.token_id, _finite(entry.logprob)) for entry in message.top)
    return TokenLogprob(message.token_id, _finite(message.logprob), top)


def _finite(value: float) -> float:
    """JSON has no infinity: a token that cannot be drawn is given OpenAI's floor."""
    return value if math.isfinite(value) else -9999.0


def _words(text: str, limit: int) -> str:
    """What a daemon says, fit for a log, a page and a database: printable, and no longer than `limit`."""
    return "".join(filter(str.isprintable, text[: 10 * limit]))[:limit]


def _measure(value: float) -> float:
    """A measured figure; 0, which means unknown, for what is no figure."""
    return value if math.isfinite(value) and value > 0 else 0.0


def _share(value: float) -> float:
    return min(1.0, _measure(value))


def _snapshot(message: pb.DaemonStatus) -> WorkerSnapshot:
    return WorkerSnapshot(
        worker_id=_words(message.worker_id, MAX_NAME_LENGTH),
        address="",
        epoch=message.epoch,
        step=message.step,
        device=_words(message.device, 20),
        mode=_words(message.mode, 20),
        draining=message.draining,
        memory_total_bytes=message.memory_total_bytes,
        memory_free_bytes=message.memory_free_bytes,
        models=tuple(_resident(entry) for entry in message.models),
        memory_budget_bytes=message.memory_budget_bytes,
        memory_reserved_bytes=message.memory_reserved_bytes,
        folders=tuple(_folder(entry) for entry in message.folders[:MAX_FOLDERS]),
    )


def _folder(message: pb.ModelFolder) -> ModelFolder:
    return ModelFolder(
        model=_words(message.model, MAX_NAME_LENGTH + 41),
        weight_bytes=message.weight_bytes,
        kv_bytes_per_token=message.kv_bytes_per_token,
        activation_bytes=message.activation_bytes,
        need_bytes=message.need_bytes,
        measured_bytes=message.measured_bytes,
        in_host_memory=message.in_host_memory,
        error=_words(message.error, 200),
    )


def _resident(message: pb.ModelStatus) -> ResidentModel:
    model, _, revision = _words(message.model, MAX_NAME_LENGTH + 41).partition("@")
    return ResidentModel(
        model=model,
        revision=revision,
        state=STATES.get(message.state, "failed"),
        progress=_share(message.progress),
        error=_words(message.error, 200),
        max_model_len=message.max_model_len,
        running=message.running,
        waiting=message.waiting,
        max_running=message.max_running,
        kv_blocks_total=message.kv_blocks_total,
        kv_blocks_free=message.kv_blocks_free,
        weight_bytes=message.weight_bytes,
        prefill_ms_per_token=_measure(message.prefill_ms_per_token),
        decode_ms_per_token=_measure(message.decode_ms_per_token),
        forward_share=_measure(message.forward_share),
        engine="static" if message.engine == pb.ENGINE_KIND_STATIC else "continuous",
        voices=tuple(_words(voice, MAX_NAME_LENGTH) for voice in message.voices[:MAX_VOICES]),
        stage=_words(message.stage, 20),
        resident_bytes=message.resident_bytes,
        kv_bytes=message.kv_bytes,
        measured_bytes=message.measured_bytes,
        idle_ms=message.idle_ms,
    )

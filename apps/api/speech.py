"""`/v1/audio/speech` and what a client asks before it: voices and models."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from django.conf import settings
from django.http import HttpRequest, HttpResponseBase, JsonResponse, StreamingHttpResponse
from pydantic import Field

from apps.api import intake, sse
from apps.api.answer import SSE_HEADERS
from apps.api.audio import FORMATS, SpeechEncoder
from apps.api.catalogue import visible_cards
from apps.api.errors import error_body
from apps.api.json import parse_object
from apps.api.prepare import find_model
from apps.api.render import units_body
from apps.api.schemas import Tiered
from apps.api.strict import Number, Strict, Text, invalid
from apps.api.work import Job, Made, job
from apps.core.errors import ServiceError
from apps.core.redis import shared
from apps.core.types import MediaDelta, Principal, RequestFinished, SpeechWork
from apps.fleet import registry
from apps.fleet.selectors import ModelCard

MAX_CHARACTERS = 4096
MAX_VOICES = 5  # that are averaged
DEFAULT_VOICE = "af_heart"
# OpenAI's names, by the voices of Kokoro that come closest.
ALIASES = {
    "alloy": "af_alloy", "ash": "am_michael", "ballad": "bm_george", "cedar": "am_fenrir", "coral": "af_bella",
    "echo": "am_echo", "fable": "bm_fable", "marin": "af_kore", "nova": "af_nova", "onyx": "am_onyx", "sage": "af_sarah",
    "shimmer": "af_sky", "verse": "am_puck",
}  # fmt: skip


class VoiceId(Strict):
    id: Text


class SpeechRequest(Tiered):
    input: Annotated[Text, Field(min_length=1, max_length=MAX_CHARACTERS)]
    voice: Annotated[Text, Field(min_length=1, max_length=200)] | VoiceId
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] | None = None
    speed: Number | None = Field(None, ge=0.25, le=4)
    stream_format: Literal["audio", "sse"] | None = None

    @property
    def voice_names(self) -> str:
        """By the model's own names, joined by commas."""
        named = self.voice if isinstance(self.voice, str) else self.voice.id
        return ",".join(ALIASES.get(name.strip(), name.strip()) for name in named.split(","))


async def speech(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    body, made = await intake.counted(lambda: parse_object(request.body), SpeechRequest, _prepare, principal)
    headers = {**SSE_HEADERS, **await made.submit(principal)}
    events = made.events()
    first = await anext(events)  # a failure before the first sound is an answer of its own
    if body.stream_format == "sse":
        frames = sse.kept_alive(_frames(body, first, events, request.request_id), settings.ENV.sse_keep_alive_ms)  # type: ignore[attr-defined]
        return StreamingHttpResponse(frames, content_type="text/event-stream", headers=headers)
    sound = _sound(body, first, events)
    return StreamingHttpResponse(sound, content_type=FORMATS[body.response_format or "mp3"].mime, headers=headers)


async def _prepare(body: SpeechRequest, principal: Principal) -> Job:
    card = await find_model(body.model, principal, {"speech"}, "speech")
    await _check_voices(body.voice_names.split(","), card)
    speed = 1.0 if body.speed is None else body.speed
    return job(body, principal, card, SpeechWork(body.input, body.voice_names, speed), prefix="speech")


async def _check_voices(names: list[str], card: ModelCard) -> None:
    """Raises InvalidRequest for a voice that is not there."""
    known = await voices_of(card)
    unknown = [name for name in names if name not in known]
    if len(names) > MAX_VOICES:
        raise invalid(f"voice: at most {MAX_VOICES} voices can be mixed.", "voice")
    if known and unknown:
        raise invalid(f"voice: {unknown[0][:50]!r} is not a voice of {card.name}. GET /v1/audio/voices lists them.", "voice")


async def voices_of(card: ModelCard) -> tuple[str, ...]:
    """What the workers that hold the model can speak with, or, while none does, what its files have."""
    workers = await registry.workers(shared(), timeout_ms=settings.ENV.worker_timeout_ms)
    live = {voice for worker in workers if (held := worker.resident(card.name)) for voice in held.voices}
    return tuple(sorted(live)) or card.voices


async def _pieces(first: Made, events: AsyncGenerator[Made, None]) -> AsyncIterator[Made]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event


async def _sound(body: SpeechRequest, first: Made, events: AsyncGenerator[Made, None]) -> AsyncIterator[bytes]:
    """The file, a piece as soon as it was spoken. A failure after the first sound breaks the connection off."""
    encoder = SpeechEncoder(FORMATS[body.response_format or "mp3"])
    async for event in _pieces(first, events):
        if isinstance(event, MediaDelta) and (data := await _encoded(encoder, event)):
            yield data
    yield await asyncio.to_thread(encoder.finish)


async def _frames(body: SpeechRequest, first: Made, events: AsyncGenerator[Made, None], http_id: str) -> AsyncIterator[bytes]:
    encoder = SpeechEncoder(FORMATS[body.response_format or "mp3"])
    try:
        async for event in _pieces(first, events):
            if isinstance(event, MediaDelta) and (data := await _encoded(encoder, event)):
                yield _audio_frame(data)
            elif isinstance(event, RequestFinished):
                if data := await asyncio.to_thread(encoder.finish):
                    yield _audio_frame(data)
                yield sse.frame({"type": "speech.audio.done", "usage": units_body(event.usage)}) + sse.DONE
    except ServiceError as error:
        yield sse.frame(error_body(error, http_id)) + sse.DONE


async def _encoded(encoder: SpeechEncoder, event: MediaDelta) -> bytes:
    try:
        pcm = base64.b64decode(event.media, validate=True)
    except binascii.Error:
        raise ServiceError("The worker sent no sound.", code="model_error") from None
    return await asyncio.to_thread(encoder.push, pcm) if pcm else b""


def _audio_frame(data: bytes) -> bytes:
    return sse.frame({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})


async def voices(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    cards = await visible_cards(principal, "speech")
    found: list[dict[str, Any]] = [
        {"id": name, "name": name, "model": card.name, "language": name[:1]} for card in cards for name in await voices_of(card)
    ]
    names = {voice["id"] for voice in found}
    aliases = [{"id": alias, "name": f"{alias} ({voice})"} for alias, voice in ALIASES.items() if voice in names]
    return JsonResponse({"voices": found + aliases})


async def models(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    cards = [card for modality in ("speech", "transcription") for card in await visible_cards(principal, modality)]
    return JsonResponse({"models": [{"id": card.name, "name": card.title, "modality": card.modality} for card in cards]})

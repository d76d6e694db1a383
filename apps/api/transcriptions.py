"""`/v1/audio/transcriptions`: a recording in, what was said out, whole, as subtitles, or as it is heard."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse, StreamingHttpResponse
from pydantic import BeforeValidator, Field

from apps.api import intake, sse
from apps.api.answer import SSE_HEADERS
from apps.api.audio import HEARD_RATE, decode
from apps.api.errors import error_body
from apps.api.multipart import Form, read_form
from apps.api.prepare import find_model
from apps.api.schemas import Tiered
from apps.api.strict import Number, Text, invalid, unsupported
from apps.api.subtitles import Segment, Segments, srt, vtt
from apps.api.work import Job, job
from apps.core.blobs import keyed
from apps.core.errors import InvalidRequest, ServiceError
from apps.core.types import Principal, RequestFinished, TextDelta, TranscribeWork, Usage
from apps.fleet.tokenizers import tokenizer_for

MAX_PROMPT_TOKENS = 224  # of which a model of Whisper's family looks at no more
LANGUAGE = "en"  # the only one that the models here write


def _number(value: Any) -> Any:
    """Fields of a form are texts."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError("is not a number") from None


def _truth(value: Any) -> Any:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


class TranscriptionRequest(Tiered):
    language: str | None = Field(None, max_length=20)
    prompt: Text | None = Field(None, max_length=4000)
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] | None = None
    temperature: Annotated[Number | None, BeforeValidator(_number)] = Field(None, ge=0, le=1)
    timestamp_granularities: list[Literal["segment"]] | None = None  # words are not timed
    stream: Annotated[bool | None, BeforeValidator(_truth)] = None
    chunking_strategy: Literal["auto"] | None = None  # it is

    @property
    def wants_times(self) -> bool:
        return self.response_format in ("srt", "vtt", "verbose_json")


async def transcriptions(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    form = await read_form(request)

    async def prepare(body: TranscriptionRequest, principal: Principal) -> Job:
        return await _prepare(body, principal, form)

    body, made = await intake.counted(lambda: form.fields, TranscriptionRequest, prepare, principal)
    headers = await made.submit(principal)
    if body.stream:
        frames = sse.kept_alive(_frames(made, request.request_id), settings.ENV.sse_keep_alive_ms)  # type: ignore[attr-defined]
        return StreamingHttpResponse(frames, content_type="text/event-stream", headers={**SSE_HEADERS, **headers})
    tokenizer, text, ids, usage = tokenizer_for(made.card.name), "", list[int](), Usage()
    async for event in made.events():
        if isinstance(event, TextDelta):
            text += event.text
            ids += event.token_ids
        elif isinstance(event, RequestFinished):
            usage = event.usage
    segments = Segments(tokenizer).of(ids) if body.wants_times else []
    return _whole(body, made, text, segments, usage, headers)


async def _prepare(body: TranscriptionRequest, principal: Principal, form: Form) -> Job:
    card = await find_model(body.model, principal, {"transcription"}, "transcriptions")
    if unknown := set(form.files) - {"file"}:
        raise unsupported(min(unknown))
    if "file" not in form.files:
        raise InvalidRequest("file is required.", code="missing_required_parameter", param="file")
    if body.language not in (None, LANGUAGE, "english"):
        raise invalid(f"language: {card.name} writes English only.", "language")
    if body.stream and body.response_format not in (None, "json", "text"):
        raise invalid("stream: only text and json can be streamed.", "stream")
    if body.timestamp_granularities and body.response_format != "verbose_json":
        raise invalid("timestamp_granularities: needs verbose_json.", "timestamp_granularities")
    heard = await asyncio.to_thread(decode, form.files["file"].data)
    prompt = tokenizer_for(card.name).encode(body.prompt or "")[-MAX_PROMPT_TOKENS:]
    work = TranscribeWork(
        seconds=len(heard) / 2 / HEARD_RATE, language=LANGUAGE, prompt_ids=tuple(prompt), timestamps=body.wants_times
    )
    temperature = body.temperature or 0.0
    return job(body, principal, card, work, prefix="trsc", temperature=temperature, attachments=keyed([heard]))


def _whole(
    body: TranscriptionRequest, made: Job, text: str, segments: list[Segment], usage: Usage, headers: dict[str, str]
) -> HttpResponseBase:
    match body.response_format:
        case "text":
            return HttpResponse(text.strip() + "\n", content_type="text/plain; charset=utf-8", headers=headers)
        case "srt":
            return HttpResponse(srt(segments), content_type="application/x-subrip; charset=utf-8", headers=headers)
        case "vtt":
            return HttpResponse(vtt(segments), content_type="text/vtt; charset=utf-8", headers=headers)
        case "verbose_json":
            whole = "".join(segment.text for segment in segments).strip()
            seconds = made.request.work.seconds if isinstance(made.request.work, TranscribeWork) else 0.0
            answer = {"task": "transcribe", "language": "english", "duration": round(seconds, 2), "text": whole}
            return JsonResponse({**answer, "segments": [s.body for s in segments], "usage": _usage(usage)}, headers=headers)
    return JsonResponse({"text": text.strip(), "usage": _usage(usage)}, headers=headers)


def _usage(usage: Usage) -> dict[str, Any]:
    """Input tokens are what was heard: 1,500 each 30 s."""
    return {
        "type": "tokens",
        "input_tokens": usage.prompt_tokens,
        "input_token_details": {"audio_tokens": usage.prompt_tokens, "text_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


async def _frames(made: Job, http_id: str) -> AsyncIterator[bytes]:
    yield sse.KEEP_ALIVE
    text = ""
    try:
        async for event in made.events():
            if isinstance(event, TextDelta) and event.text:
                delta = event.text if text else event.text.lstrip()
                text += delta
                yield _frame({"type": "transcript.text.delta", "delta": delta})
            elif isinstance(event, RequestFinished):
                yield _frame({"type": "transcript.text.done", "text": text, "usage": _usage(event.usage)})
    except ServiceError as error:
        yield sse.frame(error_body(error, http_id))
    yield sse.DONE


def _frame(body: dict[str, Any]) -> bytes:
    return f"event: {body['type']}\n".encode() + b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"

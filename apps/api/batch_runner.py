"""Runs one batch: its file read once, each line answered once, its two files written at the end."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from django.conf import settings
from django.utils import timezone

from apps.accounts.auth import principal_of
from apps.api import embeddings, following, prepare
from apps.api.errors import error_body
from apps.api.json import parse_object
from apps.api.render import ChatRenderer, CompletionRenderer, failure
from apps.api.schemas import ChatRequest, CompletionRequest, parse
from apps.core import media
from apps.core.database import in_database
from apps.core.errors import InvalidRequest, ServiceError
from apps.core.tasks import end
from apps.core.types import Event, InferenceRequest, Principal, Priority, RequestFinished
from apps.jobs import services as jobs
from apps.jobs.models import Batch, BatchLine, State, UploadedFile

LINES_AT_ONCE = 16
LINES_READ = 200
BEAT_SECONDS = 1.0
MAX_ERRORS = 20  # of a file that is refused
MAX_CUSTOM_ID = 200
Render = Callable[[Sequence[Event]], dict[str, Any]]


async def run_batch(batch: Batch) -> None:
    """To its end, unless somebody else took it over."""
    principal = await principal_of(batch.org_id, batch.key_id)
    if principal is None:
        await in_database(lambda: jobs.end(batch, State.FAILED, code="invalid_api_key", message="The key is not active."))
        return
    if batch.state == State.QUEUED and not await _begin(batch):
        return
    beat, work = asyncio.create_task(_beat(batch)), asyncio.create_task(_answer(batch, principal))
    try:
        await asyncio.wait({beat, work}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done() and not beat.result():
            return  # somebody else has it
        await end(work)  # cancelling, or past its time: what is answered by now is what it has
        if work.done() and not work.cancelled():
            work.result()
        await _finish(batch)
    finally:
        await end(beat, work)


async def _beat(batch: Batch) -> bool:
    """Until the batch is to stop: False when it is not ours any more."""
    while await in_database(lambda: jobs.keep(batch)):
        await in_database(lambda: batch.refresh_from_db(fields=["cancelling"]))
        if batch.cancelling or timezone.now() > batch.expires_at:
            return True
        await asyncio.sleep(BEAT_SECONDS)
    return False


# --- Reading ---


async def _begin(batch: Batch) -> bool:
    """Whether the file is one of requests, which are written down now; else the batch ends."""
    data = await asyncio.to_thread(_read_file, batch)
    lines, errors = await asyncio.to_thread(_parsed, batch, data)
    if errors:
        await in_database(lambda: jobs.end(batch, State.FAILED, code="invalid_file", errors=errors[:MAX_ERRORS]))
        return False
    batch.state = State.IN_PROGRESS
    return await in_database(lambda: jobs.batch_begin(batch, lines))


def _read_file(batch: Batch) -> bytes:
    found = UploadedFile.objects.filter(pk=batch.input_file_id, org_id=batch.org_id).first()
    return b"" if found is None else media.load(found.stored_as)


def _parsed(batch: Batch, data: bytes) -> tuple[list[BatchLine], list[dict[str, Any]]]:
    lines: list[BatchLine] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, raw in enumerate(filter(None, map(bytes.strip, data.split(b"\n"))), 1):
        try:
            lines.append(_line(batch, number, raw, seen))
        except InvalidRequest as error:
            errors.append({"code": error.code, "message": error.message, "param": error.param, "line": number})
        if len(errors) >= MAX_ERRORS or len(lines) > settings.ENV.max_batch_lines:
            break
    if len(lines) > settings.ENV.max_batch_lines:
        message = f"A batch may have {settings.ENV.max_batch_lines} lines."
        errors.append({"code": "too_many_lines", "message": message, "param": None, "line": None})
    if not lines and not errors:
        errors.append({"code": "empty_file", "message": "The file holds no requests.", "param": None, "line": None})
    return lines, errors


def _line(batch: Batch, number: int, raw: bytes, seen: set[str]) -> BatchLine:
    """Raises InvalidRequest."""
    if len(raw) > settings.ENV.max_body_bytes:
        raise InvalidRequest(f"A line may be {settings.ENV.max_body_bytes} bytes long.", code="line_too_long")
    given = parse_object(raw)
    custom_id, body = given.get("custom_id"), given.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID or "\0" in custom_id:
        raise InvalidRequest("custom_id is a string of 1 to 200 characters.", param="custom_id")
    if custom_id in seen:
        raise InvalidRequest(f"custom_id {custom_id[:60]!r} stands twice.", code="duplicate_custom_id", param="custom_id")
    if given.get("method") != "POST" or given.get("url") != batch.endpoint:
        raise InvalidRequest(f"method and url are POST and {batch.endpoint}.", param="url")
    if not isinstance(body, dict) or "\\u0000" in json.dumps(body):
        raise InvalidRequest("body is the request's, without NUL characters.", param="body")
    seen.add(custom_id)
    return BatchLine(batch=batch, number=number, custom_id=custom_id, body=body)


# --- Answering ---


async def _answer(batch: Batch, principal: Principal) -> None:
    """Every line that has no answer yet, a few at once."""
    running: set[asyncio.Task[None]] = set()
    try:
        async for line in _unanswered(batch):
            running.add(asyncio.create_task(_answer_line(batch, line, principal)))
            if len(running) >= LINES_AT_ONCE:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        await asyncio.gather(*running)
    finally:
        await end(*running)


async def _unanswered(batch: Batch) -> AsyncIterator[BatchLine]:
    page = await in_database(partial(_page_after, batch, 0))
    while page:
        for line in page:
            yield line
        page = await in_database(partial(_page_after, batch, page[-1].number))


def _page_after(batch: Batch, number: int) -> list[BatchLine]:
    return list(BatchLine.objects.filter(batch=batch, response__isnull=True, number__gt=number)[:LINES_READ])


async def _answer_line(batch: Batch, line: BatchLine, principal: Principal) -> None:
    try:
        status, body = 200, await _executed(batch, line, principal)
    except ServiceError as error:
        status, body = error.status, error_body(error, line.request_id)
    except asyncio.CancelledError:
        await asyncio.shield(_drop(batch, line))
        raise
    response = {"status_code": status, "request_id": line.request_id, "body": body}
    await in_database(lambda: jobs.line_finish(line, response, failed=status != 200))


async def _drop(batch: Batch, line: BatchLine) -> None:
    """A batch that ends takes its requests with it; one that only changes hands does not."""
    if batch.cancelling or timezone.now() > batch.expires_at:
        await following.cancelled(line.request_id)


async def _executed(batch: Batch, line: BatchLine, principal: Principal) -> dict[str, Any]:
    """Raises ServiceError."""
    request, render = await _PREPARE[batch.endpoint](line.body, principal)
    while True:
        named = dataclasses.replace(request, id=line.request_id, priority=Priority.FLEX, stream=False)
        try:
            await following.sent(named, principal, was_sent=False)
            found = [event async for event in following.events(named.id)]
        except following.Lost:
            await in_database(lambda: jobs.line_lost(line))
            continue
        last = found[-1]
        if isinstance(last, RequestFinished) and (error := failure(last)) is not None:
            raise error
        return render(found)


async def _chat(body: dict[str, Any], principal: Principal) -> tuple[InferenceRequest, Render]:
    prepared = await prepare.chat(parse(ChatRequest, body), principal)
    return prepared.request, ChatRenderer(prepared, False).whole


async def _completion(body: dict[str, Any], principal: Principal) -> tuple[InferenceRequest, Render]:
    prepared = await prepare.completion(parse(CompletionRequest, body), principal)
    return prepared.request, CompletionRenderer(prepared, False).whole


async def _embedding(body: dict[str, Any], principal: Principal) -> tuple[InferenceRequest, Render]:
    parsed = parse(embeddings.EmbeddingRequest, body)
    made = await embeddings.prepare(parsed, principal)
    return made.request, lambda events: embeddings.whole(parsed, made, events)


_PREPARE: dict[str, Callable[[dict[str, Any], Principal], Awaitable[tuple[InferenceRequest, Render]]]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/embeddings": _embedding,
}


# --- Ending ---


async def _finish(batch: Batch) -> None:
    state = State.CANCELLED if batch.cancelling else State.COMPLETED
    if await in_database(BatchLine.objects.filter(batch=batch, response__isnull=True).exists):
        state = State.CANCELLED if batch.cancelling else State.EXPIRED
    outputs, errors = await in_database(lambda: _files(batch, state))
    await in_database(lambda: jobs.batch_finish(batch, state, outputs, errors))


def _files(batch: Batch, state: State) -> tuple[bytes, bytes]:
    """The answers, and the lines that failed or were not reached."""
    outputs: list[str] = []
    errors: list[str] = []
    for line in BatchLine.objects.filter(batch=batch).iterator(chunk_size=500):
        target = errors if line.failed or line.response is None else outputs
        target.append(json.dumps(_written(line, state), ensure_ascii=False))
    return _joined(outputs), _joined(errors)


def _written(line: BatchLine, state: State) -> dict[str, Any]:
    missing = {"code": f"batch_{state}", "message": f"The batch was {state} before this line was answered."}
    response, error = (None, missing) if line.response is None else (json.loads(line.response), None)
    return {"id": f"batch_req_{line.pk}", "custom_id": line.custom_id, "response": response, "error": error}


def _joined(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()

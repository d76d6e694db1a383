"""`/v1/files` and `/v1/batches`. What runs batches is in background.py."""

from __future__ import annotations

import asyncio
import re
from datetime import timedelta
from typing import Annotated, Any, Literal

from django.db.models import Count, Q
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.utils import timezone
from pydantic import BeforeValidator, Field

from apps.api import intake
from apps.api.json import parse_object
from apps.api.multipart import Form, read_form
from apps.api.paging import page_of
from apps.api.strict import Strict, Text, invalid
from apps.core import media
from apps.core.database import in_database
from apps.core.errors import InvalidRequest, NotFound
from apps.core.types import Principal
from apps.jobs import services as jobs
from apps.jobs.models import Batch, State, UploadedFile

PURPOSES = ("batch", "user_data", "vision", "assistants", "fine-tune", "evals")
LIFETIMES = (3600, 30 * 86400)
BATCHED = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
_SAFE = re.compile(r"[^\w.\- ]")


# --- Files ---


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10 else value


class Expiry(Strict):
    anchor: Literal["created_at"]
    seconds: Annotated[int, BeforeValidator(_number)] = Field(ge=LIFETIMES[0], le=LIFETIMES[1])


class FileRequest(Strict):
    purpose: str
    expires_after: Expiry | None = None


async def upload(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    form = await read_form(request)

    async def make(body: FileRequest, principal: Principal) -> UploadedFile:
        return await _store(body, principal, form)

    _, stored = await intake.counted(lambda: form.fields, FileRequest, make, principal)
    return JsonResponse(file_body(stored))


async def _store(body: FileRequest, principal: Principal, form: Form) -> UploadedFile:
    if body.purpose not in PURPOSES:
        raise invalid(f"purpose: is one of {', '.join(PURPOSES)}.", "purpose")
    if "file" not in form.files or len(form.files) > 1:
        raise InvalidRequest("file is required, and one at a time.", code="missing_required_parameter", param="file")
    given = form.files["file"]
    if not given.data:
        raise invalid("file: is empty.", "file")
    until = timezone.now() + timedelta(seconds=body.expires_after.seconds) if body.expires_after else None
    new = jobs.NewFile(_SAFE.sub("_", given.name), body.purpose, given.data, until)
    return await in_database(lambda: jobs.file_create(principal.org_id, new))


async def files(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    rows = UploadedFile.objects.filter(org_id=principal.org_id)
    if purpose := request.GET.get("purpose"):
        if purpose not in (*PURPOSES, jobs.BATCH_OUTPUT):
            raise invalid(f"purpose: is one of {', '.join((*PURPOSES, jobs.BATCH_OUTPUT))}.", "purpose")
        rows = rows.filter(purpose=purpose)
    return JsonResponse(await page_of(request, rows, file_body, also=("purpose",)))


async def file(request: HttpRequest, principal: Principal, name: str) -> HttpResponseBase:
    return JsonResponse(file_body(await _find_file(principal, name)))


async def file_content(request: HttpRequest, principal: Principal, name: str) -> HttpResponseBase:
    found = await _find_file(principal, name)
    data = await asyncio.to_thread(media.load, found.stored_as)
    headers = {"Content-Disposition": f'attachment; filename="{found.filename}"', "X-Content-Type-Options": "nosniff"}
    return HttpResponse(data, content_type="application/octet-stream", headers=headers)


async def file_delete(request: HttpRequest, principal: Principal, name: str) -> HttpResponseBase:
    await in_database(lambda: jobs.file_delete(org_id=principal.org_id, file_id=name))
    return JsonResponse({"id": name, "object": "file", "deleted": True})


async def _find_file(principal: Principal, name: str) -> UploadedFile:
    found = await in_database(UploadedFile.objects.filter(pk=name, org_id=principal.org_id).first)
    if found is None:
        raise NotFound("There is no such file.")
    return found


def file_body(found: UploadedFile) -> dict[str, Any]:
    return {
        "id": found.pk,
        "object": "file",
        "bytes": found.bytes,
        "created_at": int(found.created_at.timestamp()),
        "expires_at": int(found.expires_at.timestamp()) if found.expires_at else None,
        "filename": found.filename,
        "purpose": found.purpose,
        "status": "processed",
    }


# --- Batches ---


class BatchRequest(Strict):
    input_file_id: Text
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )


async def batch_create(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    _, batch = await intake.counted(lambda: parse_object(request.body), BatchRequest, _create, principal)
    return JsonResponse(await _body(batch))


async def _create(body: BatchRequest, principal: Principal) -> Batch:
    if body.endpoint not in BATCHED:
        raise invalid(f"endpoint: is one of {', '.join(BATCHED)}.", "endpoint")

    def create() -> Batch:
        given = jobs.file_of(principal.org_id, body.input_file_id)
        if given.purpose != "batch":
            raise invalid("input_file_id: the file was not uploaded with the purpose batch.", "input_file_id")
        return jobs.batch_create(principal=principal, endpoint=body.endpoint, input_file=given, metadata=body.metadata or {})

    return await in_database(create)


async def batches(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    counted = _with_counts().filter(org_id=principal.org_id)
    return JsonResponse(await page_of(request, counted, batch_body))


async def batch(request: HttpRequest, principal: Principal, name: str) -> HttpResponseBase:
    found = await in_database(Batch.objects.filter(pk=name, org_id=principal.org_id).first)
    if found is None:
        raise NotFound("There is no such batch.")
    return JsonResponse(await _body(found))


async def batch_cancel(request: HttpRequest, principal: Principal, name: str) -> HttpResponseBase:
    found = await in_database(lambda: jobs.batch_cancel(org_id=principal.org_id, batch_id=name))
    return JsonResponse(await _body(found))


def _with_counts() -> Any:
    """Each with the number of its lines that are answered, and that failed."""
    answered, failed = Q(lines__response__isnull=False), Q(lines__failed=True)
    return Batch.objects.annotate(answered=Count("lines", filter=answered), failures=Count("lines", filter=failed))


async def _body(found: Batch) -> dict[str, Any]:
    return batch_body(await in_database(lambda: _with_counts().get(pk=found.pk)))


def batch_body(found: Any) -> dict[str, Any]:
    """OpenAI's shape, of a Batch with counts."""

    def at(moment: Any) -> int | None:
        return int(moment.timestamp()) if moment else None

    ended = at(found.ended_at)
    return {
        "id": found.pk,
        "object": "batch",
        "endpoint": found.endpoint,
        "errors": {"object": "list", "data": found.errors} if found.errors else None,
        "input_file_id": found.input_file_id,
        "completion_window": found.completion_window,
        "status": _status(found),
        "output_file_id": found.output_file_id or None,
        "error_file_id": found.error_file_id or None,
        "created_at": at(found.created_at),
        "in_progress_at": at(found.started_at),
        "expires_at": at(found.expires_at),
        "finalizing_at": ended if found.state == State.COMPLETED else None,
        **{f"{state}_at": ended if found.state == state else None for state in ("completed", "failed", "expired", "cancelled")},
        "cancelling_at": None,
        "request_counts": {
            "total": found.total,
            "completed": found.answered - found.failures,
            "failed": found.failures,
        },
        "metadata": found.metadata or None,
    }


def _status(found: Batch) -> str:
    if found.state in (State.QUEUED, State.IN_PROGRESS) and found.cancelling:
        return "cancelling"
    return "validating" if found.state == State.QUEUED else str(found.state)

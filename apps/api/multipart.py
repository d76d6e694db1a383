"""Forms with files, as clients upload them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from django.core.exceptions import RequestDataTooBig, SuspiciousOperation
from django.http import HttpRequest, UnreadablePostError
from django.http.multipartparser import MultiPartParserError

from apps.core.errors import InvalidRequest, PayloadTooLarge


@dataclass(frozen=True, slots=True)
class Upload:
    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Form:
    """`fields` are texts; those named a[] are a list called a, and a[b] is the member b of an object a. At most one file a
    name."""

    fields: dict[str, Any]
    files: dict[str, Upload]


async def read_form(request: HttpRequest) -> Form:
    """Raises InvalidRequest for what is no form, and PayloadTooLarge for one with too many fields."""
    try:
        return await asyncio.to_thread(_read, request)
    except RequestDataTooBig:
        raise PayloadTooLarge("The fields beside the file are too large.") from None
    except (MultiPartParserError, UnreadablePostError, SuspiciousOperation):
        raise InvalidRequest("The body is not a valid multipart form.", code="invalid_form") from None


def _read(request: HttpRequest) -> Form:
    if "CONTENT_LENGTH" not in request.META:  # it came in chunks, which Django takes for an empty one
        request.META["CONTENT_LENGTH"] = str(len(request.body))
    fields: dict[str, Any] = {}
    for name in request.POST:
        _put(fields, name, request.POST.getlist(name))
    files = {}
    for name, uploads in request.FILES.lists():
        if len(uploads) > 1:
            raise InvalidRequest(f"{name}: one file at a time.", code="invalid_form", param=name)
        files[name] = Upload(uploads[0].name or "", uploads[0].read())
    return Form(fields, files)


def _put(fields: dict[str, Any], name: str, values: list[str]) -> None:
    outer, bracket, inner = name.partition("[")
    members = fields.setdefault(outer, {}) if bracket and inner != "]" else None
    if (members is None and outer in fields) or not isinstance(members, dict | None) or (inner != "]" and len(values) > 1):
        raise InvalidRequest(f"{outer} is given twice.", code="invalid_form", param=outer)
    if members is not None:
        members[inner.removesuffix("]")] = values[0]
    else:
        fields[outer] = values if bracket else values[0]

"""`/v1/images/generations`, whole or with sketches on the way, and the links that lead to pictures."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse, StreamingHttpResponse
from PIL import Image, UnidentifiedImageError
from pydantic import Field

from apps.api import intake, sse
from apps.api.answer import SSE_HEADERS
from apps.api.errors import error_body
from apps.api.json import parse_object
from apps.api.prepare import find_model
from apps.api.render import units_body
from apps.api.schemas import Tiered
from apps.api.strict import Text, invalid
from apps.api.work import Job, job
from apps.core import media
from apps.core.errors import ServiceError
from apps.core.types import ImageWork, MediaDelta, Principal, RequestFinished, Usage

MAX_PROMPT = 4000
MAX_IMAGES = 10
SIDES = range(64, 1025, 8)
DEFAULT_SIZE = "512x512"
STEPS_OF_QUALITY = {"low": 1, "standard": 1, "auto": 1, "medium": 2, "hd": 4, "high": 4}
Quality = Literal["auto", "low", "medium", "high", "standard", "hd"]


class ImageRequest(Tiered):
    prompt: Annotated[Text, Field(min_length=1, max_length=MAX_PROMPT)]
    n: int | None = Field(None, ge=1, le=MAX_IMAGES)
    size: str | None = Field(None, max_length=20)
    quality: Quality | None = None
    steps: int | None = Field(None, ge=1, le=4)  # ours, instead of quality
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)  # ours
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None  # there is none to be stricter or laxer
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3)

    @property
    def sides(self) -> tuple[int, int]:
        """Width and height. Raises InvalidRequest for what the model does not make."""
        asked = DEFAULT_SIZE if self.size in (None, "auto") else str(self.size)
        width, found, height = asked.partition("x")
        sides = [int(side) for side in (width, height) if side.isascii() and side.isdigit() and len(side) < 6]
        if not found or len(sides) != 2 or any(side not in SIDES for side in sides):
            raise invalid("size: is auto, or WIDTHxHEIGHT, each a multiple of 8 from 64 to 1024.", "size")
        return sides[0], sides[1]

    @property
    def work(self) -> ImageWork:
        """Raises InvalidRequest for fields that contradict each other."""
        if self.steps is not None and self.quality not in (None, "auto"):
            raise invalid("steps: says the same as quality; send one of them.", "steps")
        self._check_stream()
        if self.output_compression is not None and self.output_format in (None, "png"):
            raise invalid("output_compression: is for jpeg and webp.", "output_compression")
        width, height = self.sides
        steps = self.steps or STEPS_OF_QUALITY[self.quality or "auto"]
        return ImageWork(self.prompt, width, height, steps, previews=bool(self.partial_images))

    def _check_stream(self) -> None:
        if self.stream and (self.n or 1) > 1:
            raise invalid("n: one picture at a time can be streamed.", "n")
        if self.partial_images is not None and not self.stream:
            raise invalid("partial_images: needs stream to be true.", "partial_images")

    @property
    def picture(self) -> Picture:
        return Picture(self.output_format or "png", self.output_compression)


class SocketImageRequest(ImageRequest):
    """Over a socket every request is streamed, its pictures apart by their choice, each as the worker made it."""

    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None

    def _check_stream(self) -> None:
        if self.stream is False:
            raise invalid("stream: whatever goes over a socket is streamed.", "stream")


@dataclass(frozen=True, slots=True)
class Picture:
    """How a picture is given out."""

    form: Literal["png", "jpeg", "webp"]
    compression: int | None

    @property
    def mime(self) -> str:
        return f"image/{self.form}"

    def encode(self, png: bytes) -> bytes:
        """Raises ServiceError for what the worker should not have sent."""
        if self.form == "png":
            return png
        out = io.BytesIO()
        quality = {} if self.compression is None else {"quality": max(1, self.compression)}
        try:
            with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
                image.convert("RGB").save(out, self.form.upper(), **quality)
        except (UnidentifiedImageError, OSError, ValueError):
            raise ServiceError("The worker sent no picture.", code="model_error") from None
        return out.getvalue()


async def generations(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    body, made = await intake.counted(lambda: parse_object(request.body), ImageRequest, prepare, principal)
    headers = await made.submit(principal)
    if body.stream:
        frames = sse.kept_alive(_frames(body, made, request.request_id), settings.ENV.sse_keep_alive_ms)  # type: ignore[attr-defined]
        return StreamingHttpResponse(frames, content_type="text/event-stream", headers={**SSE_HEADERS, **headers})
    pictures: dict[int, bytes] = {}
    usage = Usage()
    async for event in made.events():
        if isinstance(event, MediaDelta) and event.media and not event.preview:
            pictures[event.choice] = base64.b64decode(event.media)
        elif isinstance(event, RequestFinished):
            usage = event.usage
    data = [await _datum(request, body, pictures[choice]) for choice in sorted(pictures)]
    answer = {"created": int(time.time()), "data": data, **_echo(body), "usage": units_body(usage)}
    return JsonResponse(answer, headers=headers)


async def prepare(body: ImageRequest, principal: Principal) -> Job:
    card = await find_model(body.model, principal, {"image"}, "images")
    return job(body, principal, card, body.work, prefix="img", seed=body.seed, n=body.n or 1)


def _echo(body: ImageRequest) -> dict[str, Any]:
    width, height = body.sides
    return {
        "background": "opaque",
        "output_format": body.picture.form,
        "quality": body.quality or "auto",
        "size": f"{width}x{height}",
    }


async def _datum(request: HttpRequest, body: ImageRequest, png: bytes) -> dict[str, str]:
    data = await asyncio.to_thread(body.picture.encode, png)
    if body.response_format == "b64_json":
        return {"b64_json": base64.b64encode(data).decode()}
    name = await asyncio.to_thread(media.save, data, body.picture.mime)
    return {"url": request.build_absolute_uri(f"/v1/media/{media.token(name, body.picture.mime)}")}


async def _frames(body: ImageRequest, made: Job, http_id: str) -> AsyncIterator[bytes]:
    yield sse.KEEP_ALIVE
    sketches, picture = 0, b""
    try:
        async for event in made.events():
            if isinstance(event, MediaDelta) and event.preview and sketches < (body.partial_images or 0):
                yield _frame("image_generation.partial_image", body, event.media, partial_image_index=sketches)
                sketches += 1
            elif isinstance(event, MediaDelta) and event.media and not event.preview:
                picture = await asyncio.to_thread(body.picture.encode, base64.b64decode(event.media))
            elif isinstance(event, RequestFinished):
                encoded = base64.b64encode(picture).decode()
                yield _frame("image_generation.completed", body, encoded, usage=units_body(event.usage))
    except ServiceError as error:
        yield sse.frame(error_body(error, http_id))
    yield sse.DONE


def _frame(kind: str, body: ImageRequest, b64_json: str, **more: Any) -> bytes:
    told = {"type": kind, "b64_json": b64_json, "created_at": int(time.time()), **_echo(body), **more}
    return f"event: {kind}\n".encode() + sse.frame(told)


async def linked(request: HttpRequest, token: str) -> HttpResponseBase:
    """A file by its link. Whoever has the link may see it until it lapses."""
    found = await asyncio.to_thread(media.opened, token)
    headers = {"Cache-Control": f"private, max-age={media.LINK_SECONDS}", "X-Content-Type-Options": "nosniff"}
    return HttpResponse(found.data, content_type=found.mime, headers=headers)

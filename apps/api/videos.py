"""`/v1/videos`: durable jobs. What runs them is in background.py."""

from __future__ import annotations

import asyncio
import secrets
from typing import Annotated, Any, Literal

from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from pydantic import BeforeValidator, Field

from apps.api import intake
from apps.api.json import parse_object
from apps.api.multipart import read_form
from apps.api.paging import page_of
from apps.api.prepare import class_of, find_model
from apps.api.schemas import Tiered
from apps.api.strict import Number, Text, invalid
from apps.core import media
from apps.core.database import in_database
from apps.core.errors import Conflict, NotFound
from apps.core.types import Principal, VideoWork
from apps.fleet.selectors import ModelCard
from apps.jobs import services as jobs
from apps.jobs.models import State, Video
from apps.scheduler import services

POLL_MS = 1000  # what pollers of SDKs are told to wait
MAX_PROMPT = 4000
FPS = 8
FRAMES = range(9, 50, 4)  # the latent frames of a video hold four of its own, and the first one
REAL_SIZE = (720, 480)  # the only one that the published weights make
TINY_SIDES = range(64, 721, 16)


def _whole(value: Any) -> Any:
    """Forms, and SDKs, send numbers as texts."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20 else value


class VideoRequest(Tiered):
    prompt: Annotated[Text, Field(min_length=1, max_length=MAX_PROMPT)]
    seconds: Annotated[int | None, BeforeValidator(_whole)] = Field(None, ge=1, le=6)
    size: str | None = Field(None, max_length=20)
    # Ours.
    frames: Annotated[int | None, BeforeValidator(_whole)] = None
    steps: Annotated[int | None, BeforeValidator(_whole)] = Field(None, ge=1, le=50)
    guidance_scale: Number | None = Field(None, ge=1, le=20)
    seed: Annotated[int | None, BeforeValidator(_whole)] = Field(None, ge=0, le=2**63 - 1)

    @property
    def num_frames(self) -> int:
        """Raises InvalidRequest for what the model does not make."""
        if self.frames is None:
            return (self.seconds or 6) * FPS + 1
        if self.seconds is not None:
            raise invalid("frames: says the same as seconds; send one of them.", "frames")
        if self.frames not in FRAMES:
            raise invalid("frames: is 9, 13, 17 and so on to 49.", "frames")
        return self.frames

    def sides(self, card: ModelCard) -> tuple[int, int]:
        """Raises InvalidRequest for what the model does not make."""
        width, _, height = (self.size or f"{REAL_SIZE[0]}x{REAL_SIZE[1]}").partition("x")
        sides = tuple(int(side) for side in (width, height) if side.isascii() and side.isdigit() and len(side) < 6)
        tiny = card.tiny and len(sides) == 2 and all(side in TINY_SIDES for side in sides)
        if sides != REAL_SIZE and not tiny:
            raise invalid("size: this model makes 720x480.", "size")
        return sides[0], sides[1]


async def create(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    fields = await _fields(request)
    _, video = await intake.counted(lambda: fields, VideoRequest, _create, principal)
    return JsonResponse(video_body(video))


async def _fields(request: HttpRequest) -> dict[str, Any]:
    """SDKs send a form, others JSON."""
    if request.content_type == "application/json":
        return parse_object(request.body)
    form = await read_form(request)
    return {**form.fields, **dict.fromkeys(form.files, "a file")}


async def _create(body: VideoRequest, principal: Principal) -> Video:
    card = await find_model(body.model, principal, {"video"}, "videos")
    width, height = body.sides(card)
    guidance = 6.0 if body.guidance_scale is None else body.guidance_scale
    work = VideoWork(body.prompt, width, height, body.num_frames, body.steps or 50, guidance, FPS)
    seed = secrets.randbits(62) if body.seed is None else body.seed
    priority = int(class_of(body.priority, principal))
    return await in_database(
        lambda: jobs.video_create(principal=principal, model=card.name, work=work, seed=seed, priority=priority)
    )


async def index(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    page = await page_of(request, Video.objects.filter(org_id=principal.org_id), video_body)
    return JsonResponse(page)


async def show(request: HttpRequest, principal: Principal, name: str) -> HttpResponseBase:
    return JsonResponse(video_body(await _find(principal, name)), headers={"openai-poll-after-ms": str(POLL_MS)})


async def content(request: HttpRequest, principal: Principal, name: str) -> HttpResponseBase:
    video = await _find(principal, name)
    if request.GET.get("variant", "video") != "video":
        raise invalid("variant: only video is kept.", "variant")
    if video.state != State.COMPLETED:
        raise Conflict(f"The video is {video.state}.", code="not_ready")
    if not video.stored_as:
        raise NotFound("The video's file is no longer kept.")
    data = await asyncio.to_thread(media.load, video.stored_as)
    headers = {"Content-Disposition": f'attachment; filename="{video.pk}.mp4"'}
    return HttpResponse(data, content_type="video/mp4", headers=headers)


async def delete(request: HttpRequest, principal: Principal, name: str) -> HttpResponseBase:
    """Also cancels one that has not ended, before its next denoising step."""
    video = await in_database(lambda: jobs.video_delete(org_id=principal.org_id, video_id=name))
    await services.cancel(video.request_id)
    return JsonResponse({"id": video.pk, "object": "video.deleted", "deleted": True})


async def cancel(request: HttpRequest, principal: Principal, name: str) -> HttpResponseBase:
    video = await in_database(lambda: jobs.cancel(Video, org_id=principal.org_id, job_id=name))
    await services.cancel(video.request_id)
    return JsonResponse(video_body(video))


async def _find(principal: Principal, name: str) -> Video:
    video = await in_database(Video.objects.filter(pk=name, org_id=principal.org_id).first)
    if video is None:
        raise NotFound("There is no such video.")
    return video


def video_body(video: Video) -> dict[str, Any]:
    """OpenAI's shape. A cancelled one has failed by its names, with the code `cancelled`."""
    failed = video.state in (State.FAILED, State.CANCELLED, State.EXPIRED)
    status: Literal["failed"] | str = "failed" if failed else video.state
    return {
        "id": video.pk,
        "object": "video",
        "model": video.model,
        "status": status,
        "progress": video.progress,
        "created_at": int(video.created_at.timestamp()),
        "completed_at": int(video.ended_at.timestamp()) if video.state == State.COMPLETED and video.ended_at else None,
        "expires_at": int(video.expires_at.timestamp()) if video.expires_at else None,
        "prompt": video.prompt,
        "size": f"{video.width}x{video.height}",
        "seconds": str(round((video.frames - 1) / video.fps, 3)).removesuffix(".0"),
        "frames": video.frames,
        "steps": video.steps,
        "seed": video.seed,
        "request_id": video.request_id,
        "remixed_from_video_id": None,
        "error": {"code": video.error_code, "message": video.error_message} if failed else None,
    }

"""Runs one video: its request followed, its progress written down once a second, its file kept at the end."""

from __future__ import annotations

import asyncio
import base64

from apps.accounts.auth import principal_of
from apps.api import following
from apps.api.render import failure
from apps.core.database import in_database
from apps.core.errors import ServiceError
from apps.core.tasks import end
from apps.core.types import InferenceRequest, MediaDelta, Principal, Priority, RequestFinished, SamplingParams, VideoWork
from apps.jobs import services as jobs
from apps.jobs.models import State, Video

BEAT_SECONDS = 1.0


async def run_video(video: Video) -> None:
    """To its end, unless somebody else ended it or took it over."""
    principal = await principal_of(video.org_id, video.key_id)
    if principal is None:
        await _fail(video, "invalid_api_key", "The key that asked for it is not active any more.")
        return
    beat = asyncio.create_task(_beat(video))
    work = asyncio.create_task(_make(video, principal))
    try:
        await asyncio.wait({beat, work}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        elif await in_database(lambda: _ended_elsewhere(video)):
            await following.cancelled(video.request_id)
    finally:
        await end(beat, work)


def _ended_elsewhere(video: Video) -> bool:
    """Cancelled or deleted, and not only taken over."""
    row = Video.objects.filter(pk=video.pk).first()
    return row is None or row.state == State.CANCELLED


async def _beat(video: Video) -> None:
    """Until the video is not ours to run any more."""
    ours = True
    while ours:
        ours = await in_database(lambda: jobs.keep(video, progress=video.progress, state=video.state))
        await asyncio.sleep(BEAT_SECONDS if ours else 0)


async def _make(video: Video, principal: Principal) -> None:
    while True:
        try:
            request = _request(video, principal)
            await following.sent(request, principal, was_sent=video.state == State.IN_PROGRESS)
            video.state = State.IN_PROGRESS
            await in_database(lambda: jobs.keep(video, state=video.state, generation=video.generation))
            await _follow(video, request)
            return
        except following.Lost:
            video.generation, video.state, video.progress = video.generation + 1, State.QUEUED, 0
            await in_database(lambda: jobs.keep(video, state=video.state, generation=video.generation, progress=0))
        except ServiceError as error:
            await _fail(video, error.code, error.message)
            return


def _request(video: Video, principal: Principal) -> InferenceRequest:
    work = VideoWork(video.prompt, video.width, video.height, video.frames, video.steps, video.guidance, video.fps)
    return InferenceRequest(
        id=video.request_id,
        org_id=video.org_id,
        key_id=video.key_id,
        model=video.model,
        prompts=(),
        sampling=SamplingParams(max_tokens=work.output_units, seed=video.seed),
        priority=Priority(min(video.priority, principal.max_priority)),
        weight=principal.weight,
        work=work,
    )


async def _follow(video: Video, request: InferenceRequest) -> None:
    """Raises how the request failed."""
    done, data = 0, b""
    async for event in following.events(request.id):
        if isinstance(event, MediaDelta):
            done += event.units
            video.progress = min(99, 100 * done // request.sampling.max_tokens)
            if event.media and not event.preview:
                data = base64.b64decode(event.media)
        elif isinstance(event, RequestFinished) and (error := failure(event)) is not None:
            raise error
    if not data:
        raise ServiceError("The worker sent no video.", code="model_error")
    await in_database(lambda: jobs.video_finish(video, data))


async def _fail(video: Video, code: str, message: str) -> None:
    await in_database(lambda: jobs.end(video, State.FAILED, code=code, message=message))

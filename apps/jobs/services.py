"""Every change of a job, each in one transaction that a stale runner cannot make."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

from django.db import transaction
from django.db.models import F, Q
from django.utils import timezone

from apps.core import media
from apps.core.errors import Conflict, InvalidRequest, NotFound
from apps.core.types import Principal, VideoWork
from apps.jobs.models import ENDS, Batch, BatchLine, Claimed, Delivery, State, UploadedFile, Video

CLAIM_SECONDS = 10.0
KEEP_VIDEO = timedelta(days=1)
KEEP_OUTPUT = timedelta(days=30)
BATCH_OUTPUT = "batch_output"  # the purpose of files that batches make
J = TypeVar("J", bound=Claimed)


# --- Claims: who runs a job ---


def claim(kind: type[J]) -> J | None:
    """The oldest job that is due and that nobody runs, now run by the caller. `SKIP LOCKED`: two runners never wait."""
    now = timezone.now()
    free = Q(claimed_until=None) | Q(claimed_until__lt=now)
    with transaction.atomic():
        due = kind._default_manager.filter(free, not_before__lte=now).exclude(state__in=ENDS)
        job = due.order_by("created_at").select_for_update(skip_locked=True).first()
        if job is None:
            return None
        job.attempt += 1
        job.claimed_until = now + timedelta(seconds=CLAIM_SECONDS)
        job.save(update_fields=["attempt", "claimed_until"])
        return job


def _held(job: J) -> Any:
    """The job's row while this claim holds and it has not ended."""
    rows = type(job)._default_manager.filter(pk=job.pk, attempt=job.attempt)
    return rows.exclude(state__in=ENDS)


def keep(job: Claimed, **changed: Any) -> bool:
    """Says that the job is still run, and writes what changed. False when the claim is no longer ours, or the job has ended."""
    until = timezone.now() + timedelta(seconds=CLAIM_SECONDS)
    return bool(_held(job).update(claimed_until=until, **changed))


def give_back(job: Claimed, *, seconds: float = 0.0) -> None:
    """Lets another runner have it, not before `seconds`."""
    _held(job).update(claimed_until=None, not_before=timezone.now() + timedelta(seconds=seconds))


@transaction.atomic
def end(job: Claimed, state: State, *, code: str = "", message: str = "", **changed: Any) -> bool:
    """The one end of a job, and its event. False when it had ended, or the claim is no longer ours."""
    now = timezone.now()
    ended = _held(job).update(
        state=state, ended_at=now, claimed_until=None, error_code=code, error_message=message[:300], **changed
    )
    if ended:
        Delivery.objects.create(org_id=job.org_id, kind=f"{type(job).__name__.lower()}.{state}", object_id=job.pk)
    return bool(ended)


# --- Videos ---


def video_create(*, principal: Principal, model: str, work: VideoWork, seed: int, priority: int) -> Video:
    return Video.objects.create(
        org_id=principal.org_id, key_id=principal.key_id, model=model, prompt=work.prompt, width=work.width,
        height=work.height, frames=work.frames, fps=work.fps, steps=work.steps, guidance=work.guidance, seed=seed,
        priority=priority,
    )  # fmt: skip


def video_finish(video: Video, data: bytes) -> bool:
    """Keeps the file and ends the video. What lost the race leaves no file behind."""
    name = media.save(data, "video/mp4", folder="videos")
    if end(video, State.COMPLETED, progress=100, stored_as=name, expires_at=timezone.now() + KEEP_VIDEO):
        return True
    media.remove(name)
    return False


@transaction.atomic
def video_delete(*, org_id: str, video_id: str) -> Video:
    """Forgets a video, and cancels it when it has not ended. Raises NotFound."""
    video = Video.objects.select_for_update().filter(pk=video_id, org_id=org_id).first()
    if video is None:
        raise NotFound("There is no such video.")
    if video.stored_as:
        transaction.on_commit(lambda: media.remove(video.stored_as))
    video.delete()
    video.pk = video_id
    return video


@transaction.atomic
def cancel(kind: type[J], *, org_id: str, job_id: str) -> J:
    """Ends a job that has not ended; its runner notices within a second. Raises NotFound, and Conflict for one that had."""
    job = kind._default_manager.select_for_update().filter(pk=job_id, org_id=org_id).first()
    if job is None:
        raise NotFound("There is no such job.")
    if job.state in ENDS:
        raise Conflict(f"It has ended already: {job.state}.", code="already_finished")
    end(job, State.CANCELLED, code="cancelled", message="It was cancelled.")
    job.refresh_from_db()
    return job


# --- Files ---


@dataclass(frozen=True, slots=True)
class NewFile:
    filename: str
    purpose: str
    data: bytes
    expires_at: datetime | None = None


def file_create(org_id: str, new: NewFile) -> UploadedFile:
    """Blocks: call it in a thread."""
    name = media.save_raw(new.data, f"files/{org_id}")
    return UploadedFile.objects.create(
        org_id=org_id, filename=new.filename[:200] or "unnamed", purpose=new.purpose, bytes=len(new.data), stored_as=name,
        expires_at=new.expires_at,
    )  # fmt: skip


@transaction.atomic
def file_delete(*, org_id: str, file_id: str) -> None:
    """Raises NotFound, and Conflict while a batch reads it."""
    found = UploadedFile.objects.select_for_update().filter(pk=file_id, org_id=org_id).first()
    if found is None:
        raise NotFound("There is no such file.")
    if Batch.objects.filter(input_file_id=file_id, total=0).exclude(state__in=ENDS).exists():
        raise Conflict("A batch is about to read this file.", code="file_in_use")
    transaction.on_commit(lambda: media.remove(found.stored_as))
    found.delete()


# --- Batches ---


def batch_create(*, principal: Principal, endpoint: str, input_file: UploadedFile, metadata: Mapping[str, str]) -> Batch:
    return Batch.objects.create(
        org_id=principal.org_id, key_id=principal.key_id, endpoint=endpoint, completion_window="24h",
        metadata=dict(metadata), input_file_id=input_file.pk, expires_at=timezone.now() + timedelta(hours=24),
    )  # fmt: skip


@transaction.atomic
def batch_begin(batch: Batch, lines: Iterable[BatchLine]) -> bool:
    """Writes a batch's requests down, once. False when the claim is no longer ours."""
    made = list(lines)
    if not keep(batch, state=State.IN_PROGRESS, total=len(made), started_at=timezone.now()):
        return False
    BatchLine.objects.bulk_create(made, batch_size=500)
    return True


def batch_cancel(*, org_id: str, batch_id: str) -> Batch:
    """Asks a batch's runner to end it with what it has. Raises NotFound, and Conflict for one that had ended."""
    batch = Batch.objects.filter(pk=batch_id, org_id=org_id).first()
    if batch is None:
        raise NotFound("There is no such batch.")
    if not Batch.objects.filter(pk=batch_id).exclude(state__in=ENDS).update(cancelling=True):
        raise Conflict(f"It has ended already: {batch.state}.", code="already_finished")
    batch.refresh_from_db()
    return batch


def line_finish(line: BatchLine, response: Mapping[str, Any], *, failed: bool) -> None:
    """Writes the answer of a line, unless it has one."""
    BatchLine.objects.filter(pk=line.pk, response__isnull=True).update(response=json.dumps(response), failed=failed)


def line_lost(line: BatchLine) -> None:
    """Its request is not in the queue any more: the next one has another name."""
    BatchLine.objects.filter(pk=line.pk, generation=line.generation).update(generation=F("generation") + 1)
    line.generation += 1


@transaction.atomic
def batch_finish(batch: Batch, state: State, outputs: bytes, errors: bytes) -> bool:
    """Ends a batch with its two files; an empty one is not made."""
    keep_until = timezone.now() + KEEP_OUTPUT
    made = {}
    for name, data in (("output", outputs), ("error", errors)):
        if data:
            new = NewFile(f"{batch.pk}_{name}.jsonl", BATCH_OUTPUT, data, keep_until)
            made[f"{name}_file_id"] = file_create(batch.org_id, new).pk
    if end(batch, state, **made):
        return True
    for file_id in made.values():
        file_delete(org_id=batch.org_id, file_id=file_id)
    return False


# --- Housekeeping ---


def purge() -> int:
    """Removes what has lapsed. Returns how many files."""
    now = timezone.now()
    lapsed = list(Video.objects.filter(expires_at__lt=now).exclude(stored_as="").values_list("pk", "stored_as"))
    for pk, name in lapsed:
        Video.objects.filter(pk=pk).update(stored_as="")
        media.remove(name)
    files = list(UploadedFile.objects.filter(expires_at__lt=now))
    for file in files:
        file.delete()
        media.remove(file.stored_as)
    return len(lapsed) + len(files) + media.purge()


def file_of(org_id: str, file_id: str) -> UploadedFile:
    """Raises InvalidRequest."""
    found = UploadedFile.objects.filter(pk=file_id, org_id=org_id).first()
    if found is None:
        raise InvalidRequest(f"There is no file {file_id[:60]!r}.", code="invalid_value", param="input_file_id")
    return found

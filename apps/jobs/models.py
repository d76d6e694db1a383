"""Work that outlives its connection: committed here before it is acknowledged. Private to this app and to what runs it."""

from __future__ import annotations

import secrets
from functools import partial
from typing import ClassVar

from django.db import models
from django.utils import timezone


def _new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(16)}"


class UploadedFile(models.Model):
    """A client's file, or one that was made for it. Its bytes are in Django's storage under `stored_as`."""

    id = models.CharField(max_length=50, primary_key=True, default=partial(_new_id, "file-"))
    org_id = models.CharField(max_length=40, db_index=True)
    filename = models.CharField(max_length=200)
    purpose = models.CharField(max_length=30)
    bytes = models.BigIntegerField()
    stored_as = models.CharField(max_length=200)
    created_at = models.DateTimeField(default=timezone.now)
    expires_at = models.DateTimeField(null=True)

    class Meta:
        ordering = ("-created_at", "-id")

    def __str__(self) -> str:
        return f"{self.id} ({self.filename})"


class State(models.TextChoices):
    """The last four are ends: nothing leaves them."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


ENDS = (State.COMPLETED, State.FAILED, State.CANCELLED, State.EXPIRED)


class Claimed(models.Model):
    """Run by one runner at a time, which says again and again that it still does. `attempt` grows with every claim, and an
    older one changes nothing. `generation` names the request in the queue: it grows when Redis has lost it."""

    org_id = models.CharField(max_length=40, db_index=True)
    key_id = models.CharField(max_length=40)
    state = models.CharField(max_length=20, choices=State.choices, default=State.QUEUED)
    attempt = models.PositiveIntegerField(default=0)
    generation = models.PositiveIntegerField(default=0)
    claimed_until = models.DateTimeField(null=True)
    not_before = models.DateTimeField(default=timezone.now)  # a try that was refused for want of room waits until then
    error_code = models.CharField(max_length=60, blank=True)
    error_message = models.CharField(max_length=300, blank=True)
    created_at = models.DateTimeField(default=timezone.now)
    ended_at = models.DateTimeField(null=True)

    class Meta:
        abstract = True
        ordering = ("-created_at", "-id")
        indexes: ClassVar = [models.Index(fields=["state", "not_before"])]


class Video(Claimed):
    """A video on its way. `progress` is in percent of its work."""

    id = models.CharField(max_length=50, primary_key=True, default=partial(_new_id, "video_"))
    model = models.CharField(max_length=100)
    prompt = models.TextField()
    width = models.PositiveIntegerField()
    height = models.PositiveIntegerField()
    frames = models.PositiveIntegerField()
    fps = models.PositiveIntegerField()
    steps = models.PositiveIntegerField()
    guidance = models.FloatField()
    seed = models.BigIntegerField()
    priority = models.PositiveSmallIntegerField()
    progress = models.PositiveSmallIntegerField(default=0)
    stored_as = models.CharField(max_length=200, blank=True)
    expires_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return f"{self.id} ({self.state})"

    @property
    def request_id(self) -> str:
        return f"{self.id}-{self.generation}"


class Batch(Claimed):
    """A file of requests, each of which gets exactly one line of an answer."""

    id = models.CharField(max_length=50, primary_key=True, default=partial(_new_id, "batch_"))
    endpoint = models.CharField(max_length=60)
    completion_window = models.CharField(max_length=10)
    metadata = models.JSONField(default=dict)
    input_file_id = models.CharField(max_length=50)
    output_file_id = models.CharField(max_length=50, blank=True)
    error_file_id = models.CharField(max_length=50, blank=True)
    errors = models.JSONField(default=list)  # why validation refused the file
    total = models.PositiveIntegerField(default=0)
    cancelling = models.BooleanField(default=False)
    started_at = models.DateTimeField(null=True)
    expires_at = models.DateTimeField()

    def __str__(self) -> str:
        return f"{self.id} ({self.state})"


class BatchLine(models.Model):
    """One request of a batch. `response` is written once, as text: a model may say NUL, which jsonb refuses."""

    batch = models.ForeignKey(Batch, on_delete=models.CASCADE, related_name="lines")
    number = models.PositiveIntegerField()
    custom_id = models.CharField(max_length=200)
    body = models.JSONField()
    generation = models.PositiveIntegerField(default=0)
    response = models.TextField(null=True)
    failed = models.BooleanField(default=False)

    class Meta:
        ordering = ("number",)
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["batch", "number"], name="one_line_a_number"),
            models.UniqueConstraint(fields=["batch", "custom_id"], name="one_line_a_custom_id"),
        ]

    def __str__(self) -> str:
        return f"{self.batch_id}/{self.custom_id}"

    @property
    def request_id(self) -> str:
        return f"{self.batch_id}-{self.number}-{self.generation}"


class Webhook(models.Model):
    """Where an organization is told of ends. Set by operators only: the site calls no address that a client names."""

    org_id = models.CharField(max_length=40, unique=True)
    url = models.URLField(max_length=500)
    secret = models.CharField(max_length=100, default=partial(secrets.token_urlsafe, 32))
    is_enabled = models.BooleanField(default=True)

    def __str__(self) -> str:
        return self.url


class Delivery(models.Model):
    """An event that is to be told, written in the transaction that made it true."""

    id = models.CharField(max_length=50, primary_key=True, default=partial(_new_id, "evt_"))
    org_id = models.CharField(max_length=40)
    kind = models.CharField(max_length=60)
    object_id = models.CharField(max_length=50)
    created_at = models.DateTimeField(default=timezone.now)
    attempts = models.PositiveSmallIntegerField(default=0)
    due_at = models.DateTimeField(default=timezone.now, db_index=True)
    delivered_at = models.DateTimeField(null=True)
    given_up = models.BooleanField(default=False)

    class Meta:
        verbose_name_plural = "deliveries"
        ordering = ("-created_at",)

    def __str__(self) -> str:
        return f"{self.kind} of {self.object_id}"

"""What the API keeps for its clients. Private to this app; apps/api/responses/store.py reads and writes it."""

from __future__ import annotations

from datetime import datetime, timedelta

from django.db import models
from django.utils import timezone

KEPT = timedelta(days=30)


def _lapses() -> datetime:
    return timezone.now() + KEPT


class StoredResponse(models.Model):
    """A response and the conversation it answered, whole, so that going on from it reads one row.

    The model's context bounds the conversation. Both are JSON as text, because a model may say NUL, which jsonb refuses.
    """

    id = models.CharField(primary_key=True, max_length=64)
    organization = models.ForeignKey("accounts.Organization", on_delete=models.CASCADE, related_name="+")
    input = models.TextField(help_text="The items before the answer, as JSON.")
    body = models.TextField(help_text="The response as its client had it, as JSON.")
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    expires_at = models.DateTimeField(default=_lapses, db_index=True)

    def __str__(self) -> str:
        return self.id

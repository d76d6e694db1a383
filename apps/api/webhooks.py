"""Tells organizations of what ended, by signed calls to the addresses that operators entered for them.

Signed as Standard Webhooks says: `webhook-signature` is `v1,` and the base64 of an HMAC-SHA256, by the secret, of
"{webhook-id}.{webhook-timestamp}.{body}". A call that is not answered with 2xx is made again, with the same id.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import logging
import socket
import time
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import httpx
from django.conf import settings
from django.db import transaction
from django.utils import timezone

from apps.core.database import in_database
from apps.jobs.models import Delivery, Webhook

PAUSES = (5, 30, 120, 600, 3600, 6 * 3600, 12 * 3600)  # seconds before each further try; then it is given up
CALL_SECONDS = 10.0
AT_ONCE = 20
_LOG = logging.getLogger(__name__)


async def deliver_due() -> None:
    """Makes the calls that are due."""
    due = await in_database(_take)
    await asyncio.gather(*(_deliver(delivery, hook) for delivery, hook in due))


@transaction.atomic
def _take() -> list[tuple[Delivery, Webhook]]:
    """What is due, put off meanwhile, so that no other runner takes it too. Events that nobody wants are done at once."""
    now = timezone.now()
    rows = Delivery.objects.filter(due_at__lte=now, delivered_at=None, given_up=False).order_by("due_at")
    due = list(rows.select_for_update(skip_locked=True)[:AT_ONCE])
    hooks = {hook.org_id: hook for hook in Webhook.objects.filter(is_enabled=True, org_id__in={d.org_id for d in due})}
    for delivery in due:
        if delivery.org_id not in hooks:
            delivery.given_up = True
        delivery.attempts += 1
        delivery.due_at = now + timedelta(seconds=PAUSES[min(delivery.attempts, len(PAUSES)) - 1])
        delivery.save(update_fields=["attempts", "due_at", "given_up"])
    return [(delivery, hooks[delivery.org_id]) for delivery in due if delivery.org_id in hooks]


async def _deliver(delivery: Delivery, hook: Webhook) -> None:
    problem = await _call(delivery, hook)
    if problem is None:
        done: dict[str, Any] = {"delivered_at": timezone.now()}
    else:
        _LOG.warning("webhook %s, try %s: %s", delivery.pk, delivery.attempts, problem)
        done = {"given_up": delivery.attempts > len(PAUSES)}
    await in_database(lambda: Delivery.objects.filter(pk=delivery.pk).update(**done))


async def _call(delivery: Delivery, hook: Webhook) -> str | None:
    """None when it was taken, else why not."""
    body = json.dumps(event_body(delivery)).encode()
    headers = {"content-type": "application/json", **signature(hook.secret, delivery.pk, int(time.time()), body)}
    try:
        await asyncio.to_thread(require_public, hook.url)
        async with httpx.AsyncClient(timeout=CALL_SECONDS, follow_redirects=False, trust_env=False) as client:
            answer = await client.post(hook.url, content=body, headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        return type(error).__name__
    return None if answer.is_success else f"answered {answer.status_code}"


def event_body(delivery: Delivery) -> dict[str, Any]:
    return {
        "id": delivery.pk,
        "object": "event",
        "type": delivery.kind,
        "created_at": int(delivery.created_at.timestamp()),
        "data": {"id": delivery.object_id},
    }


def signature(secret: str, event_id: str, at: int, body: bytes) -> dict[str, str]:
    """The headers by which a receiver knows that a call is ours."""
    signed = hmac.new(secret.encode(), f"{event_id}.{at}.".encode() + body, hashlib.sha256).digest()
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(at),
        "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
    }


def require_public(url: str) -> None:
    """Raises ValueError for an address inside, unless the installation allows that. Operators enter these; they err too."""
    if settings.ENV.webhook_private_addresses:
        return
    parts = urlsplit(url)
    if parts.scheme != "https":
        raise ValueError("not https")
    for *_, address in socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM):
        if not ipaddress.ip_address(address[0]).is_global:
            raise ValueError("not a public address")

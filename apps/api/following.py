"""One request of a durable job, followed from wherever it is: not sent yet, waiting, running, or done and still known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping

from apps.core.errors import NotFound, QuotaExceeded, ServiceError, Unavailable
from apps.core.types import Event, InferenceRequest, Principal
from apps.scheduler import services

WAITS = (1.0, 2.0, 5.0, 10.0, 30.0)  # seconds, after each refusal in a row for want of room


class Lost(Exception):
    """The queue does not know the request any more."""


async def sent(
    request: InferenceRequest, principal: Principal, *, was_sent: bool, attachments: Mapping[str, bytes] | None = None
) -> None:
    """Sees to it that the request is in the queue, waiting for room where there is none. Raises what a retry does not help
    against, and Lost for one that `was_sent` and is gone."""
    refused = 0
    while await services.owner(request.id) is None:
        if was_sent:
            raise Lost
        try:
            await services.submit(request, principal, attachments)
        except (QuotaExceeded, Unavailable) as error:
            if error.should_retry is False:
                raise
            wait = error.retry_after_seconds or WAITS[min(refused, len(WAITS) - 1)]
            refused += 1
            await asyncio.sleep(wait)


async def events(request_id: str) -> AsyncGenerator[Event, None]:
    """From the first to the last. Raises Lost when the queue loses them meanwhile. To stop listening cancels nothing."""
    try:
        async for _, event in services.events(request_id):
            yield event
    except NotFound:
        raise Lost from None


async def cancelled(request_id: str) -> None:
    """Ends the request, as far as the queue can be reached."""
    try:
        await services.cancel(request_id)
    except ServiceError:
        return

"""Requests for what is no text: made from a checked body, submitted, and followed to their end."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from apps.api.answer import followed
from apps.api.headers import rate_limit_headers
from apps.api.prepare import class_of
from apps.api.render import failure
from apps.api.schemas import Tiered
from apps.core.types import (
    ChoiceFinished,
    InferenceRequest,
    MediaDelta,
    Principal,
    RequestFinished,
    SamplingParams,
    TextDelta,
    Work,
)
from apps.fleet.selectors import ModelCard
from apps.scheduler import services

Made = TextDelta | MediaDelta | ChoiceFinished | RequestFinished


@dataclass(frozen=True, slots=True)
class Job:
    """A request ready to submit, with its attachments by key."""

    request: InferenceRequest
    card: ModelCard
    attachments: Mapping[str, bytes] = field(default_factory=dict)

    async def submit(self, principal: Principal) -> dict[str, str]:
        """Returns the headers that tell what is left of a limit, and the name to ask about the request by. Raises what
        `services.submit` raises."""
        left = await services.submit(self.request, principal, self.attachments)
        return {**rate_limit_headers(left), "x-inference-id": self.request.id}

    async def events(self) -> AsyncGenerator[Made, None]:
        """To the end of a request that succeeds. Raises how it failed. To stop listening is to cancel."""
        async with aclosing(followed(self.request.id)) as events:
            async for event in events:
                if isinstance(event, RequestFinished) and (error := failure(event)) is not None:
                    raise error
                assert isinstance(event, Made)
                yield event


def job(
    body: Tiered,
    principal: Principal,
    card: ModelCard,
    work: Work,
    *,
    prefix: str,
    seed: int | None = None,
    n: int = 1,
    temperature: float = 0.0,
    prompts: tuple[tuple[int, ...], ...] = (),
    attachments: Mapping[str, bytes] | None = None,
) -> Job:
    """Raises PermissionDenied for a class above the plan's."""
    kept = dict(attachments or {})
    chosen = secrets.randbits(63) if seed is None else seed % 2**64
    request = InferenceRequest(
        id=f"{prefix}-{secrets.token_hex(12)}",
        org_id=principal.org_id,
        key_id=principal.key_id,
        model=card.name,
        prompts=prompts,
        sampling=SamplingParams(max_tokens=work.output_units, seed=chosen, temperature=temperature),
        n=n,
        priority=class_of(body.priority, principal),
        weight=principal.weight,
        work=work,
        blobs=tuple(kept),
    )
    return Job(request, card, kept)

"""`/v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from django.http import HttpRequest, HttpResponseBase, JsonResponse
from pydantic import Field

from apps.api import intake
from apps.api.json import parse_object
from apps.api.prepare import find_model
from apps.api.schemas import Tiered, TokenIds
from apps.api.strict import Text, invalid
from apps.api.work import Job, job
from apps.core.errors import InvalidRequest, ServiceError
from apps.core.types import EmbedWork, Event, MediaDelta, Principal, RequestFinished, Usage
from apps.fleet.selectors import ModelCard
from apps.fleet.tokenizers import ModelTokenizer, tokenizer_for

MAX_INPUTS = 2048
_MIME = "application/octet-stream"


class EmbeddingRequest(Tiered):
    input: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, le=4096)

    @property
    def inputs(self) -> list[str | list[int]]:
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)


async def embeddings(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    body, made = await intake.counted(lambda: parse_object(request.body), EmbeddingRequest, prepare, principal)
    headers = await made.submit(principal)
    return JsonResponse(whole(body, made, [event async for event in made.events()]), headers=headers)


def whole(body: EmbeddingRequest, made: Job, events: Sequence[Event]) -> dict[str, Any]:
    """The answer's body, from all its events. Raises ServiceError when the worker left a vector out."""
    vectors: dict[int, bytes] = {}
    usage = Usage()
    for event in events:
        if isinstance(event, MediaDelta) and event.mime == _MIME:
            vectors[event.choice] = base64.b64decode(event.media)
        elif isinstance(event, RequestFinished):
            usage = event.usage
    if len(vectors) != made.request.num_choices:
        raise ServiceError("The worker left vectors out.", code="model_error")
    as_base64 = body.encoding_format == "base64"
    return {
        "object": "list",
        "model": made.card.name,
        "data": [
            {"object": "embedding", "index": index, "embedding": _shown(vectors[index], as_base64)} for index in sorted(vectors)
        ],
        "usage": {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens},
    }


def _shown(vector: bytes, as_base64: bool) -> str | list[float]:
    """Float32, little-endian."""
    if as_base64:
        return base64.b64encode(vector).decode()
    values: list[float] = np.frombuffer(vector, "<f4").tolist()
    return values


async def prepare(body: EmbeddingRequest, principal: Principal) -> Job:
    card = await find_model(body.model, principal, {"embedding"}, "embeddings")
    tokenizer = tokenizer_for(card.name)
    if body.dimensions is not None and body.dimensions > tokenizer.hidden_size:
        message = f"dimensions: {card.name} has {tokenizer.hidden_size}."
        raise invalid(message, "dimensions")
    prompts = await asyncio.to_thread(_prompts, body, card, tokenizer)
    return job(body, principal, card, EmbedWork(body.dimensions or 0), prefix="embd", prompts=prompts)


def _prompts(body: EmbeddingRequest, card: ModelCard, tokenizer: ModelTokenizer) -> tuple[tuple[int, ...], ...]:
    return tuple(_ids(entry, f"input[{place}]", card, tokenizer) for place, entry in enumerate(body.inputs))


def _ids(entry: str | list[int], param: str, card: ModelCard, tokenizer: ModelTokenizer) -> tuple[int, ...]:
    """Raises InvalidRequest for what the model cannot take."""
    if isinstance(entry, str):
        if not entry:
            raise invalid(f"{param}: is empty.", param)
        ids = tuple(tokenizer.encode_framed(entry))
    else:
        ids = tuple(entry)
        if max(ids) >= tokenizer.vocab_size:
            raise invalid(f"{param}: holds a token id the model does not have.", param)
    if len(ids) > card.context_length:
        raise InvalidRequest(
            f"{param}: is {len(ids)} tokens long; {card.name} takes {card.context_length}.",
            code="context_length_exceeded",
            param=param,
        )
    return ids

"""What the scheduler writes into Redis and believes when it reads it back: JSON, checked field by field.

An event is one letter that names its type, then its JSON.
"""

from __future__ import annotations

from pydantic import TypeAdapter, ValidationError

from apps.core.types import ChoiceFinished, Event, InferenceRequest, MediaDelta, RequestFinished, TextDelta

_REQUEST = TypeAdapter(InferenceRequest)
_EVENTS: dict[str, TypeAdapter[Event]] = {
    "t": TypeAdapter(TextDelta),
    "m": TypeAdapter(MediaDelta),
    "c": TypeAdapter(ChoiceFinished),
    "f": TypeAdapter(RequestFinished),  # written by lua/end_request.lua
}

_LETTERS: dict[type, str] = {TextDelta: "t", MediaDelta: "m", ChoiceFinished: "c"}


class Garbled(ValueError):
    """Something in Redis that this code did not write."""


def encode_request(request: InferenceRequest) -> str:
    return _REQUEST.dump_json(request).decode()


def decode_request(payload: str) -> InferenceRequest:
    """Raises Garbled."""
    try:
        return _REQUEST.validate_json(payload)
    except ValidationError:
        raise Garbled("not a request") from None


def encode_event(event: TextDelta | MediaDelta | ChoiceFinished) -> str:
    letter = _LETTERS[type(event)]
    return letter + _EVENTS[letter].dump_json(event).decode()


def decode_event(payload: str) -> Event:
    """Raises Garbled."""
    try:
        return _EVENTS[payload[:1]].validate_json(payload[1:])
    except (KeyError, ValidationError):
        raise Garbled("not an event") from None

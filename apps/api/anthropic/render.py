"""From events to a message and the events of its stream, as Anthropic shapes them. Pure.

A message's content is a list of blocks that open and close one after another: thinking, words, calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from django.utils.crypto import salted_hmac

from apps.api import sse
from apps.api.anthropic.blocks import Body
from apps.api.errors import anthropic_body
from apps.api.prepare import Prepared
from apps.core.errors import ServiceError
from apps.core.types import ChoiceFinished, Event, FinishReason, RequestFinished, TextDelta, ToolCallDelta, Usage
from apps.scheduler.forecast import Progress

_TEXT_OF = {"thinking": "thinking", "text": "text", "tool_use": "partial_json"}
_DELTAS = {"thinking": "thinking_delta", "text": "text_delta", "tool_use": "input_json_delta"}
_REASONS = {FinishReason.LENGTH: "max_tokens", FinishReason.TOOL_CALLS: "tool_use"}


def usage_body(usage: Usage) -> Body:
    """What was read from the cache is not in `input_tokens`."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


class MessageRenderer:
    """`message` is the message as far as it has come."""

    end = b""

    def __init__(self, prepared: Prepared) -> None:
        self._block: Body | None = None
        self._pieces: list[str] = []
        self.message: Body = {
            "id": prepared.request.id,
            "type": "message",
            "role": "assistant",
            "model": prepared.card.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_body(Usage(prompt_tokens=prepared.request.num_prompt_tokens)),
        }

    def opening(self) -> Iterator[Body]:
        yield {"type": "message_start", "message": {**self.message, "content": []}}
        yield {"type": "ping"}

    def step(self, event: Event | Progress) -> Iterator[Body]:
        if isinstance(event, TextDelta):
            yield from self._said(event)
        elif isinstance(event, ChoiceFinished):
            yield from self._close()
            self.message["stop_reason"] = "stop_sequence" if event.stop else _REASONS.get(event.reason, "end_turn")
            self.message["stop_sequence"] = event.stop or None
        elif isinstance(event, RequestFinished):
            yield from self._ended(event.usage)

    def failed(self, error: ServiceError, http_id: str) -> Iterable[Body]:
        return [anthropic_body(error, http_id)]

    def whole(self, events: Sequence[Event]) -> Body:
        for event in events:
            for _ in self.step(event):
                continue
        return self.message

    def frame(self, body: Body) -> bytes:
        return sse.named(body)

    def _said(self, event: TextDelta) -> Iterator[Body]:
        if event.reasoning:
            yield from self._write({"type": "thinking", "thinking": "", "signature": ""}, event.reasoning)
        if event.text:
            yield from self._write({"type": "text", "text": ""}, event.text)
        for call in event.tool_calls:
            yield from self._called(call)

    def _write(self, block: Body, text: str) -> Iterator[Body]:
        if self._block is None or self._block["type"] != block["type"]:
            yield from self._close()
            yield self._begin(block)
        yield self._delta(text)

    def _called(self, call: ToolCallDelta) -> Iterator[Body]:
        if call.id:
            yield from self._close()
            yield self._begin({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        if call.arguments:
            yield self._delta(call.arguments)

    def _begin(self, block: Body) -> Body:
        self._block, self._pieces = block, []
        return self._event("start", content_block=dict(block))

    def _delta(self, text: str) -> Body:
        self._pieces.append(text)
        kind = self._block["type"] if self._block else "text"
        return self._event("delta", delta={"type": _DELTAS[kind], _TEXT_OF[kind]: text})

    def _close(self) -> Iterator[Body]:
        """Says of the open block, if there is one, that it is complete."""
        if (block := self._block) is None:
            return
        text = "".join(self._pieces)
        if block["type"] == "tool_use":
            block["input"] = _object(text)
        else:
            block[_TEXT_OF[block["type"]]] = text
        if block["type"] == "thinking":
            block["signature"] = salted_hmac("apps.api.anthropic", text).hexdigest()
            yield self._event("delta", delta={"type": "signature_delta", "signature": block["signature"]})
        yield self._event("stop")
        self.message["content"].append(block)
        self._block = None

    def _ended(self, usage: Usage) -> Iterator[Body]:
        self.message["usage"] = usage_body(usage)
        delta = {name: self.message[name] for name in ("stop_reason", "stop_sequence")}
        yield {"type": "message_delta", "delta": delta, "usage": self.message["usage"]}
        yield {"type": "message_stop"}

    def _event(self, stage: str, **fields: Any) -> Body:
        return {"type": f"content_block_{stage}", "index": len(self.message["content"]), **fields}


def _object(text: str) -> Body:
    """A call's input; of one that the token limit cut short, nothing."""
    try:
        found: Body = json.loads(text)
    except ValueError:
        return {}
    return found

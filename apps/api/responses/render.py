"""From events to a response and the events of its stream. Pure.

A response's output is a list of items that open and close one after another: reasoning, words, calls.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from apps.api import sse
from apps.api.prepare import Prepared
from apps.api.render import chat_logprobs
from apps.api.responses.items import Body, item_id
from apps.core.errors import Conflict, ServiceError
from apps.core.types import ChoiceFinished, Event, FinishReason, RequestFinished, TextDelta, TokenLogprob, ToolCallDelta, Usage
from apps.scheduler.forecast import Progress


def usage_body(usage: Usage) -> Body:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


@dataclass(slots=True)
class OpenItem:
    """The item that is being written. `part` is its only content, which calls have not."""

    item: Body
    part: Body | None = None
    kind: str = ""  # of its deltas
    pieces: list[str] = field(default_factory=list)
    logprobs: list[Body] = field(default_factory=list)


class ResponseRenderer:
    """`response` is the response as far as it has come."""

    end = sse.DONE

    def __init__(self, prepared: Prepared, echo: Body, num_input: int) -> None:
        self.prepared = prepared
        self._numbers = num_input  # items have numbers of their own within a response; the input's come first
        self._sequence = 0
        self._open: OpenItem | None = None
        self._tokens: list[TokenLogprob] = []  # of words that are not out yet
        self._incomplete = False
        self.response: Body = {
            "id": prepared.request.id,
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": prepared.card.name,
            "output": [],
            "usage": None,
            **echo,
        }

    def opening(self) -> Iterator[Body]:
        yield self._event("response.created", response=self._snapshot())
        yield self._event("response.in_progress", response=self._snapshot())

    def step(self, event: Event | Progress) -> Iterator[Body]:
        if isinstance(event, TextDelta):
            yield from self._said(event)
        elif isinstance(event, ChoiceFinished):
            yield from self._finished(event)
        elif isinstance(event, RequestFinished):
            yield self._ended(event.usage)

    def failed(self, error: ServiceError, http_id: str) -> Iterable[Body]:
        """What was said so far is kept, marked as incomplete."""
        cancelled = isinstance(error, Conflict)
        self._incomplete = True
        yield from self._close()
        self.response["status"] = "cancelled" if cancelled else "failed"
        self.response["error"] = {"code": error.code, "message": error.message}
        yield self._event("response.failed", response=self._snapshot())

    def whole(self, events: Sequence[Event]) -> Body:
        for event in events:
            for _ in self.step(event):
                continue
        return self.response

    def frame(self, body: Body) -> bytes:
        return sse.named(body)

    # --- Items ---

    def _said(self, event: TextDelta) -> Iterator[Body]:
        if event.reasoning:
            yield from self._write("reasoning", event.reasoning)
        if not (event.reasoning or event.tool_calls):
            self._tokens.extend(event.logprobs)
        if event.text:
            yield from self._write("message", event.text)
        for call in event.tool_calls:
            yield from self._called(call)

    def _write(self, kind: str, text: str) -> Iterator[Body]:
        if self._open is None or self._open.item["type"] != kind:
            yield from self._close()
            yield from self._begin_message() if kind == "message" else self._begin_reasoning()
        yield self._delta(text)

    def _called(self, call: ToolCallDelta) -> Iterator[Body]:
        if call.id:
            yield from self._close()
            item = {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": ""}
            yield from self._begin(OpenItem(item, kind="function_call_arguments"))
        if call.arguments:
            yield self._delta(call.arguments)

    def _begin_message(self) -> Iterator[Body]:
        part: Body = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield from self._begin(OpenItem({"type": "message", "role": "assistant", "content": []}, part, "output_text"))

    def _begin_reasoning(self) -> Iterator[Body]:
        part: Body = {"type": "reasoning_text", "text": ""}
        yield from self._begin(OpenItem({"type": "reasoning", "summary": [], "content": []}, part, "reasoning_text"))

    def _begin(self, opened: OpenItem) -> Iterator[Body]:
        name = item_id(opened.item["type"], self.response["id"], self._numbers)
        self._numbers += 1
        opened.item = {"id": name, "status": "in_progress", **opened.item}
        self._open = opened
        yield self._event("response.output_item.added", output_index=self._index, item=dict(opened.item))
        if opened.part is not None:
            yield self._part_event("added", opened.part)

    def _delta(self, text: str) -> Body:
        opened = self._opened
        opened.pieces.append(text)
        more: Body = {}
        if opened.kind == "output_text":
            more = {"logprobs": self._take_logprobs()}
            opened.logprobs += more["logprobs"]
        return self._text_event("delta", delta=text, **more)

    def _close(self) -> Iterator[Body]:
        """Says of the open item, if there is one, what it has become."""
        if (opened := self._open) is None:
            return
        text, item = "".join(opened.pieces), opened.item
        item["status"] = "incomplete" if self._incomplete else "completed"
        if opened.part is None:
            item["arguments"] = text
            yield self._text_event("done", name=item["name"], arguments=text)
        else:
            opened.part["text"] = text
            more = {"logprobs": opened.logprobs} if opened.kind == "output_text" else {}
            opened.part |= more
            item["content"] = [opened.part]
            yield self._text_event("done", text=text, **more)
            yield self._part_event("done", opened.part)
        yield self._event("response.output_item.done", output_index=self._index, item=item)
        self.response["output"].append(item)
        self._open = None

    def _finished(self, event: ChoiceFinished) -> Iterator[Body]:
        self._incomplete = event.reason is FinishReason.LENGTH
        if self._open is None and not self.response["output"]:
            yield from self._begin_message()  # nothing was said, in so many words
        yield from self._close()

    def _ended(self, usage: Usage) -> Body:
        self.response["usage"] = usage_body(usage)
        self.response["status"] = status = "incomplete" if self._incomplete else "completed"
        if self._incomplete:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = int(time.time())
        return self._event(f"response.{status}", response=self._snapshot())

    def _take_logprobs(self) -> list[Body]:
        if self.prepared.request.sampling.top_logprobs is None:
            return []
        entries: list[Body] = chat_logprobs(self.prepared.tokenizer, self._tokens)["content"]
        self._tokens = []
        return entries

    # --- Events ---

    @property
    def _index(self) -> int:
        return len(self.response["output"])

    @property
    def _opened(self) -> OpenItem:
        if self._open is None:
            raise RuntimeError("no item is open")
        return self._open

    def _snapshot(self) -> Body:
        return {**self.response, "output": list(self.response["output"])}

    def _event(self, kind: str, **fields: Any) -> Body:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event

    def _text_event(self, stage: str, **fields: Any) -> Body:
        opened = self._opened
        place: Body = {"item_id": opened.item["id"], "output_index": self._index}
        if opened.part is not None:
            place["content_index"] = 0
        return self._event(f"response.{opened.kind}.{stage}", **place, **fields)

    def _part_event(self, stage: str, part: Body) -> Body:
        place = {"item_id": self._opened.item["id"], "output_index": self._index, "content_index": 0}
        return self._event(f"response.content_part.{stage}", **place, part=dict(part))

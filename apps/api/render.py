"""From events to the bodies and chunks of OpenAI's completions. Pure."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from apps.api import sse
from apps.api.errors import error_body
from apps.api.prepare import Prepared
from apps.core.errors import Conflict, DeadlineExceeded, InvalidRequest, ServiceError, Unavailable
from apps.core.types import (
    ChoiceFinished,
    Event,
    MediaDelta,
    Outcome,
    RequestFinished,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from apps.fleet.tokenizers import ModelTokenizer
from apps.scheduler.forecast import Progress

Body = dict[str, Any]


def failure(finished: RequestFinished) -> ServiceError | None:
    """The error of a request that did not succeed."""
    if finished.outcome is Outcome.SUCCEEDED:
        return None
    code, message = finished.error_code, finished.error_message
    if finished.outcome is Outcome.EXPIRED:
        return DeadlineExceeded(message, code=code)
    if finished.outcome is Outcome.CANCELLED:
        return Conflict(message, code=code)
    if code == "invalid_image":
        return InvalidRequest("An image of this request is damaged: it cannot be decoded.", code=code, param="messages")
    if code in ("invalid_grammar", "grammar_failed"):
        return InvalidRequest("The answer's schema is too complex to be enforced.", code="invalid_schema")
    if code == "invalid_command":
        return InvalidRequest("The model cannot do what was asked.", code="invalid_value")
    if code in ("worker_lost", "model_load_failed"):
        return Unavailable(message, code=code)
    return ServiceError(message, code=code)


def usage_body(usage: Usage) -> Body:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "image_tokens": usage.image_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def units_body(usage: Usage) -> Body:
    """Of work that is no text."""
    return {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens, "total_tokens": usage.total_tokens}


def said(event: TextDelta) -> Body:
    """What a delta adds to a message, by OpenAI's names; reasoning by both names that clients look for."""
    delta: Body = {"reasoning_content": event.reasoning, "reasoning": event.reasoning} if event.reasoning else {}
    if event.tool_calls:
        delta["tool_calls"] = [_call_delta(call) for call in event.tool_calls]
    return delta if delta and not event.text else {**delta, "content": event.text}


def _call_delta(call: ToolCallDelta) -> Body:
    """Id, type and name come once; clients would join what is repeated."""
    if not call.id:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


@dataclass(slots=True)
class Said:
    """All that one choice said."""

    text: str = ""
    reasoning: str = ""
    calls: list[Body] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: str = "stop"

    def add(self, event: TextDelta) -> None:
        self.text += event.text
        self.reasoning += event.reasoning
        self.logprobs.extend(event.logprobs)
        for call in event.tool_calls:
            if call.id:
                self.calls.append({"id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}})
            self.calls[call.index]["function"]["arguments"] += call.arguments

    @property
    def message(self) -> Body:
        message: Body = {"role": "assistant", "content": self.text or (None if self.calls else ""), "refusal": None}
        if self.reasoning:
            message |= {"reasoning_content": self.reasoning, "reasoning": self.reasoning}
        return {**message, "tool_calls": self.calls} if self.calls else message


class Renderer:
    """What the two endpoints share: the envelope, and collecting a whole answer."""

    object_name = ""
    chunk_object_name = ""
    end = sse.DONE

    def __init__(self, prepared: Prepared, include_usage: bool) -> None:
        self._prepared = prepared
        self._include_usage = include_usage
        self._envelope: Body = {
            "id": prepared.request.id,
            "created": int(time.time()),
            "model": prepared.card.name,
            "service_tier": prepared.tier,
        }

    def opening(self) -> Iterable[Body]:
        """Chunks that go out before the first token."""
        return ()

    def step(self, event: Event | Progress) -> Iterable[Body]:
        """The chunk of an event. Where the request stands comes to those who asked for it, and so does usage at the end."""
        if isinstance(event, Progress):
            return [{**self._chunk([]), "queue": event.body}]
        if isinstance(event, RequestFinished):
            return [{**self._chunk([]), "usage": usage_body(event.usage)}] if self._include_usage else []
        return [] if isinstance(event, MediaDelta) else [self._chunk([self._chunk_choice(event)])]

    def failed(self, error: ServiceError, http_id: str) -> Iterable[Body]:
        return [error_body(error, http_id)]

    def frame(self, body: Body) -> bytes:
        return sse.frame(body)

    def whole(self, events: Iterable[Event]) -> Body:
        """The body of an answer that is not streamed, from all its events."""
        said = [Said() for _ in range(self._prepared.request.num_choices)]
        usage = Usage()
        for event in events:
            if isinstance(event, TextDelta):
                said[event.choice].add(event)
            elif isinstance(event, ChoiceFinished):
                said[event.choice].reason = event.reason.value
            elif isinstance(event, RequestFinished):
                usage = event.usage
        choices = [self._whole_choice(i, choice) for i, choice in enumerate(said)]
        return {**self._envelope, "object": self.object_name, "choices": choices, "usage": usage_body(usage)}

    def _chunk(self, choices: list[Body]) -> Body:
        chunk: Body = {**self._envelope, "object": self.chunk_object_name, "choices": choices}
        return {**chunk, "usage": None} if self._include_usage else chunk

    def _chunk_choice(self, event: TextDelta | ChoiceFinished) -> Body:
        raise NotImplementedError

    def _whole_choice(self, index: int, said: Said) -> Body:
        raise NotImplementedError

    @property
    def _wants_logprobs(self) -> bool:
        return self._prepared.request.sampling.top_logprobs is not None


class ChatRenderer(Renderer):
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def opening(self) -> Iterable[Body]:
        for index in range(self._prepared.request.num_choices):
            delta = {"role": "assistant", "content": ""}
            yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _chunk_choice(self, event: TextDelta | ChoiceFinished) -> Body:
        if isinstance(event, ChoiceFinished):
            return {"index": event.choice, "delta": {}, "logprobs": None, "finish_reason": event.reason.value}
        logprobs = chat_logprobs(self._prepared.tokenizer, event.logprobs) if self._wants_logprobs else None
        return {"index": event.choice, "delta": said(event), "logprobs": logprobs, "finish_reason": None}

    def _whole_choice(self, index: int, said: Said) -> Body:
        shown = chat_logprobs(self._prepared.tokenizer, said.logprobs) if self._wants_logprobs else None
        return {"index": index, "message": said.message, "logprobs": shown, "finish_reason": said.reason}


class CompletionRenderer(Renderer):
    object_name = chunk_object_name = "text_completion"

    def _chunk_choice(self, event: TextDelta | ChoiceFinished) -> Body:
        if isinstance(event, ChoiceFinished):
            return {"index": event.choice, "text": "", "logprobs": None, "finish_reason": event.reason.value}
        logprobs = completion_logprobs(self._prepared.tokenizer, event.logprobs) if self._wants_logprobs else None
        return {"index": event.choice, "text": event.text, "logprobs": logprobs, "finish_reason": None}

    def _whole_choice(self, index: int, said: Said) -> Body:
        shown = completion_logprobs(self._prepared.tokenizer, said.logprobs) if self._wants_logprobs else None
        return {"index": index, "text": said.text, "logprobs": shown, "finish_reason": said.reason}


def chat_logprobs(tokenizer: ModelTokenizer, entries: Iterable[TokenLogprob]) -> Body:
    """OpenAI's chat shape: each token with its bytes and its likeliest alternatives."""

    def one(token_id: int, logprob: float) -> Body:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    content = [
        {**one(entry.token_id, entry.logprob), "top_logprobs": [one(*alternative) for alternative in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: ModelTokenizer, entries: Iterable[TokenLogprob]) -> Body:
    """The shape of the older endpoint: parallel lists."""
    entries = list(entries)
    tokens = [tokenizer.token_text(entry.token_id) for entry in entries]
    offsets = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    return {
        "tokens": tokens,
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{tokenizer.token_text(i): logprob for i, logprob in entry.top} for entry in entries],
        "text_offset": offsets,
    }

"""From events to OpenAI's bodies and chunks. Pure."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from apps.api.prepare import Prepared
from apps.core.errors import Conflict, DeadlineExceeded, ServiceError, Unavailable
from apps.core.types import ChoiceFinished, Event, Outcome, RequestFinished, TextDelta, TokenLogprob, Usage
from apps.fleet.tokenizers import ModelTokenizer

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
    if code == "worker_lost":
        return Unavailable(message, code=code)
    return ServiceError(message, code=code)


def usage_body(usage: Usage) -> Body:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class Renderer:
    """What the two endpoints share: the envelope, and collecting a whole answer."""

    object_name = ""
    chunk_object_name = ""

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

    def chunk(self, event: TextDelta | ChoiceFinished) -> Body:
        return self._chunk([self._chunk_choice(event)])

    def usage_chunk(self, usage: Usage) -> Body | None:
        """The chunk before the end, only for those who asked for it."""
        return {**self._chunk([]), "usage": usage_body(usage)} if self._include_usage else None

    def whole(self, events: Iterable[Event]) -> Body:
        """The body of an answer that is not streamed, from all its events."""
        texts: defaultdict[int, list[str]] = defaultdict(list)
        logprobs: defaultdict[int, list[TokenLogprob]] = defaultdict(list)
        reasons: dict[int, str] = {}
        usage = Usage()
        for event in events:
            if isinstance(event, TextDelta):
                texts[event.choice].append(event.text)
                logprobs[event.choice].extend(event.logprobs)
            elif isinstance(event, ChoiceFinished):
                reasons[event.choice] = event.reason.value
            else:
                usage = event.usage
        choices = [
            self._whole_choice(i, "".join(texts[i]), logprobs[i], reasons.get(i, "stop"))
            for i in range(self._prepared.request.num_choices)
        ]
        return {**self._envelope, "object": self.object_name, "choices": choices, "usage": usage_body(usage)}

    def _chunk(self, choices: list[Body]) -> Body:
        chunk: Body = {**self._envelope, "object": self.chunk_object_name, "choices": choices}
        return {**chunk, "usage": None} if self._include_usage else chunk

    def _chunk_choice(self, event: TextDelta | ChoiceFinished) -> Body:
        raise NotImplementedError

    def _whole_choice(self, index: int, text: str, logprobs: list[TokenLogprob], reason: str) -> Body:
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
        delta = {"content": event.text}
        return {"index": event.choice, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _whole_choice(self, index: int, text: str, logprobs: list[TokenLogprob], reason: str) -> Body:
        shown = chat_logprobs(self._prepared.tokenizer, logprobs) if self._wants_logprobs else None
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": shown, "finish_reason": reason}


class CompletionRenderer(Renderer):
    object_name = chunk_object_name = "text_completion"

    def _chunk_choice(self, event: TextDelta | ChoiceFinished) -> Body:
        if isinstance(event, ChoiceFinished):
            return {"index": event.choice, "text": "", "logprobs": None, "finish_reason": event.reason.value}
        logprobs = completion_logprobs(self._prepared.tokenizer, event.logprobs) if self._wants_logprobs else None
        return {"index": event.choice, "text": event.text, "logprobs": logprobs, "finish_reason": None}

    def _whole_choice(self, index: int, text: str, logprobs: list[TokenLogprob], reason: str) -> Body:
        shown = completion_logprobs(self._prepared.tokenizer, logprobs) if self._wants_logprobs else None
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": reason}


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

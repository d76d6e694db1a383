"""One leased request as its dispatcher sees it: engine deltas in, events for the client out. Pure but for the decoders."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from apps.core.types import ChoiceFinished, Event, FinishReason, SequenceDelta, TextDelta
from apps.scheduler.codec import encode_event
from apps.scheduler.output import OutputParser, Parts
from apps.scheduler.queue import Emission, Lease
from apps.scheduler.text import ChoiceText, Decoder


class RunningRequest:
    """Applies deltas in order. `open` holds the choices that have not ended."""

    def __init__(self, lease: Lease, new_decoder: Callable[[], Decoder], log: Iterable[Event] = ()) -> None:
        """`log` is what earlier attempts published: their tokens are kept, and their text is not shown again."""
        self.lease = lease
        request = lease.request
        self.texts = [ChoiceText(new_decoder(), request.sampling.stop) for _ in range(request.num_choices)]
        call_id = f"call_{re.split('[-_]', request.id)[-1]}"
        self._parsers = [OutputParser(request.form, f"{call_id}{i}") for i in range(request.num_choices)]
        self.generated: list[list[int]] = [[] for _ in self.texts]
        self.open = set(range(request.num_choices))
        for event in log:
            self._replay(event)

    @property
    def id(self) -> str:
        return self.lease.request.id

    def _replay(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            self.generated[event.choice].extend(event.token_ids)
            self._parsers[event.choice].push(self.texts[event.choice].push(event.token_ids).text)
        elif isinstance(event, ChoiceFinished):
            self.open.discard(event.choice)

    def apply(self, deltas: Iterable[SequenceDelta]) -> Emission:
        """What to publish for one step's deltas. A failed delta publishes nothing: the caller decides what follows."""
        rows: list[tuple[int, int, int, str]] = []
        cached = reasoning = 0
        for delta in deltas:
            if delta.choice not in self.open or delta.finish_reason in _ABNORMAL:
                continue
            cached += delta.cached_tokens
            parser = self._parsers[delta.choice]
            thought_before = parser.is_thinking
            added = tuple(self._apply(delta))
            if thought_before or parser.is_thinking:
                reasoning += sum(count for _, _, count, _ in added)
            rows.extend(added)
        return Emission(self.id, self.lease.attempt, cached, tuple(rows), reasoning)

    def _apply(self, delta: SequenceDelta) -> Iterable[tuple[int, int, int, str]]:
        text = self.texts[delta.choice]
        shown = text.push(delta.token_ids)
        visible, stop = shown.text, shown.stop
        reason = FinishReason.STOP if stop else delta.finish_reason
        if reason is not None and not stop:
            last = text.flush()
            visible, stop = visible + last.text, last.stop
            reason = FinishReason.STOP if stop else reason
        parts = self._parsers[delta.choice].push(visible, at_end=reason is not None)
        ids = delta.token_ids[: shown.tokens]
        if ids or parts != Parts():
            logprobs = delta.logprobs[: shown.tokens]
            event = TextDelta(
                delta.choice, delta.first_index, ids, parts.content, logprobs, delta.cached_tokens, parts.reasoning, parts.calls
            )
            yield delta.choice, delta.first_index, len(ids), encode_event(event)
        if reason is not None:
            self.open.discard(delta.choice)
            if reason is FinishReason.STOP and self._parsers[delta.choice].num_calls:
                reason = FinishReason.TOOL_CALLS
            yield delta.choice, delta.first_index + len(ids), 0, encode_event(ChoiceFinished(delta.choice, reason, stop))


_ABNORMAL = frozenset({FinishReason.CANCELLED, FinishReason.EXPIRED, FinishReason.FAILED})

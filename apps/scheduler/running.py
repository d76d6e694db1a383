"""One leased request as its dispatcher sees it: engine deltas in, events for the client out. Pure but for the decoders."""

from __future__ import annotations

import base64
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from apps.core.types import ChoiceFinished, Event, FinishReason, MediaDelta, SequenceDelta, TextDelta
from apps.scheduler.codec import encode_event
from apps.scheduler.output import OutputParser, Parts
from apps.scheduler.queue import Emission, Lease
from apps.scheduler.text import ChoiceText, Decoder

Row = tuple[int, int, int, str]  # of an Emission: choice, first index, count, encoded event


class RunningRequest(ABC):
    """Applies deltas in order. `open` holds the choices that have not ended."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.open = set(range(lease.request.num_choices))

    @property
    def id(self) -> str:
        return self.lease.request.id

    def replay(self, log: Iterable[Event]) -> None:
        """`log` is what earlier attempts published: it is kept, and not shown again."""
        for event in log:
            if isinstance(event, ChoiceFinished):
                self.open.discard(event.choice)
            else:
                self._replay(event)

    @abstractmethod
    def _replay(self, event: Event) -> None: ...

    @abstractmethod
    def tokens(self, choice: int) -> list[int]:
        """What the choice has generated so far."""

    @abstractmethod
    def units(self, choice: int) -> int:
        """What it has done so far, of work that is no text."""

    def apply(self, deltas: Iterable[SequenceDelta]) -> Emission:
        """What to publish for one step's deltas. A failed delta publishes nothing: the caller decides what follows."""
        rows: list[Row] = []
        cached = reasoning = 0
        for delta in deltas:
            if delta.choice in self.open and delta.finish_reason not in _ABNORMAL:
                cached += delta.cached_tokens
                added, thought = self._take(delta)
                reasoning += thought
                rows.extend(added)
        return Emission(self.id, self.lease.attempt, cached, tuple(rows), reasoning)

    @abstractmethod
    def _take(self, delta: SequenceDelta) -> tuple[list[Row], int]:
        """Rows to publish, and how many tokens of them are reasoning."""

    def _finished(self, choice: int, index: int, reason: FinishReason, stop: str = "") -> Row:
        self.open.discard(choice)
        return choice, index, 0, encode_event(ChoiceFinished(choice, reason, stop))


class RunningMedia(RunningRequest):
    """Work that is no text passes through as it comes."""

    def __init__(self, lease: Lease) -> None:
        super().__init__(lease)
        self._units = [0] * lease.request.num_choices

    def _replay(self, event: Event) -> None:
        if isinstance(event, MediaDelta):
            self._units[event.choice] += event.units

    def tokens(self, choice: int) -> list[int]:
        return []

    def units(self, choice: int) -> int:
        return self._units[choice]

    def _take(self, delta: SequenceDelta) -> tuple[list[Row], int]:
        self._units[delta.choice] += delta.units
        media = base64.b64encode(delta.media).decode()
        total = self.lease.request.sampling.max_tokens
        event = MediaDelta(delta.choice, delta.first_index, delta.units, media, delta.mime, delta.preview, total)
        rows = [(delta.choice, delta.first_index, delta.units, encode_event(event))]
        if delta.finish_reason is not None:
            rows.append(self._finished(delta.choice, delta.first_index + delta.units, delta.finish_reason))
        return rows, 0


class RunningText(RunningRequest):
    """Ids become text, text becomes what a client is shown of it. A transcript is text too."""

    def __init__(self, lease: Lease, new_decoder: Callable[[], Decoder]) -> None:
        super().__init__(lease)
        request = lease.request
        self.texts = [ChoiceText(new_decoder(), request.sampling.stop) for _ in range(request.num_choices)]
        call_id = f"call_{re.split('[-_]', request.id)[-1]}"
        self._parsers = [OutputParser(request.form, f"{call_id}{i}") for i in range(request.num_choices)]
        self._tokens: list[list[int]] = [[] for _ in self.texts]

    def _replay(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            self._tokens[event.choice].extend(event.token_ids)
            self._parsers[event.choice].push(self.texts[event.choice].push(event.token_ids).text)

    def tokens(self, choice: int) -> list[int]:
        return self._tokens[choice]

    def units(self, choice: int) -> int:
        return 0 if self.lease.request.work is None else len(self._tokens[choice])

    def _take(self, delta: SequenceDelta) -> tuple[list[Row], int]:
        parser = self._parsers[delta.choice]
        thought_before = parser.is_thinking
        rows = list(self._rows(delta))
        return rows, sum(count for _, _, count, _ in rows) if thought_before or parser.is_thinking else 0

    def _rows(self, delta: SequenceDelta) -> Iterable[Row]:
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
            if reason is FinishReason.STOP and self._parsers[delta.choice].num_calls:
                reason = FinishReason.TOOL_CALLS
            yield self._finished(delta.choice, delta.first_index + len(ids), reason, stop)


_ABNORMAL = frozenset({FinishReason.CANCELLED, FinishReason.EXPIRED, FinishReason.FAILED})

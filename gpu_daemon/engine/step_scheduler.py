"""What to run in the next step. Pure.

One law: every sequence has `computed` tokens and must catch up with `len(tokens)`, under one token budget a step.
Decoding (one token behind) and chunked prefill (many behind) are the same thing to it.
"""

from __future__ import annotations

from collections import deque

from gpu_daemon.engine.kv_cache import KvCache
from gpu_daemon.engine.sequence import Chunk, Sequence


class StepScheduler:
    """Sequences in order of arrival: running ones have a slot, waiting ones do not yet."""

    def __init__(self, cache: KvCache, step_tokens: int) -> None:
        self.cache = cache
        self.step_tokens = step_tokens
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()

    def plan(self) -> list[Chunk]:
        """Chunks of at most `step_tokens` tokens in all: who is one token behind goes first, so no prefill stalls a stream."""
        self._admit()
        budget = self.step_tokens
        chunks = []
        for sequence in sorted(self.running, key=lambda s: s.remaining > 1):
            count = min(sequence.remaining, budget)
            if count:
                chunks.append(Chunk(sequence, sequence.computed, count))
                budget -= count
        return chunks

    def _admit(self) -> None:
        while self.waiting and self.cache.allocate(self.waiting[0]):
            self.running.append(self.waiting.popleft())

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence, wherever it is."""
        if sequence.slot >= 0:
            self.running.remove(sequence)
            self.cache.free(sequence)
        else:
            self.waiting.remove(sequence)

    def sequences(self) -> list[Sequence]:
        return [*self.running, *self.waiting]

"""What to run in the next step. Pure.

One law: every sequence has `computed` tokens and must catch up with `len(tokens)`, under one token budget a step.
Decoding (one token behind) and chunked prefill (many behind) are the same thing to it, and so is coming back after a
preemption: a preempted sequence keeps its tokens, loses its blocks, and is as far behind as the cache has forgotten.
"""

from __future__ import annotations

from collections import deque

from gpu_daemon.engine.kv_cache import KvCache
from gpu_daemon.engine.sequence import Chunk, Sequence

LOOKS = 1  # pictures looked at in a step: each takes as long as many tokens, and the streams wait for it


class StepScheduler:
    """Sequences in order of arrival: running ones have blocks, waiting ones do not yet."""

    def __init__(self, cache: KvCache, step_tokens: int, max_sequences: int) -> None:
        self.cache = cache
        self.step_tokens = step_tokens
        self.max_sequences = max_sequences
        self.preemptions = 0
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()

    def plan(self) -> list[Chunk]:
        """Chunks of at most `step_tokens` tokens in all. Who is one token behind goes first, so no prefill stalls a stream."""
        self._admit()
        behind = sorted(self.running, key=lambda s: s.remaining > 1)
        budget, looks = self.step_tokens, LOOKS
        chunks: list[Chunk] = []
        for place, sequence in enumerate(behind):
            count = min(sequence.remaining, self._share(budget, place + 1 < len(behind)))
            count = _up_to_unseen(sequence, count, looks)
            if count and sequence.blocks and self._make_room(sequence, count):
                chunks.append(Chunk(sequence, sequence.computed, count))
                budget -= count
                looks -= sum(picture.embedding is None for picture in chunks[-1].pictures)
        return [chunk for chunk in chunks if chunk.sequence.blocks]

    def advance(self, chunk: Chunk) -> None:
        """A chunk has run: its tokens are in the cache."""
        chunk.sequence.computed += chunk.count
        self.cache.learn(chunk.sequence)
        for picture in chunk.pictures:
            if picture.end <= chunk.end:
                picture.embedding = None

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence, wherever it is."""
        if sequence.blocks:
            self.running.remove(sequence)
            self.cache.free(sequence)
        else:
            self.waiting.remove(sequence)

    def sequences(self) -> list[Sequence]:
        return [*self.running, *self.waiting]

    def _share(self, budget: int, others_follow: bool) -> int:
        """While others wait behind it, a prompt gets half of what is left: a short one never waits for all of a long one."""
        return max(1, budget // 2) if others_follow and budget > 1 else budget

    def _admit(self) -> None:
        """A block is left for each running sequence, so that who comes in does not push them out at once."""
        while self.waiting and len(self.running) < self.max_sequences:
            if not self.cache.allocate(self.waiting[0], spare=len(self.running)):
                return
            self.running.append(self.waiting.popleft())

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` tokens more; the last to arrive give up theirs. False when that was the sequence itself."""
        while not self.cache.extend(sequence, sequence.computed + count):
            self._preempt(self.running[-1])
            if not sequence.blocks:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self.cache.free(sequence)
        self.waiting.appendleft(sequence)


def _up_to_unseen(sequence: Sequence, count: int, looks: int) -> int:
    """Of the next `count` tokens, those before the first picture that is one too many to look at."""
    end = sequence.computed + count
    unseen = [p for p in sequence.pictures if p.embedding is None and p.overlaps(sequence.computed, end)]
    return count if len(unseen) <= looks else max(0, unseen[looks].start - sequence.computed)

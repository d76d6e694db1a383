"""Who owns which part of the KV cache: slots of contiguous rows, and what each still holds. No tensors.

A slot that was given back keeps its contents until it is taken again. A new sequence takes the free slot that shares the
longest beginning with it, under the same salt, and computes only the rest: automatic prefix reuse between turns.
"""

from __future__ import annotations

from collections import OrderedDict

from gpu_daemon.engine.sequence import Sequence


class KvCache:
    """`slots` sequences at once, of together at most `max_tokens` tokens."""

    def __init__(self, slots: int, max_tokens: int) -> None:
        self.slots = slots
        self.max_tokens = max_tokens
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(slots))  # least recently used first
        self._held: dict[int, Sequence] = {}
        self._reserved: dict[int, int] = {}
        self._contents: dict[int, tuple[bytes, list[int]]] = {}

    @property
    def reserved_tokens(self) -> int:
        return sum(self._reserved.values())

    @property
    def free_tokens(self) -> int:
        return self.max_tokens - self.reserved_tokens

    def allocate(self, sequence: Sequence) -> bool:
        """Gives the sequence a slot, and what that slot already knows of it. False when there is no room now."""
        need = sequence.prompt_length + sequence.sampling.max_tokens
        if not self._free or (self._held and need > self.free_tokens):
            return False
        slot, shared = self._best_slot(sequence)
        del self._free[slot]
        self._held[slot] = sequence
        self._reserved[slot] = need
        self._contents.pop(slot, None)
        sequence.slot = slot
        sequence.computed = shared
        sequence.cached = min(shared, sequence.prompt_length)
        return True

    def _best_slot(self, sequence: Sequence) -> tuple[int, int]:
        """The free slot with the longest usable beginning; without one, an empty slot, then the least recently used."""
        best, longest = -1, 0
        for slot in self._free:
            salt, tokens = self._contents.get(slot, (b"", []))
            shared = _shared_prefix(tokens, sequence.tokens) if salt == sequence.salt else 0
            if shared > longest:
                best, longest = slot, shared
        if best >= 0:
            # The last token is computed again: its logits are what the sequence is waiting for.
            return best, min(longest, len(sequence.tokens) - 1)
        empty = (slot for slot in self._free if slot not in self._contents)
        return min(empty, default=next(iter(self._free))), 0

    def free(self, sequence: Sequence) -> None:
        """Takes the slot back; its computed tokens stay for whoever begins alike."""
        slot = sequence.slot
        del self._held[slot], self._reserved[slot]
        self._contents[slot] = (sequence.salt, sequence.tokens[: sequence.computed])
        self._free[slot] = None
        sequence.slot = -1

    def forget(self) -> None:
        """Drops every cached beginning, as after a failure that may have damaged the tensors."""
        self._contents.clear()

    def check_integrity(self) -> None:
        """Raises AssertionError unless every slot is free or held, once, and no more is reserved than there is."""
        assert set(self._free) | set(self._held) == set(range(self.slots))
        assert not set(self._free) & set(self._held)
        assert set(self._reserved) == set(self._held)
        assert set(self._contents) <= set(self._free)
        assert len(self._held) <= 1 or self.reserved_tokens <= self.max_tokens
        assert all(sequence.slot == slot for slot, sequence in self._held.items())


def _shared_prefix(a: list[int], b: list[int]) -> int:
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    return next(i for i in range(limit) if a[i] != b[i])

"""Who owns which block of the paged KV cache, and what the blocks hold. Ids only, no tensors.

A full block is known by the hash of everything up to its end, salted by its owner: a chain, so that equal hashes mean equal
beginnings. A block nobody uses keeps its contents until it is needed; a new sequence takes over the longest run of known
blocks that begins it, and computes only the rest. What leaves the device goes to the store in host memory, and comes back
from there. Named sessions and automatic prefix reuse are this one mechanism.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import Protocol

from gpu_daemon.engine.sequence import Sequence


class Store(Protocol):
    """The tier below the device's blocks."""

    def save(self, key: bytes, depth: int, block: int) -> None:
        """Keeps a copy of a block whose contents are about to go. `depth` counts the blocks before it."""

    def restore(self, key: bytes, block: int) -> bool:
        """Fills a block with what is kept under `key`; False when nothing is, or computing it is faster."""


class NoStore:
    """Nothing below the device."""

    def save(self, key: bytes, depth: int, block: int) -> None:
        """Lets it go."""

    def restore(self, key: bytes, block: int) -> bool:
        """Has nothing."""
        return False


class KvCache:
    """`blocks` blocks of `block_tokens` tokens. Every block is free, in use by sequences, or cached: unused but known."""

    def __init__(self, blocks: int, block_tokens: int, store: Store | None = None) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self._store: Store = store or NoStore()
        self._free: list[int] = list(reversed(range(blocks)))
        self._users = [0] * blocks
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._known: dict[bytes, int] = {}
        self._keys: dict[int, tuple[bytes, int]] = {}  # block: its hash, and how many blocks come before it

    @property
    def max_tokens(self) -> int:
        return self.blocks * self.block_tokens

    @property
    def free_tokens(self) -> int:
        """Tokens there is room for, counting what is only cached."""
        return (len(self._free) + len(self._cached)) * self.block_tokens

    # --- A sequence's life ---

    def allocate(self, sequence: Sequence, spare: int = 0) -> bool:
        """Blocks for what the sequence has so far, beginning with those known. False when that would not leave `spare`."""
        need = self._blocks_of(len(sequence.tokens))
        found = list(self._known_run(sequence))
        available = len(self._free) + len(self._cached) - sum(block in self._cached for block in found)
        if need - len(found) + spare > available:
            return False
        for block in found:
            self._use(block)
        sequence.blocks = found
        self._restore_run(sequence, need)
        sequence.computed = len(sequence.blocks) * self.block_tokens
        sequence.learned = len(sequence.blocks)
        sequence.cached = min(sequence.computed, sequence.prompt_length)
        sequence.blocks += [self._take() for _ in range(need - len(sequence.blocks))]
        return True

    def extend(self, sequence: Sequence, tokens: int) -> bool:
        """Room for `tokens` tokens in all. False, and nothing taken, when there is none."""
        missing = self._blocks_of(tokens) - len(sequence.blocks)
        if missing > len(self._free) + len(self._cached):
            return False
        sequence.blocks += [self._take() for _ in range(missing)]
        return True

    def learn(self, sequence: Sequence) -> None:
        """Makes the full blocks the sequence has computed known to others."""
        full = sequence.computed // self.block_tokens
        for depth in range(sequence.learned, full):
            block, key = sequence.blocks[depth], self._key(sequence, depth)
            if key not in self._known:
                self._known[key] = block
                self._keys[block] = key, depth
        sequence.learned = max(sequence.learned, full)

    def free(self, sequence: Sequence) -> None:
        """Gives the blocks back, the last first, so that ends are forgotten before beginnings."""
        for block in reversed(sequence.blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._keys:
                self._cached[block] = None
            else:
                self._free.append(block)
        sequence.blocks, sequence.computed, sequence.learned = [], 0, 0

    def forget(self) -> None:
        """Drops all that is known, as after a failure that may have damaged the tensors."""
        self._free += self._cached
        self._cached.clear()
        self._known.clear()
        self._keys.clear()

    def save_all(self) -> None:
        """Copies every known block into the store, as before the device goes."""
        for block, (key, depth) in self._keys.items():
            self._store.save(key, depth, block)

    # --- Blocks ---

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def _reusable(self, sequence: Sequence) -> int:
        """Blocks that may come from elsewhere: never the last token, whose logits the sequence is waiting for."""
        return (len(sequence.tokens) - 1) // self.block_tokens

    def _known_run(self, sequence: Sequence) -> Iterator[int]:
        for depth in range(self._reusable(sequence)):
            block = self._known.get(self._key(sequence, depth))
            if block is None:
                return
            yield block

    def _restore_run(self, sequence: Sequence, need: int) -> None:
        """Goes on from the store where the device's own blocks end."""
        for depth in range(len(sequence.blocks), min(self._reusable(sequence), need)):
            block = self._take()
            key = self._key(sequence, depth)
            if key in self._known or not self._store.restore(key, block):
                self._users[block] = 0
                self._free.append(block)
                return
            sequence.blocks.append(block)
            self._known[key] = block
            self._keys[block] = key, depth

    def _key(self, sequence: Sequence, depth: int) -> bytes:
        """The hash of a sequence's tokens and pictures up to the end of its block number `depth`."""
        while len(sequence.keys) <= depth:
            begin = len(sequence.keys) * self.block_tokens
            parent = sequence.keys[-1] if sequence.keys else sequence.salt
            tokens = array("I", islice(sequence.tokens, begin, begin + self.block_tokens))
            digest = hashlib.blake2b(tokens.tobytes(), digest_size=16, key=parent[:64])
            for picture in sequence.pictures:  # whose tokens are all alike
                if picture.overlaps(begin, begin + self.block_tokens):
                    digest.update(picture.key)
            sequence.keys.append(digest.digest())
        return sequence.keys[depth]

    def _use(self, block: int) -> None:
        self._cached.pop(block, None)
        self._users[block] += 1

    def _take(self) -> int:
        """A block for new contents: a free one, or the one cached longest, whose contents go to the store."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            key, depth = self._keys.pop(block)
            del self._known[key]
            self._store.save(key, depth, block)
        self._users[block] = 1
        return block

    def check_integrity(self) -> None:
        """Raises AssertionError unless free + used + cached = all, and what is known is where it is said to be."""
        free, cached = set(self._free), set(self._cached)
        used = {block for block, users in enumerate(self._users) if users}
        assert len(free) == len(self._free)
        assert len(free) + len(used) + len(cached) == len(free | used | cached) == self.blocks
        assert {key: block for block, (key, _) in self._keys.items()} == self._known
        assert cached <= set(self._keys) <= used | cached

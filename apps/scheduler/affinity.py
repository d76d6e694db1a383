"""By what a prompt is known before it is computed: hashes of its beginnings. Pure.

A worker that lately took a prompt with the same beginning has its keys and values. The hash is a chain over the token ids, as
the daemons' own, salted by the model and the organization, and so the same in every gateway. Which workers took which
beginning is kept in Redis for everybody: what one dispatcher learns all know, and a worker that comes or goes moves nobody
else's conversations, as hashing them onto workers would.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

BLOCK_TOKENS = 16
# After how many blocks a beginning has a hash: dense where system prompts end, and enough to tell conversations apart.
DEPTHS = (1, 2, 4, *range(8, 136, 8))


def beginnings(model: str, org_id: str, prompt: Sequence[int]) -> tuple[str, ...]:
    """A hash for each of DEPTHS that the prompt is long enough for, the shortest beginning first."""
    salt = hashlib.blake2b(f"{model}|{org_id}".encode(), digest_size=32).digest()
    chain, hashes, done = hashlib.blake2b(digest_size=8, key=salt), [], 0
    for depth in DEPTHS:
        end = depth * BLOCK_TOKENS
        if end > len(prompt):
            break
        chain.update(array("I", prompt[done:end]).tobytes())
        hashes.append(chain.copy().hexdigest())
        done = end
    return tuple(hashes)


def tokens_of(number: int) -> int:
    """Tokens of a prompt's `number`-th beginning; 0 for none."""
    return DEPTHS[number - 1] * BLOCK_TOKENS if number else 0

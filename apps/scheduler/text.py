"""From token ids to the text a client may see: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Decoder(Protocol):
    """A streaming decoder (apps/fleet/tokenizers.py)."""

    def push(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Shown:
    """What a push made visible. `tokens` is how many of the ids count: those after a stop string do not."""

    tokens: int
    text: str
    stopped: bool = False


class ChoiceText:
    """One choice's text. Text that may turn out to begin a stop string is held until it is known not to."""

    def __init__(self, decoder: Decoder, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._stops = tuple(stops)
        self._held = ""

    def push(self, ids: Sequence[int]) -> Shown:
        if not self._stops:
            return Shown(len(ids), self._decoder.push(ids))
        visible = ""
        for taken, token_id in enumerate(ids, 1):
            self._held += self._decoder.push([token_id])
            stop = self._stop_index()
            if stop is not None:
                return Shown(taken, visible + self._held[:stop], stopped=True)
            keep = self._undecided()
            visible += self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
        return Shown(len(ids), visible)

    def flush(self) -> Shown:
        """The end of the tokens: what was held shows, unless its last character completes a stop string."""
        self._held += self._decoder.flush()
        stop = self._stop_index()
        return Shown(0, self._held if stop is None else self._held[:stop], stop is not None)

    def _stop_index(self) -> int | None:
        """Where the earliest stop string begins in the held text."""
        found = [index for stop in self._stops if (index := self._held.find(stop)) >= 0]
        return min(found, default=None)

    def _undecided(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = min(len(self._held), max(map(len, self._stops)) - 1)
        ends = (n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stops))
        return next(ends, 0)

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
    stop: str = ""  # the stop string that ended it


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
            index, stop = self._first_stop()
            if stop:
                return Shown(taken, visible + self._held[:index], stop)
            keep = self._undecided()
            visible += self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
        return Shown(len(ids), visible)

    def flush(self) -> Shown:
        """The end of the tokens: what was held shows, unless its last character completes a stop string."""
        self._held += self._decoder.flush()
        index, stop = self._first_stop()
        return Shown(0, self._held[:index], stop)

    def _first_stop(self) -> tuple[int, str]:
        """The earliest stop string in the held text and where it begins; the text's end and nothing where there is none."""
        found = [(index, stop) for stop in self._stops if (index := self._held.find(stop)) >= 0]
        return min(found, default=(len(self._held), ""))

    def _undecided(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = min(len(self._held), max(map(len, self._stops)) - 1)
        ends = (n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stops))
        return next(ends, 0)

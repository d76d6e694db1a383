"""When what was said: the timed pieces of a transcript, and the files that show them. Pure but for the vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

_STAMP = re.compile(r"<\|(\d+\.\d\d)\|>")


class Vocabulary(Protocol):
    eos_ids: frozenset[int]

    def token_bytes(self, token_id: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """Seconds from the beginning of the recording."""

    id: int
    start: float
    end: float
    text: str
    tokens: tuple[int, ...]

    @property
    def body(self) -> dict[str, Any]:
        return {
            "id": self.id, "start": round(self.start, 2), "end": round(self.end, 2), "text": self.text,
            "tokens": list(self.tokens), "seek": 0, "temperature": 0.0,
        }  # fmt: skip


@dataclass(slots=True)
class Segments:
    """Reads a transcript's tokens: timestamps enclose each piece, and count from where their window began. A window but the
    last closes with the time at which the next one begins and an end of text."""

    vocabulary: Vocabulary
    _found: list[Segment] = field(default_factory=list)
    _window: float = 0.0
    _start: float | None = None
    _latest: float = 0.0
    _ids: list[int] = field(default_factory=list)

    def of(self, ids: Iterable[int]) -> list[Segment]:
        for token_id in ids:
            if token_id in self.vocabulary.eos_ids:
                self._close(self._latest)
                self._window, self._latest, self._start = self._window + self._latest, 0.0, None
            elif stamp := _STAMP.fullmatch(self.vocabulary.token_bytes(token_id).decode(errors="replace")):
                self._latest = float(stamp[1])
                self._close(self._latest)
                self._start = self._latest
            else:
                self._ids.append(token_id)
        self._close(max(self._latest, self._start or 0.0))
        return self._found

    def _close(self, end: float) -> None:
        """Ends the piece that is open, if anything was said in it."""
        if self._ids:
            text = b"".join(map(self.vocabulary.token_bytes, self._ids)).decode(errors="replace")
            start = self._window + (self._start or 0.0)
            self._found.append(Segment(len(self._found), start, max(start, self._window + end), text, tuple(self._ids)))
        self._ids = []


def srt(segments: Sequence[Segment]) -> str:
    return "".join(
        f"{segment.id + 1}\n{_clock(segment.start, ',')} --> {_clock(segment.end, ',')}\n{segment.text.strip()}\n\n"
        for segment in segments
    )


def vtt(segments: Sequence[Segment]) -> str:
    cues = (f"{_clock(segment.start, '.')} --> {_clock(segment.end, '.')}\n{segment.text.strip()}\n\n" for segment in segments)
    return "WEBVTT\n\n" + "".join(cues)


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"

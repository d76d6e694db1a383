"""A picture in a prompt: the tokens that stand for it, and where rope sees them. No tensors."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(slots=True, eq=False)
class Picture:
    """`rows` x `columns` tokens of a prompt, row after row."""

    key: bytes  # the hash of its pixels: what its embedding and its KV are known by
    rows: int
    columns: int
    pixels: np.ndarray  # u8 [height, width, 3], at the size the model sees
    start: int = 0  # the place of its first token
    embedding: Any = None  # the runner's, [tokens, hidden]: None until it is looked at, and again when it was read

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    @property
    def end(self) -> int:
        return self.start + self.tokens

    def overlaps(self, begin: int, end: int) -> bool:
        """Whether any of its tokens is at a place from `begin` up to `end`."""
        return self.start < end and begin < self.end


class Eyes(Protocol):
    """What a runner whose model sees is asked for."""

    pad_id: int  # the token that stands for a part of a picture

    def read(self, data: bytes, max_pixels: int) -> Picture:
        """Decodes a file, of which more than `max_pixels` are shrunk; 0 is the model's own bound. Any thread may call it.
        Raises InvalidPicture."""


def angles(pictures: Many[Picture], start: int, count: int) -> np.ndarray:
    """i64 [3, count]: where rope sees the tokens from place `start` on, by time, height and width.

    A word is one further than what came before it. A picture begins there too, goes down by its rows and right by its columns,
    and what follows it is beyond both: so it takes as much of the line as its longer side.
    """
    places = np.arange(start, start + count)
    found = np.repeat(places[None], 3, axis=0)
    saved = 0  # how much less of the line the pictures so far took than they have tokens
    for picture in pictures:
        begin, end = (min(max(place - start, 0), count) for place in (picture.start, picture.end))
        row, column = np.divmod(places[begin:end] - picture.start, picture.columns)
        found[:, begin:end] = picture.start - saved + np.stack([np.zeros_like(row), row, column])
        saved += picture.tokens - max(picture.rows, picture.columns)
        found[:, end:] = places[end:] - saved
    return found

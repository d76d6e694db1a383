"""Cuts a text into the pieces that speech is made of: at sentence ends where it can, and the first ones short.

A piece depends on the text and on where it begins, on nothing else: whoever goes on with a text cuts it as it was cut before.
"""

from __future__ import annotations

import re

FIRST_CHARACTERS = 60
MOST_CHARACTERS = 200  # the model speaks best at 100 to 200 phonemes
_CLOSING = r"[\"'\u201d\u2019)\]]*\s"  # quotes and brackets, then a space
_SENTENCE = re.compile(
    r"(?<!\b[A-Z])(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bvs)(?<!\bMrs)(?<!\bProf)"  # a dot that ends none
    rf"[.!?\u2026\u0964]+{_CLOSING}|\n"
)
_CLAUSE = re.compile(rf"[,;:\u2014\u2013]{_CLOSING}")
_WORD = re.compile(r"\s")
_SPACES = re.compile(r"\s*")


def longest(start: int) -> int:
    """Characters of a piece that begins at `start`: twice what was said before, so that it is spoken while that is heard."""
    return min(max(2 * start, FIRST_CHARACTERS), MOST_CHARACTERS)


def piece_end(text: str, start: int, limit: int) -> int:
    """Where the piece from `start` ends, at most `limit` characters later but for the spaces around it: after the last sentence
    that fits, else after the last clause, else after the last word, else in the midst of one."""
    begin = _skip_spaces(text, start)
    if len(text) - begin <= limit:
        return len(text)
    for boundary in (_SENTENCE, _CLAUSE, _WORD):
        ends = [match.end() for match in boundary.finditer(text, begin, begin + limit + 1)]
        if ends:
            return _skip_spaces(text, ends[-1])
    return begin + limit


def _skip_spaces(text: str, start: int) -> int:
    match = _SPACES.match(text, start)
    return match.end() if match else start

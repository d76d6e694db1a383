"""JSON from strangers: strict, bounded, and refused in one way."""

from __future__ import annotations

import json
import re
from typing import Any

from apps.core.errors import InvalidRequest

MAX_DEPTH = 32
MAX_DIGITS = 40
MAX_BARE_BYTES = 1 << 20  # beside what is in strings
MAX_MARKS = 300_000  # quotes, and escapes: each costs, and a picture has none
_LONG_NUMBER = re.compile(rb"\d{%d}" % MAX_DIGITS)
_ESCAPE = re.compile(rb"\\.", re.DOTALL)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises InvalidRequest: duplicate names, NaN, depth and stray surrogates are refused."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise _invalid("The body is not valid UTF-8.") from None
    bare = _without_strings(body)
    if len(bare) > MAX_BARE_BYTES:
        raise _invalid("The body holds too much beside its strings.")
    if _LONG_NUMBER.search(bare):
        raise _invalid("The body holds a number that is too long.")
    _check_depth(bare)
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise _invalid("The body is not valid JSON.") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.")
    if "\\u" in text:
        _refuse_half_pairs(value)
    return value


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_json")


def _refuse_half_pairs(value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _invalid("The body holds half of a surrogate pair.") from None


def _without_strings(body: bytes) -> bytes:
    """The body with its strings emptied, in strides: pictures are strings of megabytes."""
    if max(body.count(b"\\"), body.count(b'"')) > MAX_MARKS:
        raise _invalid(f"The body holds more than {MAX_MARKS} quotes or escapes.")
    return b'""'.join(_ESCAPE.sub(b"", body).split(b'"')[::2])


def _check_depth(bare: bytes) -> None:
    """Bounds nesting before any parser recurses. `bare` is the body with its strings emptied."""
    depth = 0
    for byte in re.findall(rb"[\[\]{}]", bare):
        depth += 1 if byte in b"[{" else -1
        if depth > MAX_DEPTH:
            raise _invalid(f"The body is nested deeper than {MAX_DEPTH} levels.")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _invalid("The body names a field twice (duplicate_key).")
    return value


def _no_constant(name: str) -> None:
    raise _invalid(f"{name} is not JSON.")

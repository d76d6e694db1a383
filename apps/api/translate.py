"""For the APIs that are served as chats: refusals name the fields that the client sent, not those of the chat."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from apps.core.errors import ServiceError

Names = Sequence[tuple[str, str]]  # (pattern, what stands there instead)
_MESSAGE = re.compile(r"messages\[(\d+)\]")


@contextmanager
def naming(names: Names, places: Sequence[str] = ()) -> Iterator[None]:
    """`places` says where each message of the chat came from."""
    try:
        yield
    except ServiceError as error:
        if error.param is not None:
            param = _renamed(error.param, names, places)
            if error.message.startswith(error.param):
                error.message = param + error.message[len(error.param) :]
            error.param = param
        raise


def _renamed(param: str, names: Names, places: Sequence[str]) -> str:
    param = _MESSAGE.sub(lambda found: places[int(found[1])] if int(found[1]) < len(places) else found[0], param)
    for pattern, name in names:
        param = re.sub(pattern, name, param)
    return param

"""Database reads from coroutines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from asgiref.sync import sync_to_async
from django.db import connection

T = TypeVar("T")


async def in_database(read: Callable[[], T]) -> T:
    """Runs `read` in a thread and gives its connection back to the pool at once.

    Django's own async queries keep theirs until the response ends: a few long streams would hold the whole pool.
    """

    def run() -> T:
        try:
            return read()
        finally:
            connection.close()

    return await sync_to_async(run, thread_sensitive=False)()

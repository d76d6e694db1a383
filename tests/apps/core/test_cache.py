"""A crowd that misses loads once; values grow old; failures are not kept."""

from __future__ import annotations

import asyncio

import pytest

from apps.core.cache import TtlCache


async def test_a_crowd_loads_once() -> None:
    loads: list[str] = []

    async def load(key: str) -> str:
        loads.append(key)
        await asyncio.sleep(0)
        return key.upper()

    cache = TtlCache(load, seconds=60, entries=10)
    assert await asyncio.gather(*(cache.get("a") for _ in range(50))) == ["A"] * 50
    assert loads == ["a"]


async def test_old_values_and_the_oldest_beyond_the_bound_are_loaded_again() -> None:
    loads: list[int] = []

    async def load(key: int) -> int:
        loads.append(key)
        return key

    aged = TtlCache(load, seconds=0, entries=10)
    await aged.get(1)
    await aged.get(1)
    small = TtlCache(load, seconds=60, entries=2)
    for key in (1, 2, 3, 1):
        await small.get(key)
    assert loads == [1, 1, 1, 2, 3, 1]


async def test_a_failure_is_not_kept_and_a_cancelled_waiter_stops_nobody() -> None:
    attempts = 0

    async def load(key: str) -> str:
        nonlocal attempts
        attempts += 1
        await asyncio.sleep(0.01)
        if attempts == 1:
            raise OSError
        return key

    cache = TtlCache(load, seconds=60, entries=10)
    with pytest.raises(OSError):  # noqa: PT011
        await cache.get("a")
    impatient = asyncio.create_task(cache.get("a"))
    patient = asyncio.create_task(cache.get("a"))
    await asyncio.sleep(0)
    impatient.cancel()
    assert await patient == "a"

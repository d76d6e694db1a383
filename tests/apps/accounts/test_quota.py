"""Quota on real Redis and Postgres: exact under parallel load, and never leaking."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from redis.asyncio import Redis

from apps.accounts import quota
from apps.accounts.models import Organization, Plan, UsageDay
from apps.core.errors import QuotaExceeded
from apps.core.redis import LuaScript
from apps.core.types import Principal, QuotaLimits


def principal(**limits: int) -> Principal:
    return Principal(org_id="1", key_id="1", scopes=frozenset({"inference"}), limits=QuotaLimits(**limits))


async def settle(redis: Redis, request_id: str, tokens: int, folder_script: LuaScript) -> None:
    await folder_script(redis, keys=[], args=["1", request_id, tokens])


@pytest.fixture
def settle_script(tmp_path) -> LuaScript:
    script = tmp_path / "settle.lua"
    script.write_text("settle_quota(ARGV[1], ARGV[2], tonumber(ARGV[3]), 0) return 1")
    return LuaScript(script, quota.SETTLE_LUA)


async def admitted(redis: Redis, who: Principal, *, requests: int, tokens: int = 1) -> int:
    async def one(number: int) -> int:
        try:
            await quota.reserve(redis, request_id=f"r{number}", principal=who, tokens=tokens, ttl_ms=60_000)
        except QuotaExceeded:
            return 0
        return 1

    return sum(await asyncio.gather(*(one(n) for n in range(requests))))


@pytest.mark.parametrize("limits", [{"requests_per_minute": 50}, {"tokens_per_minute": 500}, {"concurrent_requests": 50}])
async def test_200_parallel_requests_on_a_quota_of_50_give_exactly_50(redis: Redis, limits: dict[str, int]) -> None:
    assert await admitted(redis, principal(**limits), requests=200, tokens=10) == 50


async def test_reserving_the_same_request_twice_counts_once(redis: Redis) -> None:
    who = principal(requests_per_minute=1)
    for _ in range(2):
        state = await quota.reserve(redis, request_id="same", principal=who, tokens=5, ttl_ms=60_000)
        assert state.remaining_requests == 0


async def test_settling_gives_back_what_was_not_used_and_frees_concurrency(redis: Redis, settle_script) -> None:
    who = principal(tokens_per_minute=100, concurrent_requests=1)
    await quota.reserve(redis, request_id="a", principal=who, tokens=90, ttl_ms=60_000)
    for _ in range(2):  # twice: only the first counts
        await settle(redis, "a", 30, settle_script)
    state = await quota.reserve(redis, request_id="b", principal=who, tokens=70, ttl_ms=60_000)
    assert state.remaining_tokens == 0


async def test_a_released_request_leaves_no_trace(redis: Redis) -> None:
    who = principal(requests_per_minute=1, tokens_per_minute=10, concurrent_requests=1)
    await quota.reserve(redis, request_id="a", principal=who, tokens=10, ttl_ms=60_000)
    await quota.release(redis, request_id="a", org_id="1")
    state = await quota.reserve(redis, request_id="b", principal=who, tokens=10, ttl_ms=60_000)
    assert state.remaining_requests == 0


async def test_refusals_say_which_limit_and_when_to_return(redis: Redis) -> None:
    who = principal(requests_per_minute=1)
    await quota.reserve(redis, request_id="a", principal=who, tokens=1, ttl_ms=60_000)
    with pytest.raises(QuotaExceeded) as refusal:
        await quota.reserve(redis, request_id="b", principal=who, tokens=1, ttl_ms=60_000)
    assert refusal.value.code == "rate_limit_exceeded"
    assert 58 < (refusal.value.retry_after_seconds or 0) <= 60


async def test_a_request_dearer_than_the_limit_is_told_not_to_retry(redis: Redis) -> None:
    with pytest.raises(QuotaExceeded) as refusal:
        await quota.reserve(redis, request_id="a", principal=principal(tokens_per_minute=5), tokens=6, ttl_ms=60_000)
    assert refusal.value.should_retry is False


@pytest.mark.django_db(transaction=True)
async def test_a_day_that_redis_lost_starts_again_from_postgres(redis: Redis) -> None:
    plan = await Plan.objects.acreate(name="p")
    org = await Organization.objects.acreate(name="o", plan=plan)
    await UsageDay.objects.acreate(
        organization=org, key_id="k", model="m", day=datetime.now(UTC).date(), prompt_tokens=60, completion_tokens=30
    )
    who = Principal(str(org.pk), "k", frozenset(), QuotaLimits(tokens_per_day=100))
    await quota.reserve(redis, request_id="a", principal=who, tokens=10, ttl_ms=60_000)
    with pytest.raises(QuotaExceeded) as refusal:
        await quota.reserve(redis, request_id="b", principal=who, tokens=1, ttl_ms=60_000)
    assert refusal.value.code == "quota_exceeded"

"""The fitted cost model: what it finds, what it cannot tell apart, and what it never says."""

from __future__ import annotations

import random

import pytest
from redis.asyncio import Redis

from apps.scheduler import costs
from apps.scheduler.cost import CostModel, fit
from apps.scheduler.meter import Meter

Row = tuple[int, int, float]  # input units, output units, ms


async def fitted(redis: Redis, rows: list[Row]) -> CostModel:
    for prompt, generated, gpu_ms in rows:
        await costs.observe(redis, model="m", device="cpu", prompt_tokens=prompt, generated=generated, gpu_ms=gpu_ms)
    found = await costs.of_class(redis, "m", "cpu")
    assert found is not None
    return found


async def test_what_takes_the_same_whatever_its_size_is_a_matter_of_requests(redis: Redis) -> None:
    model = await fitted(redis, [(16 * n, 32 * n * n, 40.0) for n in range(1, 30)])
    assert (model.prefill_ms, model.decode_ms, model.request_ms) == pytest.approx((0, 0, 40), abs=1e-3)


@pytest.mark.parametrize("rows", [
    [(n, 3 * n, 6.0 * n) for n in range(1, 30)],  # of lengths that go together
    [(0, n, 2.0 * n) for n in range(1, 30)],
    [(5, 5, 10.0)] * 30,  # always the same
])  # fmt: skip
async def test_what_cannot_be_told_apart_is_put_on_the_output(redis: Redis, rows: list[Row]) -> None:
    model = await fitted(redis, rows)
    assert (model.prefill_ms, model.decode_ms, model.request_ms) == pytest.approx((0, 2, 0), abs=1e-6)


async def test_what_attends_to_all_of_the_input_costs_by_both(redis: Redis) -> None:
    sizes = [(n, n * steps) for n in range(100, 1000, 100) for steps in range(2, 6)]  # videos: patches, and those of all steps
    model = await fitted(redis, [(x, z, 50 + 0.2 * z + 0.001 * x * z) for x, z in sizes])
    assert (model.decode_ms, model.request_ms, model.context_ms) == pytest.approx((0.2, 50, 0.001), rel=1e-3)
    assert model.ms(2000, 6000) == pytest.approx(50 + 1200 + 12_000, rel=1e-3)


async def test_noise_makes_nothing_negative_and_long_requests_do_not_drown_short_ones(redis: Redis) -> None:
    rng = random.Random(1)
    sizes = [(rng.randint(1, 500), rng.randint(1, 100)) for _ in range(300)]
    model = await fitted(redis, [(x, z, (5 + 0.02 * x + 4 * z) * rng.uniform(0.8, 1.25)) for x, z in sizes])
    assert min(model.prefill_ms, model.decode_ms, model.request_ms) >= 0
    assert [model.ms(10, 2), model.ms(400, 90)] == pytest.approx([13.2, 373], rel=0.15)
    assert model.error < 0.15


def test_nothing_is_said_of_too_few() -> None:
    assert fit({}) is None
    assert fit({"n": "9", "zz": "1", "zy": "1"}) is None


def test_a_step_is_shared_by_the_sequences_that_are_there_now() -> None:
    now = 0.0
    meter = Meter(lambda: now)
    meter.begin("a", 3)
    meter.begin("b", 1)
    now = 0.1
    meter.step(others=0, made={})
    assert meter.end("b").gpu_ms == pytest.approx(25)
    now = 0.2
    meter.step(others=3, made={})
    assert meter.end("a").gpu_ms == pytest.approx(75 + 50)
    assert meter.sequences == 0


def test_a_step_of_media_is_shared_by_what_each_got_done() -> None:
    now = 0.0
    meter = Meter(lambda: now)
    meter.begin("small", 1)
    meter.begin("large", 1)
    meter.begin("waiting", 1)
    now = 0.1
    meter.step(others=1, made={"small": 10, "large": 65, "another's": 25, "waiting": 0})
    assert meter.end("small").gpu_ms == pytest.approx(75 * 10 / 75)
    assert meter.end("large").gpu_ms == pytest.approx(75 * 65 / 75)
    assert meter.end("waiting").gpu_ms == 0
    meter.step(others=0, made={})

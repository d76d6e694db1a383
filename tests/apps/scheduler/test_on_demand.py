"""Models that load when they are asked for: requests are held meanwhile, loads are joined, failures are told."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from apps.core.errors import Unavailable
from apps.core.types import Outcome
from apps.fleet import loading
from apps.scheduler import services
from apps.scheduler.forecast import Progress
from tests.apps.fleet.fake_daemon import FakeDaemon
from tests.apps.scheduler.factories import make_request
from tests.apps.scheduler.fleet_site import GIB, disk, fleet_site, quicken, set_env, until
from tests.apps.scheduler.site import principal

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _fast(monkeypatch) -> None:
    quicken(monkeypatch)


async def test_fifty_requests_at_once_are_held_for_one_load(redis: Redis) -> None:
    daemon = FakeDaemon(models=[], folders=disk("m"), load_seconds=0.3)
    async with fleet_site(redis, [daemon], models=["m"]) as made:
        clients = await asyncio.gather(*(made.run("m", seed=i) for i in range(50)))
        assert made.loads == ["m"]
    assert {client.end.outcome for client in clients} == {Outcome.SUCCEEDED}
    assert all(client.end.wait.get("model_load", 0) > 0 for client in clients)


async def test_a_client_that_waits_sees_the_load(redis: Redis) -> None:
    daemon = FakeDaemon(models=[], folders=disk("m"), load_seconds=1.2)
    async with fleet_site(redis, [daemon], models=["m"]) as made:
        client = await made.submit("m")
        seen = [item async for item in services.progress(client.request_id) if isinstance(item, Progress)]
    assert {"stage": "reading", "progress": 0.5} in [item.body.get("load") for item in seen]
    assert "load" not in seen[0].body or seen[0].load is not None


async def test_a_load_that_fails_ends_the_waiting_with_the_reason_and_harms_nobody(redis: Redis, monkeypatch) -> None:
    monkeypatch.setattr(loading, "RETRY_SECONDS", 0.5)
    daemon = FakeDaemon(models=["good"], folders=disk("good", "bad"), step_seconds=0.005)
    daemon.load_errors["bad"] = "bad: the shard model-2.safetensors is missing"
    async with fleet_site(redis, [daemon], models=["good", "bad"], placed=["good"]) as made:
        serving = asyncio.create_task(made.run("good", max_tokens=100))
        first = await made.run("bad")
        assert (first.end.outcome, first.end.error_code) == (Outcome.FAILED, "model_load_failed")
        assert "the shard model-2.safetensors is missing" in first.end.error_message
        with pytest.raises(Unavailable, match="cannot be loaded") as refused:
            await services.submit(make_request(model="bad"), principal())
        assert refused.value.code == "model_load_failed"
        assert (await serving).end.outcome is Outcome.SUCCEEDED
        daemon.load_errors.clear()

        async def tried_again() -> bool:
            try:
                await made.submit("bad")
            except Unavailable:
                return False
            return True

        await until(tried_again)
        assert (await made.follow(made.clients[-1])).end.outcome is Outcome.SUCCEEDED


async def test_a_model_too_large_for_any_worker_is_refused_at_once(redis: Redis) -> None:
    daemon = FakeDaemon(models=[], folders={"huge": 9 * GIB, "m": GIB})
    async with fleet_site(redis, [daemon], models=["huge", "m"]):
        with pytest.raises(Unavailable, match="needs 9216 MiB, 8192 MiB can be made free"):
            await services.submit(make_request(model="huge"), principal())


async def test_without_loading_on_demand_only_placed_models_are_served(redis: Redis, monkeypatch) -> None:
    set_env(monkeypatch, load_on_demand=False)
    daemon = FakeDaemon(models=[], folders=disk("a", "b"))
    async with fleet_site(redis, [daemon], models=["a", "b"], placed=["a"]) as made:
        assert (await made.run("a")).end.outcome is Outcome.SUCCEEDED
        with pytest.raises(Unavailable) as refused:
            await services.submit(make_request(model="b"), principal())
        assert refused.value.code == "model_not_loaded"
        assert made.loads == ["a"]


async def test_what_is_idle_past_its_limit_is_unloaded_unless_placed(redis: Redis, monkeypatch) -> None:
    set_env(monkeypatch, model_idle_seconds=1)
    daemon = FakeDaemon(models=[], folders=disk("kept", "m"))
    async with fleet_site(redis, [daemon], models=["kept", "m"], placed=["kept"]) as made:
        await made.run("m")

        async def gone() -> bool:
            return daemon.unloads == ["m"] and "kept" in daemon.models

        await until(gone)


async def test_three_models_where_two_fit_are_all_served_without_thrashing(redis: Redis) -> None:
    daemon = FakeDaemon(models=[], folders=disk("a", "b", "c"), budget_bytes=2 * GIB, load_seconds=0.1, max_running=32)
    async with fleet_site(redis, [daemon], models=["a", "b", "c"]) as made:
        clients = await asyncio.gather(*(made.run("abc"[i % 3], seed=i) for i in range(120)))
        assert len(made.loads) <= 4, "three are the fewest there can be"
        assert daemon.peak_bytes <= daemon.budget_bytes
    assert {client.end.outcome for client in clients} == {Outcome.SUCCEEDED}


async def test_the_choice_of_a_worker_is_told_with_its_scores(redis: Redis) -> None:
    daemons = [FakeDaemon(f"w{i}", models=[], folders=disk("m")) for i in range(2)]
    async with fleet_site(redis, daemons, models=["m"], placed=["m"]) as made:
        await until(lambda: asyncio.sleep(0, all(daemon.models for daemon in daemons)))
        await asyncio.sleep(0.3)
        prompt = tuple(range(100, 400))
        first = await made.run("m", prompts=(prompt,))
        again = [await made.run("m", prompts=((*prompt, *range(20 * i)),)) for i in range(5)]
        told = [await services.describe(client.request_id, "1") for client in (first, *again)]
    routes = [body["route"] for body in told]
    assert {route["worker"] for route in routes} == {routes[0]["worker"]}
    assert all(set(route["scores"]) == {"w0", "w1"} for route in routes)
    assert routes[1]["scores"][routes[0]["worker"]]["sticky_ms"] > 0

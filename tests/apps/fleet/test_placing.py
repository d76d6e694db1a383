"""What operators do to workers, carried out by the controller under traffic: place, pin, move, unload, drain."""

from __future__ import annotations

import asyncio

import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from redis.asyncio import Redis

from apps.accounts.models import AuditLog
from apps.core.database import in_database
from apps.core.errors import InvalidRequest
from apps.core.types import Outcome, WorkerSnapshot
from apps.fleet import mirror, registry
from apps.fleet.models import Model, Movement, Placement, UnloadWish, Worker
from apps.fleet.preview import Preview, drain_preview, move_preview, put_preview, unload_preview
from apps.fleet.services import model_unload, placement_move, placement_put, worker_drain
from tests.apps.fleet.fake_daemon import FakeDaemon
from tests.apps.scheduler.fleet_site import GIB, disk, fleet_site, quicken, until

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    quicken(monkeypatch)
    monkeypatch.setattr(mirror, "WRITE_SECONDS", 0.02)


def daemon(name: str, *models: str, budget: int = 2 * GIB, **fields: object) -> FakeDaemon:
    return FakeDaemon(worker_id=name, models=[], folders=disk(*models), budget_bytes=budget, **fields)


async def alive(redis: Redis) -> list[WorkerSnapshot]:
    return await registry.workers(redis, timeout_ms=settings.ENV.worker_timeout_ms)


async def on(redis: Redis, worker: str) -> set[str]:
    return {m.model for w in await alive(redis) if w.worker_id == worker for m in w.models if m.state == "ready"}


async def holds(redis: Redis, worker: str, *models: str) -> bool:
    return await on(redis, worker) == set(models)


def rows(model: str, *workers: str) -> tuple[Model, list[Worker]]:
    return Model.objects.get(name=model), [Worker.objects.get(name=name) for name in workers]


async def put(model: str, worker: str, *, pinned: bool = False) -> None:
    def write() -> None:
        found, (there,) = rows(model, worker)
        placement_put(model=found, worker=there, is_pinned=pinned, actor="me")

    await in_database(write)


async def test_a_model_moves_without_a_gap_and_the_record_tells_how_long_it_took(redis: Redis) -> None:
    workers = [daemon("w1", "a", load_seconds=0.2), daemon("w2", "a", load_seconds=0.2)]
    async with fleet_site(redis, workers, models=["a"]) as site:
        await put("a", "w1", pinned=True)
        await until(lambda: holds(redis, "w1", "a"))
        seen = await move("a", "w1", "w2", await alive(redis))
        assert seen.possible
        assert seen.loads == ("a",)
        assert seen.seconds is not None
        assert 0.2 <= seen.seconds < 2, "as long as it took on the other worker"
        served = 0
        while not await holds(redis, "w2", "a"):
            assert await holds(redis, "w1", "a"), "it left before the other one served it"
            assert (await site.run("a")).end.outcome is Outcome.SUCCEEDED
            served += 1
        await until(lambda: holds(redis, "w1"))
        assert served
        await until(lambda: in_database(lambda: not UnloadWish.objects.exists() and Movement.objects.count() == 3))
        assert await in_database(lambda: list(Placement.objects.values_list("worker__name", "is_pinned"))) == [("w2", True)]
        movements = await in_database(
            lambda: list(Movement.objects.order_by("pk").values_list("worker__name", "loaded", "evicted"))
        )
        assert movements == [("w1", "a", ""), ("w2", "a", ""), ("w1", "", "a")]
    assert await in_database(lambda: AuditLog.objects.filter(actor="me", target="a from w1 to w2").exists())


async def move(model: str, source: str, target: str, known: list[WorkerSnapshot]) -> Preview:
    def write() -> Preview:
        found, (here, there) = rows(model, source, target)
        seen = move_preview(known, model=found, source=here, target=there)
        placement_move(model=found, source=here, target=there, actor="me")
        return seen

    return await in_database(write)


async def test_what_is_unloaded_is_gone_though_it_was_placed(redis: Redis) -> None:
    async with fleet_site(redis, [daemon("w1", "a")], models=["a"], placed=["a"]):
        await until(lambda: holds(redis, "w1", "a"))
        known = await alive(redis)

        def write() -> Preview:
            model, (worker,) = rows("a", "w1")
            seen = unload_preview(known, model=model, worker=worker)
            model_unload(model=model, worker=worker, actor="me")
            return seen

        seen = await in_database(write)
        assert seen.unloads == ("a",)
        assert "loaded again" in seen.says[-1]
        await until(lambda: holds(redis, "w1"))
        await until(lambda: in_database(lambda: not UnloadWish.objects.exists()))
        await put("a", "w1")
        await until(lambda: holds(redis, "w1", "a"))


async def test_a_drained_worker_ends_what_it_runs_and_gets_nothing_more(redis: Redis) -> None:
    workers = [daemon("w1", "a", step_seconds=0.02), daemon("w2", "a")]
    async with fleet_site(redis, workers, models=["a"]) as site:
        await put("a", "w1")
        await until(lambda: holds(redis, "w1", "a"))
        running = await site.submit("a", max_tokens=60)
        following = asyncio.create_task(site.follow(running))
        await until(lambda: sync_to_async(lambda: len(workers[0].submits))())
        await drain("w1", True)

        async def draining() -> bool:
            return any(worker.draining for worker in await alive(redis))

        await until(draining)
        assert (await site.run("a", seed=2)).end.outcome is Outcome.SUCCEEDED
        assert (len(workers[0].submits), len(workers[1].submits)) == (1, 1), "loaded and served elsewhere"
        assert (await following).end.outcome is Outcome.SUCCEEDED
        assert len(workers[0].submits) == 1, "it was not moved"
        await drain("w1", False)

        async def open_again() -> bool:
            return not any(worker.draining for worker in await alive(redis))

        await until(open_again)


async def drain(name: str, wanted: bool) -> None:
    await in_database(lambda: worker_drain(worker=Worker.objects.get(name=name), is_draining=wanted, actor="me"))


async def test_dry_runs_say_what_fits_who_is_evicted_and_what_is_refused(redis: Redis) -> None:
    async with fleet_site(redis, [daemon("w1", "a", "b", budget=GIB)], models=["a", "b", "c"]) as site:
        await site.run("a")
        known = await alive(redis)

        def look() -> tuple[Preview, Preview, Preview, Preview, Preview]:
            b, (w1,) = rows("b", "w1")
            c, _ = rows("c")
            unheard = Worker.objects.create(name="w9", host=w1.host, address="127.0.0.1:1")
            return (
                put_preview(known, model=b, worker=w1, is_pinned=False),
                put_preview(known, model=b, worker=w1, is_pinned=True),
                put_preview(known, model=c, worker=w1, is_pinned=True),
                put_preview(known, model=b, worker=unheard, is_pinned=False),
                drain_preview(known, worker=w1, is_draining=True),
            )  # fmt: skip

        free, pinned, absent, unheard, drained = await in_database(look)
        assert not free.possible
        assert "Pinned, it may evict" in free.says[0]
        assert (pinned.possible, pinned.loads, pinned.unloads) == (True, ("b",), ("a",))
        assert not absent.possible
        assert "its weights are not on the worker" in absent.says[0]
        assert not unheard.possible
        assert any("will be refused" in line for line in drained.says)

        def disable() -> None:
            model, (worker,) = rows("b", "w1")
            model.is_enabled = False
            with pytest.raises(InvalidRequest, match="disabled"):
                placement_put(model=model, worker=worker, is_pinned=False, actor="me")

        await in_database(disable)
        assert await in_database(lambda: Placement.objects.count()) == 0, "looking changed nothing"


async def test_a_load_that_fails_is_in_the_record_with_its_reason(redis: Redis) -> None:
    async with fleet_site(redis, [daemon("w1", "a", load_errors={"a": "a shard is missing"})], models=["a"]):
        await put("a", "w1")
        await until(lambda: in_database(lambda: Movement.objects.filter(error__contains="a shard is missing").exists()))

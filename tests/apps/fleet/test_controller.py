"""The controller over real stores and a daemon that can fail: what is published, loaded, recorded and left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import OperationalError
from redis.asyncio import Redis

from apps.core.database import in_database
from apps.core.errors import InvalidRequest
from apps.core.types import WorkerSnapshot
from apps.fleet import controller as controller_module
from apps.fleet import daemon_client, loading, mirror, registry, watch
from apps.fleet.controller import LEADER_KEY, Controller
from apps.fleet.models import Host, Modality, Model, Placement, Worker
from apps.fleet.services import host_add, model_set_engine, worker_add
from protos import inference_pb2 as pb
from tests.apps.fleet.fake_daemon import FakeDaemon

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _fast(monkeypatch) -> None:
    monkeypatch.setattr(controller_module, "RESCAN_SECONDS", 0.05)
    monkeypatch.setattr(watch, "STATUS_INTERVAL_MS", 20)
    monkeypatch.setattr(watch, "RECONNECT_SECONDS", (0.05,))
    monkeypatch.setattr(mirror, "WRITE_SECONDS", 0.02)
    monkeypatch.setattr(mirror, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(loading, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(daemon_client, "SILENCE_SECONDS", 0.3)


@pytest.fixture
async def daemon() -> AsyncIterator[FakeDaemon]:
    token = settings.ENV.daemon_token.get_secret_value()
    async with FakeDaemon(models=[], token=token) as running:
        yield running


async def add_worker(daemon: FakeDaemon, *models: str, name: str = "w1") -> Worker:
    def write() -> Worker:
        for model in models:
            Model.objects.create(name=model, title=model, modality=Modality.TEXT, parameters=1, weight_bytes=1,
                                 published_at="2026-01-01")  # fmt: skip
        host = host_add(name="h", address="127.0.0.1")
        return worker_add(name=name, host=host, port=daemon.port, models=list(models))

    return await sync_to_async(write)()


@asynccontextmanager
async def controlling(redis: Redis, name: str = "one") -> AsyncIterator[Controller]:
    stop = asyncio.Event()
    controller = Controller(redis, name)
    task = asyncio.create_task(controller.run(stop))
    try:
        yield controller
    finally:
        stop.set()
        await asyncio.wait_for(task, 3)


async def until(holds: Callable[[], Awaitable[object]], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():  # noqa: ASYNC110  It is in Redis or Postgres, which raise no event here.
            await asyncio.sleep(0.01)


async def alive(redis: Redis, timeout_ms: int = 500) -> list[WorkerSnapshot]:
    return await registry.workers(redis, timeout_ms=timeout_ms)


async def status() -> str:
    return await in_database(lambda: Worker.objects.get().status)


async def state() -> str:
    return await in_database(lambda: Placement.objects.get().state)


async def test_a_worker_added_while_it_runs_is_published_and_given_its_model(redis: Redis, daemon: FakeDaemon) -> None:
    async with controlling(redis):
        await until(lambda: redis.exists(LEADER_KEY))
        await add_worker(daemon, "m")

        async def serving() -> bool:
            return any(worker.resident("m") for worker in await alive(redis))

        await until(serving)
        (worker,) = await alive(redis)
        assert (worker.worker_id, worker.address) == ("w1", daemon.address)
        assert daemon.loads == ["m"]

        async def recorded() -> bool:
            return (await status(), await state()) == ("serving", "ready")

        await until(recorded)
    found = await in_database(lambda: Worker.objects.select_related("gpu").get())
    assert found.gpu is not None
    assert (found.gpu.device, found.seen_at is None) == ("cpu", False)


async def test_a_model_goes_over_to_the_engine_it_is_given(redis: Redis, daemon: FakeDaemon) -> None:
    await add_worker(daemon, "m")
    async with controlling(redis):

        async def runs_under(engine: str) -> bool:
            found = [resident for worker in await alive(redis) if (resident := worker.resident("m"))]
            return [resident.engine for resident in found] == [engine] and await state() == "ready"

        await until(lambda: runs_under("continuous"))
        await in_database(lambda: model_set_engine(name="m", engine="static"))
        await until(lambda: runs_under("static"))
        await in_database(lambda: model_set_engine(name="m", engine="continuous"))
        await until(lambda: runs_under("continuous"))
    assert daemon.loads == ["m"] * 3


async def test_an_engine_is_one_of_two_and_for_a_known_model() -> None:
    for name, engine in (("missing", "static"), ("m", "fast")):
        with pytest.raises(InvalidRequest):
            await in_database(lambda name=name, engine=engine: model_set_engine(name=name, engine=engine))


@pytest.mark.parametrize("change", ["remove", "disable"])
async def test_a_worker_that_is_no_longer_wanted_leaves_routing(redis: Redis, daemon: FakeDaemon, change: str) -> None:
    await add_worker(daemon)
    async with controlling(redis):
        await until(lambda: alive(redis))
        rows = Worker.objects.all()
        await in_database(rows.delete if change == "remove" else lambda: rows.update(is_enabled=False))

        async def gone() -> bool:
            return not await redis.hexists(registry.KEY, "w1")

        await until(gone)


async def test_a_worker_that_moves_is_followed(redis: Redis, daemon: FakeDaemon) -> None:
    await add_worker(daemon)
    async with controlling(redis), FakeDaemon(models=[], token=daemon.token) as other:
        await until(lambda: alive(redis))
        await in_database(lambda: Worker.objects.update(address=other.address))

        async def moved() -> bool:
            return [worker.address for worker in await alive(redis)] == [other.address]

        await until(moved)


async def test_a_worker_that_dies_is_said_to_and_found_again(redis: Redis, daemon: FakeDaemon) -> None:
    await add_worker(daemon, "m")
    async with controlling(redis):
        await until(lambda: alive(redis))
        await daemon.stop()

        async def lost() -> bool:
            return "unreachable" in await status() and "unreachable" in await state() and not await alive(redis)

        await until(lost)
        await daemon.start()

        async def back() -> bool:
            return bool(await alive(redis)) and await status() == "serving"

        await until(back)


async def test_a_frozen_worker_leaves_routing(redis: Redis, daemon: FakeDaemon) -> None:
    await add_worker(daemon)
    async with controlling(redis):
        await until(lambda: alive(redis))
        daemon.freeze()

        async def silent() -> bool:
            return not await alive(redis) and await status() == "unreachable: silent"

        await until(silent)


async def test_a_stuck_worker_leaves_routing_and_returns_when_it_steps(redis: Redis, daemon: FakeDaemon, monkeypatch) -> None:
    worker = await add_worker(daemon)
    detector = watch.StuckDetector(timeout_seconds=0.1)
    monkeypatch.setattr(watch, "StuckDetector", lambda _: detector)
    busy = pb.ModelStatus(model="m", state=pb.MODEL_STATE_READY, running=1, kv_blocks_total=8)
    honest = daemon.status

    def with_work() -> pb.DaemonStatus:
        found = honest()
        found.models.append(busy)
        return found

    async with controlling(redis):
        await until(lambda: alive(redis))
        monkeypatch.setattr(daemon, "status", with_work)

        async def stuck() -> bool:
            return not await redis.hexists(registry.KEY, worker.name) and (await status()).startswith("stuck")

        await until(stuck)
        daemon.step += 1
        await until(lambda: alive(redis))


async def test_a_worker_under_another_s_name_is_not_published(redis: Redis, daemon: FakeDaemon) -> None:
    await add_worker(daemon, name="w2")
    async with controlling(redis):

        async def told() -> bool:
            return "calls itself 'w1'; start it with --worker-id w2" in await status()

        await until(told)
        assert await alive(redis) == []


async def test_a_load_that_fails_is_recorded_and_tried_again(redis: Redis, daemon: FakeDaemon) -> None:
    daemon.load_errors["m"] = "the weights\x00 are not here"
    await add_worker(daemon, "m")
    async with controlling(redis):

        async def failed_twice() -> bool:
            return len(daemon.loads) >= 2 and "failed" in await state()

        await until(failed_twice)
        assert "the weights are not here; tried" in await state()
        daemon.load_errors.clear()

        async def ready() -> bool:
            return await state() == "ready"

        await until(ready)


async def test_workers_stay_routable_while_postgres_is_away(redis: Redis, daemon: FakeDaemon, monkeypatch) -> None:
    await add_worker(daemon)
    refused: list[object] = []

    async def away(read: object) -> None:
        refused.append(read)
        raise OperationalError("the server closed the connection")

    async with controlling(redis):
        await until(lambda: alive(redis))
        with monkeypatch.context() as outage:
            outage.setattr(controller_module, "in_database", away)
            outage.setattr(mirror, "in_database", away)
            daemon.draining = True

            async def still_published() -> bool:
                return len(refused) >= 5 and any(worker.draining for worker in await alive(redis))

            await until(still_published)

        async def caught_up() -> bool:
            return await status() == "draining"

        await until(caught_up)


async def test_the_record_is_written_only_when_it_changes(redis: Redis, daemon: FakeDaemon, monkeypatch) -> None:
    await add_worker(daemon)
    writes: list[dict] = []
    save = mirror._save
    monkeypatch.setattr(mirror, "_save", lambda worker_id, news, moves: (writes.append(news), save(worker_id, news, moves)))
    async with controlling(redis):
        await until(lambda: alive(redis))
        (first,) = await alive(redis)

        async def heard_often() -> bool:
            return (await alive(redis))[0].seen_ms > first.seen_ms + 400

        await until(heard_often)
    keys = [key for news in writes for key in news]
    assert keys.count("device") == 1
    assert keys.count("status") <= 2, "once, and once more when a minute turns"


async def test_one_leads_and_the_next_takes_over(redis: Redis, daemon: FakeDaemon) -> None:
    await add_worker(daemon)
    async with controlling(redis, "two-to-be") as second:
        await until(lambda: redis.exists(LEADER_KEY))
        async with controlling(redis, "waiting") as third:
            await until(lambda: alive(redis))
            assert await redis.get(LEADER_KEY) == "two-to-be"
            assert third._watches == {}
            await redis.set(LEADER_KEY, "usurper")

            async def stepped_down() -> bool:
                return second._watches == {}

            await until(stepped_down)
            assert await redis.hexists(registry.KEY, "w1"), "what is published stays for the next leader"
            await redis.delete(LEADER_KEY)
            await until(lambda: alive(redis, timeout_ms=100))
    assert not await redis.exists(LEADER_KEY)


async def test_a_leader_that_cannot_renew_steps_down_in_time(redis: Redis, daemon: FakeDaemon, monkeypatch) -> None:
    await add_worker(daemon)
    monkeypatch.setattr(controller_module, "LEASE_SECONDS", 0.3)

    async def hang(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    async with controlling(redis) as leader:
        await until(lambda: alive(redis))
        with monkeypatch.context() as outage:
            outage.setattr(controller_module, "_LOCK", hang)

            async def stepped_down() -> bool:
                return leader._watches == {}

            await until(stepped_down)
        await until(lambda: alive(redis, timeout_ms=100))


async def test_hosts_and_workers_say_what_is_wrong_with_them(daemon: FakeDaemon) -> None:
    host: Host = await sync_to_async(host_add)(name="h", address="127.0.0.1")
    for change, why in (({"models": ["nothing"]}, "no model nothing"), ({"port": 99999999}, "host:port")):
        with pytest.raises(Exception, match=why):
            await sync_to_async(worker_add)(**{"name": "w", "host": host, "port": 1, "models": [], **change})
    assert not await Worker.objects.aexists()

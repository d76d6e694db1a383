"""What can be taken away during a switch: a daemon, a model, the line, the key, the controller. Daemons are light here."""

from __future__ import annotations

import asyncio
import sys
import time

import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from redis.asyncio import Redis

from apps.core.database import in_database
from apps.core.types import WorkerSnapshot
from apps.fleet import registry
from apps.fleet.models import Host
from apps.fleet.modes import keeper, saga
from apps.fleet.modes.plan import FORWARD, Step
from tests.apps.fleet.modes.host import LIGHT, TINY, SshHost, make_key
from tests.apps.fleet.modes.site import VALID_SECONDS, controlling, ended, request, serving, until

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch) -> None:
    monkeypatch.setattr(keeper, "ABSENT_SECONDS", 1.0)
    monkeypatch.setattr(keeper, "REPAIR_SECONDS", 3.0)
    monkeypatch.setattr(saga, "INSIST_SECONDS", 3.0)
    monkeypatch.setattr(settings, "ENV", settings.ENV.model_copy(update={"switch_drain_ms": 200}))


@pytest.fixture
def light() -> bool:
    return True


async def test_a_daemon_that_never_starts_costs_nobody_anything(redis: Redis, host: SshHost) -> None:
    host.together_by(sys.executable, "-c", "import time; time.sleep(300)")
    host.config.write_text(host.config.read_text().replace("start_seconds = 25", "start_seconds = 3"))
    record = await sync_to_async(host.add)()
    async with controlling(redis):
        await until(lambda: serving(redis, host, "individual", 1))
        switch = await request(record, "tensor_parallel")
        while not await ended(switch):
            shown = await registry.workers(redis, timeout_ms=5000)
            assert sum(_ready(worker) for worker in shown) == host.workers, "it serves all the while"
            await asyncio.sleep(0.05)
        assert switch.state == "rolled_back"
        assert switch.reason.startswith(f"start: {host.together} does not listen in time")
        assert await serving(redis, host, "individual", 1)


def _ready(worker: WorkerSnapshot) -> bool:
    held = worker.resident(TINY)
    return not worker.cordoned and held is not None and held.state == "ready"


async def test_a_model_that_does_not_load_brings_the_old_mode_back_under_a_new_epoch(redis: Redis, host: SshHost) -> None:
    host.together_by(*LIGHT, "broken")
    record = await sync_to_async(host.add)()
    async with controlling(redis):
        await until(lambda: serving(redis, host, "individual", 1))
        switch = await request(record, "tensor_parallel")
        await until(lambda: ended(switch))
        assert (switch.state, "load: " in switch.reason) == ("rolled_back", True)
        await until(lambda: serving(redis, host, "individual", switch.epoch + 1))


async def test_a_killed_daemon_is_started_again(redis: Redis, host: SshHost) -> None:
    await sync_to_async(host.add)()
    async with controlling(redis):
        await until(lambda: serving(redis, host, "individual", 1))
        await asyncio.to_thread(host.kill, host.name(0))
        await until(lambda: _gone(redis, host.name(0)))
        await until(lambda: serving(redis, host, "individual", 1))


async def _gone(redis: Redis, name: str) -> bool:
    return name not in {worker.worker_id for worker in await registry.workers(redis, timeout_ms=5000)}


async def test_a_host_with_another_key_is_left_alone(redis: Redis, host: SshHost, tmp_path) -> None:
    record = await sync_to_async(host.add)()
    async with controlling(redis):
        await until(lambda: serving(redis, host, "individual", 1))
        other = make_key(tmp_path / "other")
        await in_database(lambda: Host.objects.filter(pk=record.pk).update(ssh_host_key=other))
        sessions = host.log.count("Accepted publickey")
        switch = await request(record, "tensor_parallel")
        await until(lambda: ended(switch))
        assert (switch.state, "ssh_wrong_key" in switch.reason) == ("failed", True)
        assert host.log.count("Accepted publickey") == sessions
        assert await serving(redis, host, "individual", 1)


@pytest.mark.parametrize("step", [*FORWARD, Step.PROBE, Step.RENEW, Step.RESTART])
async def test_the_next_controller_goes_on_where_one_was_killed(redis: Redis, host: SshHost, step: Step, monkeypatch) -> None:
    """Killed as it takes the step: before anything is done about it, and once more after all of it was done."""
    if step not in FORWARD:
        host.together_by(*LIGHT, "broken")
    record = await sync_to_async(host.add)()
    honest, killed = saga.Saga._take, []

    async def take(self: saga.Saga, taken: Step) -> None:
        if taken is step and len(killed) < 2:
            killed.append(self._runner)
            if len(killed) == 2:
                await self._do[step]()
            tasks[self._runner].cancel()
            await asyncio.sleep(60)
        await honest(self, taken)

    monkeypatch.setattr(saga.Saga, "_take", take)
    tasks: dict[str, asyncio.Task[None]] = {}
    async with controlling(redis, "first") as tasks["first"], controlling(redis, "second") as tasks["second"]:
        await until(lambda: serving(redis, host, "individual", 1))
        switch = await request(record, "tensor_parallel")
        async with controlling(redis, "third") as tasks["third"]:
            await until(lambda: ended(switch))
            mode = "tensor_parallel" if step in FORWARD else "individual"
            await until(lambda: serving(redis, host, mode))
    assert len(killed) == 2
    assert switch.state == ("succeeded" if step in FORWARD else "rolled_back")


@pytest.mark.parametrize("step", [Step.START, Step.STOP, Step.SWEEP, Step.RESTART])
@pytest.mark.parametrize("lasting", [False, True])
async def test_a_line_that_is_cut_at_a_step(redis: Redis, host: SshHost, step: Step, lasting: bool, monkeypatch) -> None:
    """Cut in the middle of the command, once; or sshd gone for as long as the site tries."""
    if step is Step.SWEEP:
        host.together_by(sys.executable, "-c", "print(1)")
    if step is Step.RESTART:
        host.together_by(*LIGHT, "broken")
    record = await sync_to_async(host.add)()
    honest, cuts = saga.Saga._take, []

    async def take(self: saga.Saga, taken: Step) -> None:
        if taken is not step or cuts:
            await honest(self, taken)
            return
        cuts.append(time.monotonic())
        if lasting:
            host.stop()
        else:
            asyncio.get_running_loop().call_later(0.6, host.cut)
        await honest(self, taken)

    monkeypatch.setattr(saga.Saga, "_take", take)
    async with controlling(redis):
        await until(lambda: serving(redis, host, "individual", 1))
        switch = await request(record, "tensor_parallel")
        await until(lambda: ended(switch))
        if lasting:
            assert switch.state in ("rolled_back", "failed")
            host.start()
        forward = not lasting and step in FORWARD
        await until(lambda: serving(redis, host, "tensor_parallel" if forward else "individual"))
        assert time.monotonic() - cuts[0] < VALID_SECONDS

"""Switches of a real host: sshd, hostctl, daemons with a tiny model, the controller; and what can be taken away meanwhile."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from redis.asyncio import Redis

from apps.accounts.models import AuditLog
from apps.core.database import in_database
from apps.core.errors import Conflict, InvalidRequest
from apps.core.types import WorkerSnapshot
from apps.fleet import registry
from apps.fleet.controller import Controller
from apps.fleet.models import Host, ModeSwitch
from apps.fleet.modes import keeper, saga
from apps.fleet.modes.plan import FORWARD, Step
from apps.fleet.modes.services import switch_plan, switch_request
from tests.apps.fleet.modes.host import TINY, SshHost, make_key

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.timeout(240)]
VALID_SECONDS = 60  # within which a host is back in exactly one mode, whatever happens
PATIENCE_SECONDS = 150  # of a test, for daemons that import torch on a machine that does other things too


@pytest.fixture(autouse=True)
def _impatient(monkeypatch) -> None:
    monkeypatch.setattr(keeper, "ABSENT_SECONDS", 1.0)
    monkeypatch.setattr(saga, "INSIST_SECONDS", 8.0)
    monkeypatch.setattr(settings, "ENV", settings.ENV.model_copy(update={"switch_drain_ms": 200}))


@asynccontextmanager
async def controlling(redis: Redis, name: str = "one") -> AsyncIterator[asyncio.Task[None]]:
    stop = asyncio.Event()
    task = asyncio.create_task(Controller(redis, name).run(stop))
    try:
        yield task
    finally:
        stop.set()
        await asyncio.wait([task], timeout=10)


async def until(holds, seconds: float = PATIENCE_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():  # noqa: ASYNC110  It is in Redis or Postgres, which raise no event here.
            await asyncio.sleep(0.05)


async def serving(redis: Redis, host: SshHost, mode: str, epoch: int | None = None) -> bool:
    """Whether exactly this mode's workers are routed to, with the model ready, and no other process lives on the host."""
    names = {host.together} if mode == "tensor_parallel" else {host.name(place) for place in range(host.workers)}
    shown = await registry.workers(redis, timeout_ms=5000)
    ready = {w.worker_id for w in shown if not w.cordoned and (held := w.resident(TINY)) and held.state == "ready"}
    epochs = {w.epoch for w in shown if w.worker_id in ready}
    living = await asyncio.to_thread(host.living)
    return ready == names and living == {(mode, found) for found in epochs} and (epoch is None or epochs == {epoch})


async def ended(switch: ModeSwitch) -> bool:
    await in_database(switch.refresh_from_db)
    return switch.ended_at is not None


async def steps(switch: ModeSwitch) -> list[tuple[str, bool | None]]:
    return await in_database(lambda: list(switch.steps.values_list("step", "succeeded")))


async def request(record: Host, mode: str) -> ModeSwitch:
    return await in_database(lambda: switch_request(host=record, mode=mode, actor="test"))


async def test_a_host_goes_over_and_back(redis: Redis, host: SshHost) -> None:
    record = await sync_to_async(host.add)()
    async with controlling(redis):
        await until(lambda: serving(redis, host, "individual", 1))  # a managed host's daemons are started by themselves
        switch = await request(record, "tensor_parallel")
        with pytest.raises(Conflict):
            await request(record, "tensor_parallel")
        await until(lambda: ended(switch))
        assert (switch.state, switch.reason) == ("succeeded", "")
        assert await steps(switch) == [(step, True) for step in FORWARD]
        await until(lambda: serving(redis, host, "tensor_parallel", switch.epoch))
        await in_database(record.refresh_from_db)
        assert (record.mode, record.epoch, record.is_cordoned) == ("tensor_parallel", switch.epoch, False)
        plan = await in_database(lambda: switch_plan(host=record, mode="individual"))
        assert (plan.stops, plan.starts, plan.loads, plan.unloads) == (
            (host.together,), (host.name(0),), (TINY,), (),
        )  # fmt: skip
        with pytest.raises(InvalidRequest, match="already"):
            await request(record, "tensor_parallel")
        back = await request(record, "individual")
        await until(lambda: ended(back))
        await until(lambda: serving(redis, host, "individual", back.epoch))
    actions = await in_database(lambda: set(AuditLog.objects.values_list("actor", "action")))
    assert actions == {("test", "mode switch requested"), ("test", "mode switch succeeded")}


async def test_a_daemon_that_never_starts_costs_nobody_anything(redis: Redis, host: SshHost) -> None:
    host.configure("launcher = .*", f'launcher = ["{sys.executable}", "-c", "import time; time.sleep(300)"]')
    host.configure("start_seconds = .*", "start_seconds = 6")
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
    host.configure(r"port = (\d+)\nlauncher", r'port = \1\narguments = ["--models-dir", "/nonexistent"]\nlauncher')
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
        host.configure(r"port = (\d+)\nlauncher", r'port = \1\narguments = ["--models-dir", "/nonexistent"]\nlauncher')
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
        host.configure("launcher = .*", f'launcher = ["{sys.executable}", "-c", "print(1)"]')
    if step is Step.RESTART:
        host.configure(r"port = (\d+)\nlauncher", r'port = \1\narguments = ["--models-dir", "/nonexistent"]\nlauncher')
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

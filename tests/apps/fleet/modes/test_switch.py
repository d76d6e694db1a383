"""A host goes over and back: sshd, hostctl, real daemons with a tiny model, the controller."""

from __future__ import annotations

import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from redis.asyncio import Redis

from apps.accounts.models import AuditLog
from apps.core.database import in_database
from apps.core.errors import Conflict, InvalidRequest
from apps.fleet.modes import keeper, saga
from apps.fleet.modes.plan import FORWARD
from apps.fleet.modes.services import switch_plan
from tests.apps.fleet.modes.host import TINY, SshHost
from tests.apps.fleet.modes.site import controlling, ended, request, serving, steps, until

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch) -> None:
    monkeypatch.setattr(keeper, "ABSENT_SECONDS", 1.0)
    monkeypatch.setattr(keeper, "REPAIR_SECONDS", 3.0)
    monkeypatch.setattr(saga, "INSIST_SECONDS", 3.0)
    monkeypatch.setattr(settings, "ENV", settings.ENV.model_copy(update={"switch_drain_ms": 200}))


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

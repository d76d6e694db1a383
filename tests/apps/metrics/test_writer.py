"""The ledger's way into Postgres, Prometheus' counters and ClickHouse, with ClickHouse down for a while."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest
from asgiref.sync import sync_to_async
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from apps.accounts.models import Organization, Plan, UsageDay
from apps.accounts.services import usage_record
from apps.core.redis import server_time_ms
from apps.metrics import clickhouse, prometheus
from apps.metrics.records import parse_entry
from apps.metrics.selectors import dashboard
from apps.metrics.writer import QUARANTINE, Writer
from tests.services import ROOT, free_port

PASSWORD = "p" * 20


@contextmanager
def clickhouse_server(folder, port: int):
    command = [sys.executable, "-m", "inference_site.stack.clickhouse_server", "--path", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env={"CLICKHOUSE_PASSWORD": PASSWORD, "PATH": "/usr/bin:/bin"})
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/ping").text == "Ok.\n"
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield
    finally:
        process.terminate()
        assert process.wait(timeout=10) == 0


@pytest.fixture
def port(settings) -> int:
    port = free_port()
    url = f"http://inference:{PASSWORD}@127.0.0.1:{port}/inference"
    settings.ENV = settings.ENV.model_copy(update={"clickhouse_url": url})
    return port


async def entry(redis: Redis, number: int, org: str, **fields) -> str:
    now = await server_time_ms(redis)
    values = {
        "request_id": f"r{number}", "org_id": org, "key_id": "k", "model": "m", "outcome": "succeeded", "code": "",
        "priority": 1, "stream": True, "prompt_tokens": 10, "completion_tokens": 5, "cached_tokens": 0,
        "arrived_ms": now - 500, "finished_ms": now, "queue_ms": 5, "ttft_ms": 100, "total_ms": 500, "attempts": 1,
        "worker_id": "w",
    }  # fmt: skip
    return json.dumps({**values, **fields})


async def until(condition, seconds: float = 20):
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


@pytest.mark.django_db(transaction=True)
async def test_nothing_is_lost_or_doubled_while_clickhouse_is_down(redis: Redis, port: int, tmp_path) -> None:
    plan = await Plan.objects.acreate(name="p")
    org = await Organization.objects.acreate(name="o", plan=plan)
    for number in range(30):
        await redis.xadd("ledger", {"entry": await entry(redis, number, str(org.pk))})
    await redis.xadd("ledger", {"entry": "garbage"})
    stop = asyncio.Event()
    writer = asyncio.create_task(Writer(redis).run(stop))

    async def requests() -> int:
        return sum([row.requests async for row in UsageDay.objects.all()])

    async def usage_counted() -> bool:
        return await requests() == 30

    await until(usage_counted)  # and ClickHouse has not even started

    def rows() -> int:
        return clickhouse.rows(clickhouse.connect(), "SELECT count() AS n FROM requests", {})[0]["n"]

    async def history_written() -> bool:
        try:
            return await asyncio.to_thread(rows) == 30
        except clickhouse.UNAVAILABLE:
            return False

    with clickhouse_server(tmp_path / "ch", port):
        await until(history_written)
        shown = await dashboard(900)
        assert (shown["models"][0]["requests"], shown["models"][0]["completion_tokens"]) == (30, 150)
        assert (await dashboard(900, org_id="other"))["models"] == []
        stop.set()
        await writer
    assert (await dashboard(900))["available"] is False
    assert await redis.xlen(QUARANTINE) == 2  # once by each reader
    assert await requests() == 30


@pytest.mark.django_db(transaction=True)
async def test_usage_counts_each_entry_once_however_often_it_is_told(redis: Redis) -> None:
    plan = await Plan.objects.acreate(name="p")
    org = await Organization.objects.acreate(name="o", plan=plan)
    entries = [(f"{n}-0", parse_entry(await entry(redis, n, str(org.pk)))) for n in range(1, 4)]
    for _ in range(3):
        await sync_to_async(usage_record)(entries)
    row = await UsageDay.objects.aget()
    assert (row.requests, row.prompt_tokens, row.completion_tokens) == (3, 30, 15)


async def test_prometheus_text_is_valid_and_counts_once(redis: Redis) -> None:
    entries = [(f"{n}-0", parse_entry(await entry(redis, n, "1"))) for n in range(1, 5)]
    refused = parse_entry(await entry(redis, 9, "1", outcome="refused", code="queue_full"))
    for _ in range(2):
        await prometheus.count(redis, [*entries, ("9-0", refused)])
    load = {"lanes": {"m": {"running": 2, "waiting": 1}}, "dispatchers": 1}
    text = (await prometheus.render(redis, load, [])).decode()
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["inference:requests_total", ("code", ""), ("model_name", "m"), ("outcome", "succeeded")] == 4
    assert samples["inference:requests_total", ("code", "queue_full"), ("model_name", "m"), ("outcome", "refused")] == 1
    assert samples["inference:generation_tokens_total", ("model_name", "m")] == 25
    bucket = "inference:time_to_first_token_seconds_bucket"
    assert samples[bucket, ("le", "0.1"), ("model_name", "m")] == 4
    assert samples[bucket, ("le", "0.05"), ("model_name", "m")] == 0
    assert samples["inference:num_requests_running", ("model_name", "m")] == 2


@pytest.mark.parametrize("payload", ["", "{}", "[]", '{"request_id": 1}', "\x80\x04"])
def test_what_is_not_an_entry_is_refused(payload: str) -> None:
    with pytest.raises(ValueError, match="ledger"):
        parse_entry(payload)

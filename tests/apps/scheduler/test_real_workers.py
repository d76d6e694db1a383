"""Real daemons under the controller: a revision replaced under load, a process stopped in mid-air, a wake from host memory."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from django.conf import settings
from redis.asyncio import Redis

from apps.core.database import in_database
from apps.core.redis import shared
from apps.core.types import Outcome
from apps.fleet import registry
from apps.fleet.controller import Controller
from apps.fleet.models import Modality, Model, Placement, Worker
from apps.fleet.services import host_add, model_roll, worker_add
from apps.scheduler.dispatcher import Dispatcher
from gpu_daemon.sizing import Conditions, estimate
from tests.apps.scheduler.fleet_site import FleetSite, quicken, until
from tests.gpu_daemon.conftest import make_tiny
from tests.services import ROOT, free_port

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.timeout(240)]
KV_BYTES = 4 << 20


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two revisions of one model that answer differently."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny(folder / "m", "llama")
    torch.manual_seed(11)
    config = transformers.LlamaConfig.from_pretrained(folder / "m")
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "m@r2")
    return folder


@pytest.fixture(autouse=True)
def _fast(monkeypatch) -> None:
    quicken(monkeypatch)


@contextmanager
def worker(name: str, models: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port = free_port()
    command = [
        sys.executable, "-m", "gpu_daemon", "--worker-id", name, "--port", str(port), "--models-dir", str(models),
        "--device", "cpu", "--threads", "1", "--max-model-len", "512", "--kv-bytes", str(KV_BYTES), *arguments,
    ]  # fmt: skip
    token = settings.ENV.daemon_token.get_secret_value()
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "DAEMON_TOKEN": token}, stderr=subprocess.DEVNULL)
    try:
        yield process, port
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


@asynccontextmanager
async def serving(redis: Redis, ports: dict[str, int]) -> AsyncIterator[FleetSite]:
    def record() -> None:
        Model.objects.create(name="m", title="m", modality=Modality.TEXT, parameters=1, weight_bytes=1,
                             published_at="2026-01-01")  # fmt: skip
        host = host_add(name="h", address="127.0.0.1")
        for name, port in ports.items():
            worker_add(name=name, host=host, port=port, models=["m"])

    await in_database(record)
    stop = asyncio.Event()
    tasks = [asyncio.create_task(each.run(stop)) for each in (Controller(redis, "c"), Dispatcher(redis, "d"))]
    try:
        await until(lambda: revisions(redis, len(ports), {""}), 90)
        yield FleetSite(redis, [])
    finally:
        stop.set()
        await asyncio.gather(*tasks)
        await shared().aclose()
        await in_database(lambda: [rows.objects.all().delete() for rows in (Placement, Worker, Model)])


async def revisions(redis: Redis, workers: int, wanted: set[str]) -> bool:
    """Whether every worker has these revisions, ready, and no other."""
    found = await registry.workers(redis, timeout_ms=5000)
    ready = [{(r.revision, r.state) for r in snapshot.models} for snapshot in found]
    return len(found) == workers and all(each == {(revision, "ready") for revision in wanted} for each in ready)


def room_for(models: Path, count: float) -> int:
    size = estimate(models / "m", Conditions(cuda=False, length=512))
    return int((size.weights + size.activations + KV_BYTES) * count)


@pytest.mark.parametrize("fit", [2.5, 1.5], ids=["beside", "in its place"])
async def test_a_revision_replaces_another_under_load_and_nothing_fails(redis: Redis, models: Path, fit: float) -> None:
    memory = ("--memory-bytes", str(room_for(models, fit)))
    with worker("w0", models, *memory) as (_, one), worker("w1", models, *memory) as (_, two):
        async with serving(redis, {"w0": one, "w1": two}) as made:
            first = await made.run("m", seed=1, max_tokens=8, prompts=((5, 6, 7),))
            over = asyncio.Event()

            async def stream(number: int) -> None:
                while not over.is_set():
                    await made.run("m", seed=number, max_tokens=30, prompts=((5, 6, 7, number),))

            clients = [asyncio.create_task(stream(number)) for number in range(6)]
            await asyncio.sleep(1)
            await in_database(lambda: model_roll(name="m", revision="r2"))
            await until(lambda: revisions(redis, 2, {"r2"}), 90)
            await asyncio.sleep(1)
            over.set()
            await asyncio.gather(*clients)
            last = await made.run("m", seed=1, max_tokens=8, prompts=((5, 6, 7),))
    outcomes = [client.end.outcome for client in made.clients]
    assert len(outcomes) > 20
    assert set(outcomes) == {Outcome.SUCCEEDED}
    assert len(last.tokens()) == 8
    assert last.tokens() != first.tokens(), "the other revision's weights"


async def test_a_stopped_process_is_out_of_routing_within_5_s_and_comes_back(redis: Redis, models: Path) -> None:
    with worker("w0", models) as (process, one), worker("w1", models) as (_, two):
        async with serving(redis, {"w0": one, "w1": two}) as made:

            async def alive() -> list[str]:
                found = await registry.workers(redis, timeout_ms=settings.ENV.worker_timeout_ms)
                return [snapshot.worker_id for snapshot in found]

            async def alone() -> bool:
                return await alive() == ["w1"]

            process.send_signal(signal.SIGSTOP)
            stopped = time.monotonic()
            running = [asyncio.create_task(made.run("m", seed=i, max_tokens=20)) for i in range(6)]
            await until(alone)
            assert time.monotonic() - stopped < 5
            assert {client.end.outcome for client in await asyncio.gather(*running)} == {Outcome.SUCCEEDED}
            process.send_signal(signal.SIGCONT)

            async def both() -> bool:
                return await alive() == ["w0", "w1"]

            await until(both)

"""The daemon's memory: what does not fit is refused, what is unloaded comes back, and the status tells the truth."""

from __future__ import annotations

import shutil
from contextlib import aclosing
from pathlib import Path

import pytest

from apps.core.types import WorkerSnapshot
from apps.fleet.daemon_client import DaemonClient, DaemonError
from gpu_daemon.budget import Budget
from gpu_daemon.errors import LoadFailed
from gpu_daemon.host_weights import HostWeights, Kept
from gpu_daemon.sizing import Conditions, Estimate, estimate
from tests.gpu_daemon.conftest import make_tiny
from tests.gpu_daemon.test_server import collect, daemon, request, submit

KV_BYTES = 2**20


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    make_tiny(folder / "tiny", "llama")
    shutil.copytree(folder / "tiny", folder / "other")
    return folder


async def load(client: DaemonClient, model: str) -> None:
    async for _ in client.load_model(model, 1):
        pass


async def status(client: DaemonClient) -> WorkerSnapshot:
    """One that knows the folders."""
    async with aclosing(client.watch_status(50)) as statuses:
        async for found in statuses:
            if found.folders:
                return found
    raise AssertionError


def room_for(folder: Path, models: float) -> int:
    size = estimate(folder, Conditions(cuda=False, length=512, threads=1))
    return int((size.weights + size.activations + KV_BYTES) * models)


async def test_what_does_not_fit_is_refused_and_what_serves_goes_on(two: Path) -> None:
    options = {"memory_bytes": room_for(two / "tiny", 1.5), "kv_bytes": KV_BYTES}
    async with daemon(two, **options) as (client, _):
        await load(client, "tiny")
        with pytest.raises(DaemonError, match=r"other needs \d+ MiB, \d+ of \d+ MiB are free"):
            await load(client, "other")
        async with client.execute() as stream:
            await submit(stream, request())
            assert (await collect(stream))["r"]
        found = await status(client)
        assert found.memory_reserved_bytes <= found.memory_budget_bytes == options["memory_bytes"]
        await client.unload_model("tiny", 1, 1000)
        await load(client, "other")


async def test_the_status_has_sizes_folders_and_idleness(two: Path) -> None:
    async with daemon(two, kv_bytes=KV_BYTES) as (client, _):
        await load(client, "tiny")
        found = await status(client)
        (tiny,) = found.models
        folders = {folder.model: folder for folder in found.folders}
        assert set(folders) == {"tiny", "other"}
        assert found.memory_reserved_bytes == tiny.resident_bytes > tiny.kv_bytes == KV_BYTES
        assert folders["tiny"].measured_bytes == tiny.measured_bytes > 0
        assert folders["other"].need_bytes > folders["other"].weight_bytes > 0
        later = await status(client)
        assert later.models[0].idle_ms > tiny.idle_ms


@pytest.mark.parametrize(("cap", "kept"), [(2**30, True), (-1, False)])
async def test_an_unloaded_model_comes_back_from_host_memory(two: Path, cap: int, kept: bool) -> None:
    async with daemon(two, kv_bytes=KV_BYTES, host_weights_bytes=cap) as (client, _):
        await load(client, "tiny")
        answers = []
        for _ in range(2):
            async with client.execute() as stream:
                await submit(stream, request())
                answers.append([delta.token_ids for delta in (await collect(stream))["r"]])
            await client.unload_model("tiny", 1, 1000)
            found = await status(client)
            assert (found.memory_reserved_bytes, found.models) == (0, ())
            assert {folder.model: folder.in_host_memory for folder in found.folders}["tiny"] is kept
            stages = [stage async for stage, _ in client.load_model("tiny", 1)]
            assert ("warming" not in stages) is kept
        assert answers[0] == answers[1]


def test_a_budget_grants_kv_of_what_is_left_and_never_more_than_there_is() -> None:
    budget, size = Budget(1000), Estimate(300, 50, 100, kv_token=1, kv_least=100)
    assert budget.reserve("a", size, 400) == 400
    with pytest.raises(LoadFailed):
        budget.reserve("b", size, 400)
    budget.settle("a", 400)
    assert budget.reserve("b", size, 400) == 250, "what is left, above the least"
    assert budget.free == 0
    budget.release("a")
    assert budget.free == 400


class Model:
    closed = False

    def close(self) -> None:
        self.closed = True


def test_host_memory_keeps_the_latest_and_only_of_the_same_files() -> None:
    kept: HostWeights[Model] = HostWeights(100)
    models = [Model() for _ in range(3)]
    for name, model in zip("abc", models, strict=True):
        kept.keep(name, Kept(model, 40, stamp=1))
    assert [model.closed for model in models] == [True, False, False]
    assert kept.take("b", 2) is None, "its files have changed"
    assert kept.take("c", 1) is models[2]
    assert kept.bytes_used == 0

"""A real daemon in this process, over real gRPC, through the site's own client."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import grpc
import pytest
from tokenizers import pre_tokenizers

from apps.core.types import FinishReason, InferenceRequest, SamplingParams, StepOutput
from apps.fleet.daemon_client import DaemonClient, DaemonError
from gpu_daemon.__main__ import serve
from gpu_daemon.config import DaemonConfig
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from tests.gpu_daemon.conftest import make_tiny, make_tokenizer
from tests.hostile_schemas import REFUSED
from tests.services import free_port

TOKEN = "t" * 32


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_tiny(folder / "tiny", "llama")
    make_tokenizer(folder / "tiny")
    return folder


@asynccontextmanager
async def daemon(models, **options) -> AsyncIterator[tuple[DaemonClient, asyncio.Event]]:
    defaults = {"max_model_len": 512, "threads": 1, "preload": ("tiny",), "drain_seconds": 0.2}
    config = DaemonConfig("w", "127.0.0.1", free_port(), models, TOKEN, **{**defaults, **options})
    stop = asyncio.Event()
    task = asyncio.create_task(serve(config, stop))
    client = DaemonClient(f"127.0.0.1:{config.port}", TOKEN)
    client.address = f"127.0.0.1:{config.port}"
    try:
        yield client, stop
    finally:
        stop.set()
        await client.close()
        await asyncio.wait_for(task, 20)


async def ready(client: DaemonClient) -> None:
    async for _ in client.load_model("tiny", 1):
        pass


def request(request_id: str = "r", *, max_tokens: int = 5, prompt=(5, 6, 7), **sampling) -> InferenceRequest:
    params = SamplingParams(max_tokens=max_tokens, seed=1, temperature=0.0, ignore_eos=True, **sampling)
    return InferenceRequest(request_id, "1", "1", "tiny", (tuple(prompt),), params)


async def submit(stream, what: InferenceRequest, *, epoch: int = 1, generated=()) -> None:
    await stream.submit(what, attempt=1, epoch=epoch, done={0: (list(generated), 0)}, timeout_ms=0, cache_salt=b"s")


async def collect(stream, ends: int = 1) -> dict[str, list]:
    found: dict[str, list] = {}
    steps: AsyncIterator[StepOutput] = aiter(stream)
    while ends:
        for delta in (await asyncio.wait_for(anext(steps), 10)).deltas:
            found.setdefault(delta.request_id, []).append(delta)
            ends -= delta.finish_reason is not None
    return found


async def test_tokens_come_once_a_step_in_order_and_end(models) -> None:
    async with daemon(models) as (client, _):
        await ready(client)
        async with client.execute() as stream:
            await submit(stream, request("a"))
            await submit(stream, request("b", max_tokens=3))
            found = await collect(stream, ends=2)
    assert [delta.first_index for delta in found["a"]] == [0, 1, 2, 3, 4]
    assert found["a"][-1].finish_reason is FinishReason.LENGTH
    tokens = [[t for d in found[name] for t in d.token_ids] for name in ("a", "b")]
    assert tokens[0][:3] == tokens[1]


async def test_a_resumed_request_goes_on_where_it_was(models) -> None:
    async with daemon(models) as (client, _):
        await ready(client)
        async with client.execute() as stream:
            await submit(stream, request("whole", max_tokens=8))
            whole = [t for d in (await collect(stream))["whole"] for t in d.token_ids]
            await submit(stream, request("rest", max_tokens=8), generated=whole[:3])
            rest = (await collect(stream))["rest"]
    assert rest[0].first_index == 3
    assert [t for d in rest for t in d.token_ids] == whole[3:]


async def test_strangers_are_refused_on_every_call(models) -> None:
    async with daemon(models) as (client, _):
        stranger = DaemonClient(client.address, "wrong" * 8)
        with pytest.raises(DaemonError, match="unauthenticated"):
            await anext(aiter(stranger.watch_status(100)))
        with pytest.raises(DaemonError, match="unauthenticated"):
            await stranger.drain(1, 0)
        with pytest.raises(DaemonError, match="unauthenticated"):
            async with stranger.execute() as stream:
                await collect(stream)
        await stranger.close()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"prompt": (9999,)}, "invalid_command"),
        ({"prompt": ()}, "invalid_command"),
        ({"max_tokens": 600}, "invalid_command"),
        ({"top_p": float("nan")}, "invalid_command"),
        ({"logit_bias": ((9999, 1.0),)}, "invalid_command"),
    ],
)
async def test_a_bad_submit_fails_alone(models, change: dict, error: str) -> None:
    async with daemon(models) as (client, _):
        await ready(client)
        async with client.execute() as stream:
            await submit(stream, request("bad", **change))
            await submit(stream, request("good"))
            found = await collect(stream, ends=2)
    assert (found["bad"][0].finish_reason, found["bad"][0].error) == (FinishReason.FAILED, error)
    assert found["good"][-1].finish_reason is FinishReason.LENGTH


def token_ids(deltas: list) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


async def test_a_grammar_is_kept_to_its_end_and_when_resumed(models) -> None:
    letters = {2 + sorted(pre_tokenizers.ByteLevel.alphabet()).index(letter) for letter in "abcd"}
    async with daemon(models) as (client, _):
        await ready(client)
        async with client.execute() as stream:
            await submit(stream, request("whole", max_tokens=50, grammar="start: /[abcd]{9}/"))
            await submit(stream, request("cut", max_tokens=4, grammar="start: /[abcd]{9}/"))
            found = await collect(stream, ends=2)
            whole = token_ids(found["whole"])
            await submit(stream, request("rest", max_tokens=50, grammar="start: /[abcd]{9}/"), generated=whole[:5])
            rest = (await collect(stream))["rest"]
    assert len(whole) == 9
    assert set(whole) <= letters
    assert found["whole"][-1].finish_reason is FinishReason.STOP
    assert found["cut"][-1].finish_reason is FinishReason.LENGTH
    assert token_ids(rest) == whole[5:]


@pytest.mark.parametrize(
    "grammar", ["nonsense", "start: missing", 'start: %json {"$ref": "file:///etc/passwd"}', "x" * 300_000]
)
async def test_a_grammar_that_is_none_fails_alone(models, grammar: str) -> None:
    async with daemon(models) as (client, _):
        await ready(client)
        async with client.execute() as stream:
            await submit(stream, request("bad", grammar=grammar))
            await submit(stream, request("good"))
            found = await collect(stream, ends=2)
    assert found["bad"][-1].error == "invalid_grammar"
    assert found["good"][-1].finish_reason is FinishReason.LENGTH


async def test_a_grammar_that_takes_long_holds_nobody_up_and_can_be_aborted(models) -> None:
    slow = f"start: %json {json.dumps(REFUSED['sixteen patterns at once'])}"
    async with daemon(models) as (client, _):
        await ready(client)
        async with client.execute() as stream:
            await submit(stream, request("slow", grammar=slow))
            await submit(stream, request("aborted", grammar=slow))
            await stream.abort("aborted", 1)
            await submit(stream, request("good", max_tokens=20))
            ended: list[str] = []
            async for step in stream:
                ended += [delta.request_id for delta in step.deltas if delta.finish_reason]
                if "slow" in ended:
                    break
    assert ended == ["good", "slow"]


async def test_a_grammar_needs_a_tokenizer(models, tmp_path) -> None:
    make_tiny(tmp_path / "tiny", "llama")
    async with daemon(tmp_path) as (client, _):
        await ready(client)
        async with client.execute() as stream:
            await submit(stream, request("bound", grammar='start: "a"'))
            assert (await collect(stream))["bound"][0].error == "invalid_grammar"
            await submit(stream, request("free"))
            assert (await collect(stream))["free"][-1].finish_reason is FinishReason.LENGTH


async def test_unknown_models_epochs_and_names(models) -> None:
    async with daemon(models) as (client, _):
        await ready(client)
        async with client.execute() as stream:
            await submit(stream, dataclasses.replace(request("a"), model="other"))
            assert (await collect(stream))["a"][0].error == "model_not_ready"
            await submit(stream, request("b"), epoch=7)
            assert (await collect(stream))["b"][0].error == "stale_epoch"
        for name, epoch, why in (
            ("../etc", 1, "invalid_argument"),
            ("missing", 1, "failed_precondition"),
            ("tiny", 9, "failed_precondition"),
        ):
            with pytest.raises(DaemonError, match=why):
                async for _ in client.load_model(name, epoch):
                    pass


async def test_the_static_engine_answers_as_the_continuous_one(models) -> None:
    """Over the wire: a grammar, logprobs, a resumed request and a refused one, in one batch."""
    asked = [
        request("plain", max_tokens=9),
        request("bound", max_tokens=50, grammar="start: /[abcd]{9}/"),
        request("told", top_logprobs=2),
    ]

    async def answers(client: DaemonClient) -> dict[str, list]:
        async with client.execute() as stream:
            for what in asked:
                await submit(stream, what)
            await submit(stream, request("resumed", max_tokens=9), generated=[7, 8])
            await submit(stream, request("bad", prompt=(9999,)))
            found = await collect(stream, ends=5)
        told = [(entry.token_id, round(entry.logprob, 3)) for delta in found.pop("told") for entry in delta.logprobs]
        ends = {name: (deltas[-1].finish_reason, deltas[-1].error) for name, deltas in found.items()}
        return {"told": told, "ends": ends, **{name: token_ids(deltas) for name, deltas in found.items()}}

    async with daemon(models) as (client, _):
        await ready(client)
        expected = await answers(client)
        with pytest.raises(DaemonError, match="failed_precondition: tiny is ready under the continuous engine"):
            async for _ in client.load_model("tiny", 1, "static"):
                pass
        await client.unload_model("tiny", 1, 1000)
        async for _ in client.load_model("tiny", 1, "static"):
            pass
        async with aclosing(client.watch_status(50)) as status:
            resident = (await anext(status)).models[0]
        assert (resident.engine, resident.state, resident.max_model_len) == ("static", "ready", 512)
        assert resident.kv_blocks_total == resident.kv_blocks_free > 512
        assert await answers(client) == expected


async def test_an_abort_and_a_broken_stream_free_the_engine(models) -> None:
    async with daemon(models) as (client, _):
        await ready(client)
        status = client.watch_status(50)

        async def running() -> int:
            return (await anext(status)).models[0].running

        async with client.execute() as stream:
            await submit(stream, request("long", max_tokens=400))
            await submit(stream, request("other", max_tokens=400))
            while await running() < 2:
                pass
            await stream.abort("long", 1)
            found = await collect(stream)
            assert found["long"][-1].finish_reason is FinishReason.CANCELLED
        while await running():
            pass
        await status.aclose()


async def test_draining_refuses_new_work_and_ends(models) -> None:
    async with daemon(models) as (client, stop):
        await ready(client)
        assert await client.drain(1, 1000)
        async with client.execute() as stream:
            await submit(stream, request("late"))
            assert (await collect(stream))["late"][0].error == "draining"
        stop.set()


async def test_garbage_on_the_wire_harms_nobody(models) -> None:
    async with daemon(models) as (client, _):
        await ready(client)
        async with grpc.aio.insecure_channel(client.address) as channel:
            call = channel.unary_unary("/inference.v1.GpuDaemon/Drain", request_serializer=bytes, response_deserializer=bytes)
            with pytest.raises(grpc.aio.AioRpcError):
                await call(b"\xff\xff\xff", metadata=(("authorization", f"Bearer {TOKEN}"),))
            stub = pb_grpc.GpuDaemonStub(channel)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.UnloadModel(
                    pb.UnloadModelRequest(model="x", epoch=1), metadata=(("authorization", f"Bearer {TOKEN}"),)
                )
        async with client.execute() as stream:
            await submit(stream, request("good"))
            assert (await collect(stream))["good"]

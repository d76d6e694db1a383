"""The site's end of the wire against a daemon that can be made to lie, hang and die."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator

import pytest

from apps.core.types import FinishReason, InferenceRequest, SamplingParams, SequenceDelta
from apps.fleet import daemon_client
from apps.fleet.daemon_client import DaemonClient, DaemonError, ExecuteStream
from protos import inference_pb2 as pb
from tests.apps.fleet.fake_daemon import FakeDaemon, tokens


@pytest.fixture
async def daemon() -> AsyncIterator[FakeDaemon]:
    async with FakeDaemon() as running:
        yield running


@pytest.fixture
async def client(daemon: FakeDaemon) -> AsyncIterator[DaemonClient]:
    connected = DaemonClient(daemon.address, daemon.token)
    yield connected
    await connected.close()


def request(request_id: str = "r", *, max_tokens: int = 4, n: int = 1, **sampling) -> InferenceRequest:
    params = SamplingParams(max_tokens=max_tokens, seed=3, **sampling)
    return InferenceRequest(request_id, "1", "1", "smollm2-135m", ((1, 2, 3),), params, n=n)


async def submit(stream: ExecuteStream, what: InferenceRequest, generated: dict[int, list[int]] | None = None) -> None:
    done = {choice: ((generated or {}).get(choice, []), 0) for choice in range(what.num_choices)}
    await stream.submit(what, attempt=1, epoch=1, done=done, timeout_ms=0, cache_salt=b"")


async def deltas(stream: ExecuteStream, ends: int) -> list[SequenceDelta]:
    found: list[SequenceDelta] = []
    async with asyncio.timeout(10):
        async for step in stream:
            found += step.deltas
            if sum(delta.finish_reason is not None for delta in found) == ends:
                return found
    raise AssertionError("the stream ended before its requests")


async def test_every_choice_gets_its_tokens_one_step_at_a_time(client: DaemonClient) -> None:
    async with client.execute() as stream:
        await submit(stream, request(n=2))
        found = await deltas(stream, ends=2)
    for choice in (0, 1):
        mine = [delta for delta in found if delta.choice == choice]
        assert [delta.first_index for delta in mine] == [0, 1, 2, 3]
        assert [token for delta in mine for token in delta.token_ids] == tokens(3, 3, 4, choice)
        assert mine[-1].finish_reason is FinishReason.LENGTH


async def test_a_resumed_choice_goes_on_at_its_index(client: DaemonClient) -> None:
    async with client.execute() as stream:
        await submit(stream, request(), {0: tokens(3, 3, 2)})
        found = await deltas(stream, ends=1)
    assert found[0].first_index == 2
    assert [token for delta in found for token in delta.token_ids] == tokens(3, 3, 4)[2:]


async def test_an_abort_ends_one_request_and_no_other(daemon: FakeDaemon, client: DaemonClient) -> None:
    daemon.stick()
    async with client.execute() as stream:
        await submit(stream, request("gone", max_tokens=1000))
        await submit(stream, request("kept"))
        await stream.abort("gone", 1)
        (cancelled,) = await deltas(stream, ends=1)
        daemon.thaw()
        kept = await deltas(stream, ends=1)
    assert (cancelled.request_id, cancelled.finish_reason) == ("gone", FinishReason.CANCELLED)
    assert {delta.request_id for delta in kept} == {"kept"}


async def test_commands_written_at_the_same_time_all_arrive(client: DaemonClient) -> None:
    async with client.execute() as stream:
        await asyncio.gather(*(submit(stream, request(f"r{number}", max_tokens=1)) for number in range(100)))
        found = await deltas(stream, ends=100)
    assert {delta.request_id for delta in found} == {f"r{number}" for number in range(100)}


async def test_logprobs_come_with_their_alternatives(client: DaemonClient) -> None:
    async with client.execute() as stream:
        await submit(stream, request(max_tokens=1, top_logprobs=2))
        (delta,) = await deltas(stream, ends=1)
    (entry,) = delta.logprobs
    assert entry.token_id == delta.token_ids[0]
    assert [logprob for _, logprob in entry.top] == [-0.5, -1.5]


async def test_a_daemon_that_dies_breaks_the_stream_after_what_it_said() -> None:
    async with FakeDaemon(die_at_step=3) as daemon:
        client = DaemonClient(daemon.address, daemon.token)
        async with client.execute() as stream:
            await submit(stream, request(max_tokens=100))
            with pytest.raises(DaemonError):
                await deltas(stream, ends=1)
            await stream.abort("r", 1)  # the writer of a broken stream has nothing to add
        await client.close()


async def test_nobody_listening_is_said_within_the_time_to_connect(monkeypatch) -> None:
    monkeypatch.setattr(daemon_client, "CONNECT_SECONDS", 0.2)
    client = DaemonClient("127.0.0.1:1", "t")
    with pytest.raises(DaemonError, match="does not answer"):
        async with client.execute():
            pass
    await client.close()


async def test_a_frozen_daemon_falls_silent(daemon: FakeDaemon, client: DaemonClient, monkeypatch) -> None:
    monkeypatch.setattr(daemon_client, "SILENCE_SECONDS", 0.2)
    statuses = client.watch_status(20)
    assert (await anext(statuses)).worker_id == "w1"
    daemon.freeze()
    with pytest.raises(DaemonError) as caught:
        _ = [status async for status in statuses]
    assert caught.value.code == "silent"


LIES = {
    "an id of no vocabulary": pb.SequenceDelta(request_id="r", attempt=1, token_ids=[2**32 - 1]),
    "a logprob too many": pb.SequenceDelta(request_id="r", attempt=1, token_ids=[1], logprobs=[pb.TokenLogprob()] * 2),
    "an end nobody knows": pb.SequenceDelta(request_id="r", attempt=1, finish_reason=99),  # type: ignore[arg-type]
    "a request id as long as a page": pb.SequenceDelta(request_id="r" * 1000, attempt=1),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
async def test_nonsense_ends_the_stream_and_reaches_nobody(daemon, client, lie: pb.SequenceDelta) -> None:
    daemon.stick()
    async with client.execute() as stream:
        await submit(stream, request())
        statuses = client.watch_status(10)
        while not (await anext(statuses)).models[0].running:
            pass
        daemon.say(lie)
        with pytest.raises(DaemonError) as caught:
            await deltas(stream, ends=1)
        await statuses.aclose()
    assert caught.value.code == "nonsense"


async def test_numbers_that_are_none_are_made_finite(daemon: FakeDaemon, client: DaemonClient) -> None:
    entry = pb.TokenLogprob(token_id=1, logprob=-math.inf, top=[pb.TokenAlternative(token_id=2, logprob=math.nan)])
    daemon.stick()
    async with client.execute() as stream:
        await submit(stream, request())
        statuses = client.watch_status(10)
        while not (await anext(statuses)).models[0].running:
            pass
        daemon.say(pb.SequenceDelta(request_id="r", attempt=1, token_ids=[1], logprobs=[entry], finish_reason=1))
        (delta,) = await deltas(stream, ends=1)
        await statuses.aclose()
    assert delta.logprobs[0].logprob == -9999.0
    assert delta.logprobs[0].top == ((2, -9999.0),)


async def test_a_status_of_strange_numbers_and_names_is_tamed(daemon: FakeDaemon, client: DaemonClient, monkeypatch) -> None:
    status = pb.DaemonStatus(worker_id="w1", device="\x00" * 50 + "d" * 500)
    status.models.add(model="m", progress=math.nan, prefill_ms_per_token=math.inf, decode_ms_per_token=-1, error="\x00no")
    monkeypatch.setattr(daemon, "status", lambda: status)
    statuses = client.watch_status(100)
    snapshot = await anext(statuses)
    await statuses.aclose()
    (model,) = snapshot.models
    assert (model.progress, model.prefill_ms_per_token, model.decode_ms_per_token, model.error) == (0.0, 0.0, 0.0, "no")
    assert model.state == "failed"
    assert snapshot.device == "d" * 20


async def test_a_model_is_loaded_with_progress_and_unloaded(daemon: FakeDaemon, client: DaemonClient) -> None:
    assert [stage async for stage, _ in client.load_model("other", 1)] == ["reading", "ready"]
    assert daemon.models == ["smollm2-135m", "other"]
    await client.unload_model("other", 1, 0)
    assert daemon.models == ["smollm2-135m"]
    assert await client.drain(1, 0)


async def test_a_load_that_fails_says_why(daemon: FakeDaemon, client: DaemonClient) -> None:
    daemon.load_errors["big"] = "out of memory"
    with pytest.raises(DaemonError, match="out of memory"):
        async for _ in client.load_model("big", 1):
            pass


async def test_the_wrong_token_is_refused(daemon: FakeDaemon) -> None:
    stranger = DaemonClient(daemon.address, "wrong")
    with pytest.raises(DaemonError) as caught:
        await anext(stranger.watch_status(100))
    assert caught.value.code == "unauthenticated"
    await stranger.close()

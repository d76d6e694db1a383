"""The event log as a file, replayed and simulated by the commands people run."""

from __future__ import annotations

import asyncio
import json
from io import StringIO
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command
from redis.asyncio import Redis

from apps.core.types import Outcome
from apps.scheduler import log, queue
from apps.scheduler.replay import BrokenLog, Replay
from tests.apps.scheduler.factories import make_cost, make_request


async def some_traffic(redis: Redis, count: int = 30) -> None:
    for number in range(count):
        await queue.enqueue(redis, make_request(org_id="ab"[number % 3 == 0]), make_cost(0.1 * number + 1), pace=1)
        if number % 2:
            for lease in await queue.lease(redis, lane="m", worker="w", max_sequences=8, limit=1):
                if number % 4 == 1:
                    await queue.finish(redis, lease.request.id, Outcome.SUCCEEDED, attempt=lease.attempt)
                else:
                    await queue.requeue(redis, [(lease.request.id, lease.attempt)], blame=False)


async def exported(redis: Redis, path: Path, work) -> list[dict[str, str]]:
    """What the exporter wrote while `work` ran."""
    path.touch()  # noqa: ASYNC240
    stop = asyncio.Event()
    exporter = asyncio.create_task(log.export(redis, path, stop))
    try:
        async with asyncio.timeout(10):
            await asyncio.sleep(0.1)
            await work()
            last = (await redis.xrevrange("log", count=1))[0][1]["n"]
            while not (lines := list(log.read(path))) or lines[-1]["n"] != last:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    finally:
        stop.set()
        await exporter
    return lines


def command(*arguments: str) -> str:
    out = StringIO()
    call_command(*arguments, stdout=out)
    return out.getvalue()


async def test_a_log_that_begins_in_the_middle_replays_from_its_checkpoint(redis: Redis, tmp_path: Path) -> None:
    await some_traffic(redis)
    path = tmp_path / "log.jsonl"
    entries = await exported(redis, path, lambda: some_traffic(redis))
    assert entries[0]["op"] == "checkpoint"
    assert int(entries[0]["n"]) > 1
    await queue.checkpoint(redis)
    entries += [fields for _, fields in await redis.xrevrange("log", count=1)]
    assert Replay().run(entries).differences == [], "also the checkpoint at the end must be found equal"
    assert f"{len(entries) - 1} decisions identical" in await asyncio.to_thread(command, "replay", str(path))


async def test_a_flush_begins_the_state_anew(redis: Redis, tmp_path: Path) -> None:
    async def flushed() -> None:
        await some_traffic(redis)
        await asyncio.sleep(0.1)
        await redis.flushdb()
        await some_traffic(redis)

    report = Replay().run(await exported(redis, tmp_path / "log.jsonl", flushed))
    assert (report.flushes, report.differences) == (1, [])


async def test_a_decision_that_was_tampered_with_shows(redis: Redis) -> None:
    await some_traffic(redis)
    entries = [dict(fields) for _, fields in await redis.xrange("log")]
    leased = next(entry for entry in entries if entry["op"] == "lease")
    leased["leased"] = "somebody 1"
    assert [difference.op for difference in Replay().run(entries).differences][:1] == ["lease"]


async def test_a_log_with_a_hole_is_refused(redis: Redis) -> None:
    await some_traffic(redis)
    entries = [fields for _, fields in await redis.xrange("log")]
    with pytest.raises(BrokenLog, match="missing"):
        Replay().run(entries[:5] + entries[6:])


def test_a_line_that_is_no_entry_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"n": "1", "op": "lease"}\nnonsense\n')
    with pytest.raises(CommandError, match="entry 1"):
        command("replay", str(path))


def trace(path: Path) -> Path:
    rows = [{"at_ms": 10 * i, "org": "ab"[i % 2], "prompt_ms": 15, "token_ms": 0.5, "tokens": 10} for i in range(400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_simulate_shows_what_a_weight_would_do(tmp_path: Path) -> None:
    shown = command("simulate", str(trace(tmp_path / "trace.jsonl")), "--policy", "weight.a=4")
    waits = {line.split("│")[1].strip(): line for line in shown.splitlines() if line.startswith("│")}
    assert "(-" in waits["a"]
    assert "(+" in waits["b"]
    assert "█" in shown


def test_simulate_shows_what_caps_and_workers_would_do(tmp_path: Path) -> None:
    path = str(trace(tmp_path / "trace.jsonl"))
    assert "0 → " in command("simulate", path, "--policy", "org_cap=5"), "the cap refuses"
    assert "→ 0 ms" in command("simulate", path, "--policy", "workers=4"), "nobody waits"


@pytest.mark.parametrize("setting", ["colour=blue", "weight.a=0", "flex.max_wait_ms=soon", "workers=-1"])
def test_simulate_refuses_what_is_no_policy(tmp_path: Path, setting: str) -> None:
    with pytest.raises(CommandError):
        command("simulate", str(trace(tmp_path / "trace.jsonl")), "--policy", setting)


async def test_a_recorded_log_is_a_trace(redis: Redis, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    await exported(redis, path, lambda: some_traffic(redis))
    shown = await asyncio.to_thread(command, "simulate", str(path), "--policy", "workers=2")
    assert " a " in shown
    assert " b " in shown

"""The collector, the router, prices and refusals."""

from __future__ import annotations

import pytest

from apps.core.types import ResidentModel, WorkerSnapshot
from apps.scheduler.admission import absence_refusal, queue_refusal, retry_after_seconds
from apps.scheduler.collector import BatchCollector
from apps.scheduler.cost import price, reported
from apps.scheduler.router import candidates
from tests.apps.scheduler.factories import make_request


def worker(name: str, *, state: str = "ready", decode_ms: float = 1.0, draining: bool = False) -> WorkerSnapshot:
    model = ResidentModel("m", state, max_running=4, prefill_ms_per_token=2.0, decode_ms_per_token=decode_ms)
    return WorkerSnapshot(name, "a:1", 1, 0, "cpu", "individual", draining, 1, 1, (model,))


def test_the_least_loaded_worker_by_milliseconds_comes_first() -> None:
    workers = [
        worker("slow", decode_ms=10),
        worker("fast"),
        worker("full"),
        worker("gone", draining=True),
        worker("cold", state="loading"),
    ]
    found = candidates("m", workers, {"slow": 1, "fast": 3, "full": 4})
    assert [(c.worker.worker_id, c.free) for c in found] == [("fast", 1), ("slow", 3)]


def test_an_idle_worker_never_waits_for_the_window() -> None:
    collector = BatchCollector(window_ms=10)
    assert collector.hold_ms(0, waiting=1, free=8, idle=True) == 0


def test_a_busy_worker_s_window_gathers_and_ends() -> None:
    collector = BatchCollector(window_ms=10)
    assert collector.hold_ms(0, waiting=1, free=8, idle=False) == 10
    assert collector.hold_ms(6, waiting=2, free=8, idle=False) == 4
    assert collector.hold_ms(10, waiting=2, free=8, idle=False) == 0
    assert collector.hold_ms(11, waiting=8, free=8, idle=False) == 0, "a full batch goes at once"


def test_price_is_prefill_plus_what_is_expected_to_be_generated() -> None:
    residents = [w.models[0] for w in (worker("a"), worker("b", decode_ms=5))]
    cost = price(make_request(max_tokens=10, n=2), reported(residents))
    assert cost.expected_ms == 3 * 2.0 + 2 * 10 * 1.0


@pytest.mark.parametrize(("drain_ms", "low", "high"), [(0, 1, 1), (10_000, 8, 12), (10**9, 60, 60)])
def test_retry_after_follows_the_drain_within_what_clients_honour(drain_ms: float, low: float, high: float) -> None:
    assert [retry_after_seconds(drain_ms, jitter) for jitter in (0.0, 1.0)] == pytest.approx([low, high])


def test_refusals_name_the_model_and_what_to_do() -> None:
    assert queue_refusal("lane_full", "m", 3000, 0.5).code == "queue_full"
    missing = absence_refusal("no_weights", "m")
    assert "models pull m" in missing.message
    assert missing.should_retry is False

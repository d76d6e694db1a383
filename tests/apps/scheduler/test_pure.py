"""The collector, the router, prices and refusals."""

from __future__ import annotations

import pytest

from apps.core.types import ResidentModel, WorkerSnapshot
from apps.scheduler.admission import absence_refusal, queue_refusal, retry_after_seconds
from apps.scheduler.affinity import DEPTHS, beginnings, tokens_of
from apps.scheduler.collector import BatchCollector, LaneView
from apps.scheduler.cost import price, reported
from apps.scheduler.router import Candidate, Waiting, assign, candidates, cause_of_waiting, runs
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


def view(waiting: int = 1, *, waiting_ms: float = 1.0, free: int = 8, busy: int = 8, idle: bool = False) -> LaneView:
    return LaneView(waiting, waiting_ms, free, busy, idle)


def test_an_idle_worker_never_waits_for_the_window() -> None:
    assert BatchCollector(20, 100).hold_ms(0, view(idle=True, busy=0)) == 0
    assert BatchCollector(20, 100).hold_ms(0, view(idle=True)) == 0, "one of several is idle"


def test_a_busy_worker_s_window_gathers_and_ends() -> None:
    collector = BatchCollector(20, 100)
    assert collector.hold_ms(0, view()) == 10, "half of the sequences are taken: half of the window"
    assert collector.hold_ms(3, view(2)) == 7
    assert collector.hold_ms(10, view(2)) == 0
    assert collector.hold_ms(11, view(8)) == 0, "a full batch goes at once"


@pytest.mark.parametrize(("busy", "held"), [(1, 20 / 9), (8, 10), (24, 15)])
def test_the_window_grows_with_the_load(busy: int, held: float) -> None:
    assert BatchCollector(20, 100).hold_ms(0, view(busy=busy)) == pytest.approx(held)


def test_enough_work_closes_the_window_and_more_is_enough_at_a_higher_load() -> None:
    assert BatchCollector(20, 100).hold_ms(0, view(waiting_ms=60)) == 0
    assert BatchCollector(20, 100).hold_ms(0, view(waiting_ms=60, busy=24)) > 0


def test_nothing_is_waited_for_that_is_not_likely_to_come() -> None:
    collector = BatchCollector(20, 100)
    for now in range(0, 5_000, 500):
        collector.hold_ms(now, view(1))
        collector.hold_ms(now + 1, view(0))
    assert collector.hold_ms(5_000, view(1)) == 0


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


def candidate(name: str, busy: int = 0, *, most: int = 16) -> Candidate:
    return Candidate(worker(name), busy, most, decode_ms=1.0, prefill_ms=2.0)


def test_a_conversation_stays_where_its_prompt_is_until_that_worker_is_much_busier() -> None:
    request = Waiting("r", 1, prompt_tokens=100, tokens=50, cached={"b": 80})
    assert assign([request], [candidate("a"), candidate("b")])[0].worker_id == "b"
    assert assign([request], [candidate("a"), candidate("b", 7)])[0].worker_id == "b"
    assert assign([request], [candidate("a"), candidate("b", 8)])[0].worker_id == "a", "a hot worker sheds"
    little = Waiting("r", 1, prompt_tokens=100, tokens=50, cached={"b": 16})
    assert assign([little], [candidate("a"), candidate("b", 1)])[0].worker_id == "a", "a shared system prompt binds nobody"


def test_requests_without_a_home_are_spread_and_nothing_overtakes_the_head() -> None:
    waiting = [Waiting(f"r{i}", 1, 10, 10) for i in range(4)]
    chosen = assign(waiting, [candidate("a"), candidate("b", 1)])
    assert [choice.worker_id for choice in chosen] == ["a", "a", "b", "a"]
    assert [len(run) for run in runs(chosen)] == [2, 1, 1]
    assert set(chosen[0].scores) == {"a", "b"}
    wide = [Waiting("wide", 4, 10, 10), Waiting("narrow", 1, 10, 10)]
    assert assign(wide, [candidate("a", 2, most=4)]) == []
    assert len(assign(wide, [candidate("a", 0, most=2)])) == 1, "an idle worker takes a request of any size"


def test_beginnings_are_a_chain_of_one_model_and_organization() -> None:
    prompt = list(range(200))
    known = beginnings("m", "1", prompt)
    assert len(known) == sum(depth * 16 <= 200 for depth in DEPTHS)
    assert beginnings("m", "1", [*prompt[:128], 7, *prompt[129:]])[:4] == known[:4], "alike up to where they differ"
    assert beginnings("m", "1", [7, *prompt[1:]])[-1] != known[-1]
    assert not set(known) & set(beginnings("m", "2", prompt))
    assert not set(known) & set(beginnings("k", "1", prompt))
    assert (tokens_of(0), tokens_of(3)) == (0, 64)


def test_a_lane_waits_for_a_load_when_somebody_would_load_it() -> None:
    idle = WorkerSnapshot("w", "a:1", 1, 0, "cpu", "individual", False, 1, 1, loadable=("m",))
    assert cause_of_waiting("m", [idle], held_back=False) == "model_load"
    assert cause_of_waiting("k", [idle], held_back=False) == "no_worker"
    assert cause_of_waiting("m", [worker("x", state="unloading")], held_back=False) == "model_load"

"""The engine of tasks, with a runner that counts; and whose turn it is on a shared device."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue

import pytest

from gpu_daemon.engine.sequence import Delta, FinishReason
from gpu_daemon.engine.task import Progress, SpeechWork, Task
from gpu_daemon.engine.task_engine import TaskEngine
from gpu_daemon.engine.turns import DeviceTurns


class Counting:
    """Ten units a step."""

    max_tasks = 2
    weight_bytes = 1
    input_ms_per_unit = output_ms_per_unit = 0.0
    voices = ("one",)

    def __init__(self) -> None:
        self.dropped: list[Task] = []
        self.steps: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def check(self, work: object) -> None:
        return

    def step(self, tasks: list[Task]) -> list[Progress]:
        self.gate.wait(5)
        self.steps.append([task.request_id for task in tasks])
        if self.error is not None:
            raise self.error
        return [self._progress(task) for task in tasks]

    def _progress(self, task: Task) -> Progress:
        units = min(10, task.units - task.done)
        finished = task.done + units == task.units
        return Progress(task, units, b"sound", "audio/pcm", finished=finished)

    def drop(self, task: Task) -> None:
        self.dropped.append(task)

    def stress(self) -> None:
        pass

    def warm(self) -> None:
        return

    def close(self) -> None:
        return


def make_task(request_id: str, units: int, **fields: object) -> Task:
    return Task(1, request_id, 1, 0, SpeechWork("x" * units, "one"), units, **fields)


@pytest.fixture
def runner() -> Counting:
    return Counting()


@pytest.fixture
def deltas() -> SimpleQueue[Delta]:
    return SimpleQueue()


@pytest.fixture
def engine(runner: Counting, deltas: SimpleQueue[Delta]) -> Iterator[TaskEngine]:
    made = TaskEngine("speech", runner, lambda _, told: [deltas.put(delta) for delta in told])
    yield made
    runner.gate.set()
    made.stop()


def until_end(deltas: SimpleQueue[Delta], ends: int) -> list[Delta]:
    found: list[Delta] = []
    while sum(delta.finish_reason is not None for delta in found) < ends:
        found.append(deltas.get(timeout=5))
    return found


def test_a_task_is_told_step_by_step_and_counts_its_units(engine: TaskEngine, deltas: SimpleQueue[Delta]) -> None:
    engine.submit([make_task("a", 25)])
    told = until_end(deltas, 1)
    assert [(delta.first_index, delta.units) for delta in told] == [(0, 10), (10, 10), (20, 5)]
    assert told[-1].finish_reason is FinishReason.STOP
    assert {delta.mime for delta in told} == {"audio/pcm"}


def test_a_task_goes_on_from_what_an_earlier_attempt_told(engine: TaskEngine, deltas: SimpleQueue[Delta]) -> None:
    engine.submit([make_task("a", 25, done=10)])
    assert [(delta.first_index, delta.units) for delta in until_end(deltas, 1)] == [(10, 10), (20, 5)]


def test_no_more_run_at_once_than_the_device_takes_and_the_next_joins_in_mid_work(
    engine: TaskEngine, deltas: SimpleQueue[Delta], runner: Counting
) -> None:
    engine.submit([make_task("a", 10), make_task("b", 30), make_task("c", 20)])
    until_end(deltas, 3)
    assert runner.steps == [["a", "b"], ["b", "c"], ["b", "c"]]


def test_an_abort_ends_a_task_before_its_next_step(engine: TaskEngine, deltas: SimpleQueue[Delta], runner: Counting) -> None:
    runner.gate.clear()
    engine.submit([make_task("a", 1000)])
    while not engine.load.waiting and not engine._scheduler.running:
        time.sleep(0.001)
    engine.abort("a", 1)
    runner.gate.set()
    told = until_end(deltas, 1)
    assert told[-1].finish_reason is FinishReason.CANCELLED
    assert len(runner.steps) == 1
    assert [task.request_id for task in runner.dropped] == ["a"]


def test_a_deadline_ends_a_task(engine: TaskEngine, deltas: SimpleQueue[Delta]) -> None:
    engine.submit([make_task("late", 1000, deadline=time.monotonic())])
    assert until_end(deltas, 1)[-1].finish_reason is FinishReason.EXPIRED


def test_a_step_that_dies_fails_its_tasks_and_no_others(
    engine: TaskEngine, deltas: SimpleQueue[Delta], runner: Counting
) -> None:
    runner.error = MemoryError()
    engine.submit([make_task("a", 10)])
    (failed,) = until_end(deltas, 1)
    assert (failed.finish_reason, failed.error) == (FinishReason.FAILED, "out_of_memory")
    runner.error = None
    engine.submit([make_task("b", 10)])
    assert until_end(deltas, 1)[-1].finish_reason is FinishReason.STOP
    with pytest.raises(Empty):
        deltas.get(timeout=0.05)


def test_who_comes_to_a_busy_device_waits_for_one_step_and_then_has_as_much_time_as_the_other() -> None:
    turns, order, stop = DeviceTurns(), [], threading.Event()

    def work(name: str, seconds: float) -> None:
        while not stop.is_set():
            with turns.turn(name):
                order.append(name)
                time.sleep(seconds)

    slow = threading.Thread(target=work, args=("video", 0.05))
    slow.start()
    time.sleep(0.12)
    before = len(order)
    fast = threading.Thread(target=work, args=("chat", 0.005))
    fast.start()
    time.sleep(0.6)
    stop.set()
    slow.join()
    fast.join()
    assert "chat" in order[before : before + 2], order
    chats = order[before:].count("chat")
    assert chats > 3 * order[before:].count("video"), order

"""The engine of what is no text: every step advances each running task, and who waits joins at the next one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Many
from contextlib import nullcontext

from gpu_daemon.engine.engine import IDLE_SECONDS, Deliver, EngineThread, Turn, smooth
from gpu_daemon.engine.sequence import Delta, FinishReason, Load
from gpu_daemon.engine.task import Progress, Task, TaskRunner


class TaskBook:
    """Tasks in order of arrival: the first `max_sequences` run."""

    def __init__(self, max_sequences: int) -> None:
        self.max_sequences = max_sequences
        self.running: list[Task] = []
        self.waiting: deque[Task] = deque()

    def admit(self) -> list[Task]:
        """Those that run now."""
        while self.waiting and len(self.running) < self.max_sequences:
            self.running.append(self.waiting.popleft())
        return list(self.running)

    def sequences(self) -> list[Task]:
        return [*self.running, *self.waiting]

    def remove(self, task: Task) -> None:
        """Ends a task, wherever it is."""
        (self.running if task in self.running else self.waiting).remove(task)


class TaskEngine(EngineThread[Task]):
    """An abort or a deadline ends a task before the next step: a denoising step, a piece of speech, a batch of embeddings."""

    _scheduler: TaskBook

    def __init__(self, name: str, runner: TaskRunner, deliver: Deliver, turn: Turn = nullcontext) -> None:
        self._runner = runner
        super().__init__(name, TaskBook(runner.max_tasks), deliver, Load(), turn)

    def _turn(self) -> None:
        idle = not self._scheduler.running and not self._scheduler.waiting
        self._read_inbox(IDLE_SECONDS if idle else 0.0)
        self._expire()
        tasks = self._scheduler.admit()
        self._report(self._run(tasks) if tasks else [])

    def _run(self, tasks: Many[Task]) -> list[Delta]:
        try:
            with self._turn_of_device():
                started = time.perf_counter()
                made = self._runner.step(tasks)
        except Exception as error:  # noqa: BLE001  Whatever a step dies of, only its tasks fail.
            self._fail(tasks, error)
            return []
        self._measure(made, (time.perf_counter() - started) * 1000)
        return [self._tell(progress) for progress in made]

    def _tell(self, progress: Progress) -> Delta:
        task, index = progress.task, progress.task.index
        task.done += progress.units
        if progress.finished:
            self._scheduler.remove(task)
        return Delta(
            caller=task.caller,
            request_id=task.request_id,
            attempt=task.attempt,
            choice=task.choice,
            first_index=index,
            token_ids=progress.token_ids,
            finish_reason=FinishReason.STOP if progress.finished else None,
            units=progress.units,
            media=progress.media,
            mime=progress.mime,
            preview=progress.preview,
        )

    def _end(self, sequence: Task, reason: FinishReason, error: str = "") -> None:
        super()._end(sequence, reason, error)
        self._runner.drop(sequence)

    def _measure(self, made: Many[Progress], took_ms: float) -> None:
        load = self.load
        load.step += 1
        if units := sum(progress.units for progress in made):
            load.decode_ms_per_token = smooth(load.decode_ms_per_token, took_ms / units)

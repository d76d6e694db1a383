"""Static batching, the classic way: gather requests for a window, then run one batch until its longest sequence is done.

Who arrives meanwhile waits for the next batch, and who is done early leaves a row that runs on empty. It is kept because
that difference is worth measuring; a model is switched to it by its `engine` in the catalogue.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from contextlib import nullcontext
from typing import Protocol

from gpu_daemon.engine.engine import IDLE_SECONDS, MEASURABLE_TOKENS, Deliver, TextEngine, Turn, smooth
from gpu_daemon.engine.sequence import Load, Sampled, Sequence

# Given the sequences that still go and the token each drew, in the same order: those that go on.
AfterStep = Callable[[list[Sequence], list[Sampled]], list[Sequence]]


class BatchRunner(Protocol):
    """Generates for a whole batch in one call, which ends when no sequence goes on."""

    eos_ids: frozenset[int]

    def generate(self, batch: Many[Sequence], after_step: AfterStep) -> None: ...


class Collector:
    """Who waits for the next batch, and who is in the one that runs. Pure: it is told the time.

    A batch begins when `max_sequences` wait, or `window_seconds` after the engine was free and somebody waited. Padded to
    its longest sequence it has at most `max_tokens` tokens, or is one sequence.
    """

    def __init__(self, window_seconds: float, max_sequences: int, max_tokens: int) -> None:
        self.window_seconds = window_seconds
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self._waiting_since = math.inf

    @property
    def free_tokens(self) -> int:
        """What is left of `max_tokens` beside the batch as padded."""
        longest = max(map(_final_length, self.running), default=0)
        return max(0, self.max_tokens - longest * len(self.running))

    def begins_in(self, now: float) -> float:
        """Seconds until the next batch may begin; infinity while nobody waits."""
        self._waiting_since = min(self._waiting_since, now) if self.waiting else math.inf
        if len(self.waiting) >= self.max_sequences:
            return 0.0
        return max(0.0, self._waiting_since + self.window_seconds - now)

    def begin(self) -> list[Sequence]:
        """Moves the next batch to the running, in order of arrival."""
        self._waiting_since = math.inf
        longest = 0
        while self.waiting and len(self.running) < self.max_sequences:
            longest = max(longest, _final_length(self.waiting[0]))
            if self.running and longest * (len(self.running) + 1) > self.max_tokens:
                break
            self.running.append(self.waiting.popleft())
        return list(self.running)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence, wherever it is."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)

    def sequences(self) -> list[Sequence]:
        return [*self.running, *self.waiting]


def _final_length(sequence: Sequence) -> int:
    return sequence.prompt_length + sequence.sampling.max_tokens


class StaticEngine(TextEngine):
    """One batch at a time. Tokens are told as they come; aborts and deadlines end a sequence before the next step."""

    _scheduler: Collector

    def __init__(
        self, name: str, runner: BatchRunner, collector: Collector, deliver: Deliver, turn: Turn = nullcontext
    ) -> None:
        self._runner = runner
        self._step_began = 0.0
        tokens = collector.max_tokens
        load = Load(tokens_total=tokens, tokens_free=tokens)
        super().__init__(name, runner.eos_ids, collector, deliver, load, turn)

    def _turn(self) -> None:
        self._read_inbox(min(IDLE_SECONDS, self._scheduler.begins_in(time.monotonic())))
        self._expire()
        if self._scheduler.begins_in(time.monotonic()) == 0:
            self._run(self._scheduler.begin())
        self.load.tokens_free = self._scheduler.free_tokens
        self._report([])

    def _run(self, batch: list[Sequence]) -> None:
        self._step_began = time.perf_counter()
        try:
            with self._turn_of_device():
                self._runner.generate(batch, self._after_step)
        except Exception as error:  # noqa: BLE001  Whatever a batch dies of, only its sequences fail.
            self._fail(list(self._scheduler.running), error)

    def _after_step(self, going: list[Sequence], sampled: list[Sampled]) -> list[Sequence]:
        """Ends what is to end, gives the others their token."""
        self._measure(going)
        self.load.tokens_free = self._scheduler.free_tokens
        self._read_inbox(0.0)
        self._expire()
        deltas = [self._append(s, token) for s, token in zip(going, sampled, strict=True) if s in self._scheduler.running]
        self._report(deltas)
        return [sequence for sequence in going if sequence in self._scheduler.running]

    def _measure(self, going: list[Sequence]) -> None:
        now = time.perf_counter()
        took_ms, self._step_began = (now - self._step_began) * 1000, now
        load = self.load
        load.step += 1
        prefilled = sum(len(s.tokens) for s in going if not s.computed)
        if not prefilled:
            load.decode_ms_per_token = smooth(load.decode_ms_per_token, took_ms / len(going))
        elif prefilled >= MEASURABLE_TOKENS:
            load.prefill_ms_per_token = smooth(load.prefill_ms_per_token, took_ms / prefilled)
        for sequence in going:
            sequence.computed = len(sequence.tokens)

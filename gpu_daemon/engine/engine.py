"""The engine of one model: a thread that plans, runs and applies, step after step.

`EngineThread` is what every engine has: its inbox, and the one exit of what it runs. `TextEngine` gives sequences their tokens;
`Engine` is continuous batching, static_engine.py has the other one, and task_engine.py makes what is no text.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from contextlib import AbstractContextManager, nullcontext
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

from gpu_daemon.engine.sequence import Chunk, Delta, FinishReason, Load, Sampled, Sequence
from gpu_daemon.engine.step_scheduler import StepScheduler

_LOG = logging.getLogger(__name__)
_SMOOTHING = 0.1
IDLE_SECONDS = 0.2
MEASURABLE_TOKENS = 32  # fewer tell more about the step's overhead than about a token


class Runner(Protocol):
    """Runs chunks on a device. The result has one entry for each chunk that samples, in order."""

    eos_ids: frozenset[int]
    forward_ms: float  # of the last step, inside the model

    def run(self, chunks: Many[Chunk]) -> list[Sampled]: ...


Deliver = Callable[[int, list[Delta]], None]  # step, deltas; called once a step, from the engine's thread


class Item(Protocol):
    """What an engine runs for a caller: a sequence, or a task."""

    caller: int
    request_id: str
    attempt: int
    choice: int
    deadline: float

    @property
    def index(self) -> int: ...


T = TypeVar("T", bound=Item)


class Book(Protocol[T]):
    """Who runs and who waits."""

    max_sequences: int
    running: list[T]
    waiting: deque[T]

    def sequences(self) -> list[T]: ...

    def remove(self, sequence: T, /) -> None: ...


Turn = Callable[[], AbstractContextManager[None]]  # the device, to be had for a step


class EngineThread(ABC, Generic[T]):
    """Owns its sequences. The public methods may be called from any thread: they only put into the inbox."""

    def __init__(self, name: str, scheduler: Book[T], deliver: Deliver, load: Load, turn: Turn = nullcontext) -> None:
        self._scheduler = scheduler
        self._deliver = deliver
        self._turn_of_device = turn
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._ended: list[Delta] = []
        self._stopping = False
        self.max_sequences = scheduler.max_sequences
        self.load = load
        load.used_at = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name=f"engine {name}", daemon=True)
        self._thread.start()

    # --- Inbox ---

    def submit(self, sequences: Many[T]) -> None:
        self._inbox.put(lambda: self._scheduler.waiting.extend(sequences))

    def abort(self, request_id: str, attempt: int) -> None:
        """Ends a request's sequences before the next step."""
        self._inbox.put(lambda: self._end_where(lambda s: (s.request_id, s.attempt) == (request_id, attempt)))

    def abort_caller(self, caller: int) -> None:
        """Ends everything of a caller whose stream broke."""
        self._inbox.put(lambda: self._end_where(lambda s: s.caller == caller))

    def stop(self) -> None:
        """Ends the thread after the step it is in; what was left can go on elsewhere."""
        self._inbox.put(self._stop)
        self._thread.join(timeout=30)

    def _stop(self) -> None:
        self._stopping = True
        for sequence in self._scheduler.sequences():
            self._end(sequence, FinishReason.FAILED, "draining")

    # --- The loop ---

    def _loop(self) -> None:
        while not self._stopping:
            self._turn()

    @abstractmethod
    def _turn(self) -> None:
        """Takes what the inbox has, and goes one step on."""

    # --- Ends other than the usual one ---

    def _end(self, sequence: T, reason: FinishReason, error: str = "") -> None:
        self._scheduler.remove(sequence)
        self._ended.append(
            Delta(sequence.caller, sequence.request_id, sequence.attempt, sequence.choice, sequence.index,
                  finish_reason=reason, error=error)
        )  # fmt: skip

    def _end_where(self, condition: Callable[[T], bool]) -> None:
        for sequence in self._scheduler.sequences():
            if condition(sequence):
                self._end(sequence, FinishReason.CANCELLED)

    def _expire(self) -> None:
        now = time.monotonic()
        for sequence in self._scheduler.sequences():
            if sequence.deadline <= now:
                self._end(sequence, FinishReason.EXPIRED)

    def _fail(self, sequences: Many[T], error: Exception) -> None:
        code = "out_of_memory" if isinstance(error, MemoryError) or "out of memory" in str(error) else "engine_error"
        _LOG.exception("a step of %d sequences failed: %s", len(sequences), code)
        for sequence in sequences:
            self._end(sequence, FinishReason.FAILED, code)

    # --- Between steps ---

    def _read_inbox(self, patience: float) -> None:
        """Waits up to `patience` seconds for a first command, and takes what is there."""
        try:
            command = self._inbox.get(timeout=patience) if patience else self._inbox.get_nowait()
            while True:
                command()
                command = self._inbox.get_nowait()
        except Empty:
            return

    def _report(self, deltas: list[Delta]) -> None:
        """One call across threads for all that the step did."""
        deltas, self._ended = [*self._ended, *deltas], []
        self.load.running, self.load.waiting = len(self._scheduler.running), len(self._scheduler.waiting)
        if deltas or self.load.running or self.load.waiting:
            self.load.used_at = time.monotonic()
        if deltas:
            self._deliver(self.load.step, deltas)


class TextEngine(EngineThread[Sequence]):
    """Gives sequences their tokens, and ends them."""

    def __init__(
        self, name: str, eos_ids: frozenset[int], scheduler: Book[Sequence], deliver: Deliver, load: Load, turn: Turn
    ) -> None:
        self._eos_ids = eos_ids
        super().__init__(name, scheduler, deliver, load, turn)

    def _append(self, sequence: Sequence, sampled: Sampled) -> Delta:
        index = sequence.index
        sequence.tokens.append(sampled.token_id)
        if sequence.grammar is not None:
            sequence.grammar.advance(sampled.token_id)
        reason = self._finish_reason(sequence, sampled.token_id)
        cached, sequence.reported = 0 if sequence.reported else sequence.cached, True
        if reason is not None:
            self._scheduler.remove(sequence)
        return Delta(
            caller=sequence.caller,
            request_id=sequence.request_id,
            attempt=sequence.attempt,
            choice=sequence.choice,
            first_index=index,
            token_ids=(sampled.token_id,),
            logprobs=() if sampled.logprob is None else (sampled.logprob,),
            finish_reason=reason,
            cached_tokens=cached,
            error="grammar_failed" if reason is FinishReason.FAILED else "",
        )

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        if sequence.grammar is not None and sequence.grammar.failed:
            return FinishReason.FAILED
        if token_id in self._eos_ids and not sequence.sampling.ignore_eos:
            return FinishReason.STOP
        if sequence.grammar is not None and sequence.grammar.complete:
            return FinishReason.STOP
        return FinishReason.LENGTH if sequence.index >= sequence.sampling.max_tokens else None


class Engine(TextEngine):
    """Continuous batching: every step is planned anew, so who ends makes room at once."""

    _scheduler: StepScheduler

    def __init__(self, name: str, runner: Runner, scheduler: StepScheduler, deliver: Deliver, turn: Turn = nullcontext) -> None:
        self._runner = runner
        self._step_began = 0.0  # 0 after a pause
        tokens = scheduler.cache.max_tokens
        load = Load(tokens_total=tokens, tokens_free=tokens)
        super().__init__(name, runner.eos_ids, scheduler, deliver, load, turn)

    def _stop(self) -> None:
        super()._stop()
        self._scheduler.cache.save_all()

    def _turn(self) -> None:
        idle = not self._scheduler.running and not self._scheduler.waiting
        self._read_inbox(IDLE_SECONDS if idle else 0.0)
        self._expire()
        chunks = self._scheduler.plan()
        self._measure_share(bool(chunks))
        deltas = self._run(chunks) if chunks else []
        self.load.tokens_free = self._scheduler.cache.free_tokens
        self._report(deltas)

    def _run(self, chunks: list[Chunk]) -> list[Delta]:
        try:
            with self._turn_of_device():
                started = time.perf_counter()
                sampled = self._runner.run(chunks)
        except Exception as error:  # noqa: BLE001  Whatever a step dies of, only its sequences fail.
            self._fail([chunk.sequence for chunk in chunks], error)
            self._scheduler.cache.forget()
            return []
        deltas = self._apply(chunks, sampled)
        self._measure(chunks, (time.perf_counter() - started) * 1000)
        return deltas

    def _apply(self, chunks: list[Chunk], sampled: list[Sampled]) -> list[Delta]:
        """Advances every sequence; those that sampled get their token."""
        results = iter(sampled)
        deltas = []
        for chunk in chunks:
            sequence = chunk.sequence
            self._scheduler.advance(chunk)
            if chunk.samples:
                deltas.append(self._append(sequence, next(results)))
        return deltas

    def _measure_share(self, busy: bool) -> None:
        """From one step's beginning to the next one's, how much went into the forward pass."""
        now = time.perf_counter()
        if busy and self._step_began:
            share = self._runner.forward_ms / 1000 / (now - self._step_began)
            self.load.forward_share = smooth(self.load.forward_share, share)
        self._step_began = now if busy else 0.0

    def _measure(self, chunks: list[Chunk], took_ms: float) -> None:
        load = self.load
        load.step += 1
        prefilled = sum(chunk.count for chunk in chunks if chunk.count > 1)
        decoding = sum(1 for chunk in chunks if chunk.count == 1)
        if prefilled >= MEASURABLE_TOKENS:
            share = max(0.0, took_ms - decoding * load.decode_ms_per_token) / prefilled
            load.prefill_ms_per_token = smooth(load.prefill_ms_per_token, share)
        elif not prefilled:
            load.decode_ms_per_token = smooth(load.decode_ms_per_token, took_ms / decoding)


def smooth(old: float, new: float) -> float:
    """A running mean that follows slowly."""
    return new if old == 0 else old + _SMOOTHING * (new - old)

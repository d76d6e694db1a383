"""How much of a worker's time each request took: every step's time is shared by the sequences that were on the worker. A step
of media is shared by what each got done in it, since a large picture takes longer than a small one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class Spent:
    choices: int
    gpu_ms: float = 0.0
    tokens: int = 0
    cached_tokens: int = 0


class Meter:
    """One worker's, as one dispatcher sees it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = 0.0
        self._running: dict[str, Spent] = {}

    def begin(self, request_id: str, choices: int) -> None:
        if not self._running:
            self._since = self._clock()  # what the worker idled is nobody's
        self._running[request_id] = Spent(choices)

    @property
    def sequences(self) -> int:
        """Of ours, that are on the worker."""
        return sum(spent.choices for spent in self._running.values())

    def step(self, others: int, made: Mapping[str, int]) -> None:
        """A step ended. `others` are the sequences that other dispatchers have on the worker, by the latest count; `made` are
        the units of media that each request made in it."""
        now = self._clock()
        elapsed_ms, self._since = (now - self._since) * 1000, now
        if not self._running:
            return
        ours_ms = elapsed_ms * self.sequences / (self.sequences + others)
        weights = {name: units for name, units in made.items() if units and name in self._running}
        weights = weights or {name: spent.choices for name, spent in self._running.items()}
        total = sum(weights.values())
        for name, weight in weights.items():
            self._running[name].gpu_ms += ours_ms * weight / total

    def count(self, request_id: str, tokens: int, cached_tokens: int) -> None:
        if (spent := self._running.get(request_id)) is not None:
            spent.tokens += tokens
            spent.cached_tokens += cached_tokens

    def end(self, request_id: str) -> Spent | None:
        return self._running.pop(request_id, None)

"""Which worker takes a lane's next requests. Pure.

One unit decides, predicted milliseconds: what the request would lose to the others on a worker, and what computing the part
of its prompt would take whose keys and values are not there. A worker that has most of the prompt is given some sequences'
advantage beyond that, so that conversations stay where they are; when it is busier still, it sheds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from apps.core.types import WorkerSnapshot

STICKY_SEQUENCES = 4  # by so many a worker that has most of a prompt may be busier than the least busy one


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that can run the lane's model now. The `_ms` figures are for a token, predicted; `load_ms` is what each new
    sequence would wait for at each of its tokens."""

    worker: WorkerSnapshot
    busy: int
    max_sequences: int
    decode_ms: float
    prefill_ms: float

    @property
    def free(self) -> int:
        return max(0, self.max_sequences - self.busy)

    @property
    def load_ms(self) -> float:
        return self.busy * self.decode_ms

    def takes(self, choices: int) -> bool:
        """As lua/lease.lua has it: an idle worker takes a request of any size."""
        return not self.busy or choices <= self.free


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request at the head of its lane. `cached` is how many tokens of its prompt each worker took lately."""

    id: str
    choices: int
    prompt_tokens: int
    tokens: int  # expected to be generated
    cached: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Score:
    """Milliseconds; the smallest is chosen."""

    load_ms: float
    prefill_ms: float
    sticky_ms: float

    @property
    def total(self) -> float:
        return self.load_ms + self.prefill_ms - self.sticky_ms

    @property
    def body(self) -> dict[str, float]:
        return {"score": round(self.total, 2), "load_ms": round(self.load_ms, 2),
                "prefill_ms": round(self.prefill_ms, 2), "sticky_ms": round(self.sticky_ms, 2)}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Choice:
    """One request's worker, and the scores of all that could have had it."""

    request_id: str
    worker_id: str
    scores: dict[str, Score]

    @property
    def route(self) -> str:
        body: dict[str, Any] = {"worker": self.worker_id, "scores": {name: score.body for name, score in self.scores.items()}}
        return json.dumps(body, separators=(",", ":"))


def candidates(model: str, workers: Iterable[WorkerSnapshot], busy: dict[str, int]) -> list[Candidate]:
    """Workers with the model ready and a sequence free, the least loaded in predicted milliseconds first.

    `busy` counts the sequences leased to each worker by all dispatchers.
    """
    found = []
    for worker in workers:
        resident = worker.resident(model)
        if worker.draining or worker.cordoned or resident is None or resident.state != "ready":
            continue
        count = busy.get(worker.worker_id, 0)
        found.append(
            Candidate(worker, count, resident.max_running, resident.decode_ms_per_token, resident.prefill_ms_per_token)
        )
    free = [candidate for candidate in found if candidate.free > 0]
    return sorted(free, key=lambda c: (c.load_ms, c.worker.worker_id))


def score(request: Waiting, candidate: Candidate) -> Score:
    cached = min(request.cached.get(candidate.worker.worker_id, 0), request.prompt_tokens)
    a_sequence_ms = candidate.decode_ms * max(1, request.tokens)
    return Score(
        load_ms=candidate.busy * a_sequence_ms,
        prefill_ms=candidate.prefill_ms * (request.prompt_tokens - cached),
        sticky_ms=STICKY_SEQUENCES * a_sequence_ms if cached * 2 >= request.prompt_tokens else 0.0,
    )


def assign(waiting: Sequence[Waiting], open_to: Sequence[Candidate]) -> list[Choice]:
    """A worker for each request in order, until one is met that nobody has room for: nothing overtakes it."""
    room = {candidate.worker.worker_id: candidate for candidate in open_to}
    choices = []
    for request in waiting:
        scores = {name: score(request, candidate) for name, candidate in room.items() if candidate.takes(request.choices)}
        if not scores:
            break
        best = min(scores, key=lambda name: (scores[name].total, name))
        room[best] = replace(room[best], busy=room[best].busy + request.choices)
        choices.append(Choice(request.id, best, scores))
    return choices


def runs(choices: Iterable[Choice]) -> list[list[Choice]]:
    """Choices in their order, those that follow each other to one worker together."""
    found: list[list[Choice]] = []
    for choice in choices:
        if found and found[-1][0].worker_id == choice.worker_id:
            found[-1].append(choice)
        else:
            found.append([choice])
    return found


def cause_of_waiting(model: str, workers: Iterable[WorkerSnapshot], *, held_back: bool) -> str:
    """Why requests still wait after a round of leasing: one of lua/common.lua's CAUSES."""
    if held_back:
        return "batch_window"
    known = list(workers)
    holders = [worker for worker in known if worker.resident(model) is not None]
    leaving = [worker for worker in holders if worker.draining or worker.cordoned]
    states = {resident.state for worker in holders if (resident := worker.resident(model))}
    if len(leaving) < len(holders) and "ready" in states:
        return "capacity"
    if any(worker.cordoned for worker in leaving):
        return "mode_switch"
    on_its_way = states & {"loading", "unloading"} or any(model in worker.loadable for worker in known)
    return "model_load" if on_its_way else "no_worker"

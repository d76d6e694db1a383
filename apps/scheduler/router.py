"""Which worker takes a lane's next requests. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from apps.core.types import WorkerSnapshot


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that can run the lane's model now. `load_ms` is what each new sequence would wait for, predicted."""

    worker: WorkerSnapshot
    busy: int
    max_sequences: int
    load_ms: float

    @property
    def free(self) -> int:
        return max(0, self.max_sequences - self.busy)


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
        load_ms = count * resident.decode_ms_per_token
        found.append(Candidate(worker, count, resident.max_running, load_ms))
    free = [candidate for candidate in found if candidate.free > 0]
    return sorted(free, key=lambda c: (c.load_ms, c.worker.worker_id))


def cause_of_waiting(model: str, workers: Iterable[WorkerSnapshot], *, held_back: bool) -> str:
    """Why requests still wait after a round of leasing: one of lua/common.lua's CAUSES."""
    if held_back:
        return "batch_window"
    holders = [worker for worker in workers if worker.resident(model) is not None]
    leaving = [worker for worker in holders if worker.draining or worker.cordoned]
    states = {resident.state for worker in holders if (resident := worker.resident(model))}
    if len(leaving) < len(holders) and "ready" in states:
        return "capacity"
    if leaving:
        return "mode_switch"
    return "model_load" if "loading" in states else "no_worker"

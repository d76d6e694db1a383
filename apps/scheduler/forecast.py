"""What is said of a request before and while it waits: cost, place, start and end, and why it waited. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from apps.core.types import InferenceRequest, Priority, WorkerSnapshot
from apps.scheduler.cost import CostModel, price
from apps.scheduler.queue import LaneDepth, Status


@dataclass(frozen=True, slots=True)
class Span:
    """An expectation in ms, with the bounds that four of five outcomes keep."""

    expected_ms: int
    low_ms: int
    high_ms: int

    @classmethod
    def around(cls, expected_ms: float, model: CostModel) -> Span:
        low, high = model.interval(expected_ms)
        return cls(round(expected_ms), round(low), round(high))


@dataclass(frozen=True, slots=True)
class Estimate:
    """Times count from now."""

    tokens: int  # expected to be generated
    cost: Span  # GPU-ms
    wait: Span
    first_token: Span
    finish: Span


def estimate(
    request: InferenceRequest, model: CostModel, lane: LaneDepth | None, *, workers: int, pace: float, free: bool
) -> Estimate:
    """`free` is whether a worker has a sequence free: then nobody waits for anything but the dispatcher."""
    cost = price(request, model)
    wait = 0.0 if free or lane is None else lane.work_ms / pace
    # With others on the worker each step is theirs too: the request's own share is as long as it is large.
    beside = max(1.0, (lane.running if lane else 0) / max(1, workers) + 1)
    first = wait + cost.fixed_ms + cost.token_ms * beside
    finish = wait + cost.fixed_ms + cost.token_ms * cost.tokens / max(1, request.num_choices) * beside
    spans = [Span.around(value, model) for value in (cost.expected_ms, wait, first, finish)]
    return Estimate(cost.tokens, *spans)


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """How far the loading of a model is; `progress` from 0 to 1."""

    stage: str
    progress: float


def load_of(model: str, workers: Iterable[WorkerSnapshot]) -> ModelLoad | None:
    """The load of a model that no worker can run yet; the one that is furthest. None when nobody loads it, or needs to."""
    held = [resident for worker in workers for resident in worker.models if resident.model == model]
    loading = [resident for resident in held if resident.state == "loading"]
    if not loading or any(resident.state == "ready" for resident in held):
        return None
    furthest = max(loading, key=lambda resident: resident.progress)
    return ModelLoad(furthest.stage or "reading", round(furthest.progress, 2))


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a waiting request stands. `position` 0 is next; `starts_in_ms` is predicted; `cause` is what its lane waits for."""

    position: int
    waiting: int
    starts_in_ms: int
    cause: str
    load: ModelLoad | None = None

    @property
    def body(self) -> dict[str, Any]:
        """As clients get it: `load` only while the model is being loaded."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def progress(status: Status, *, pace: float, load: ModelLoad | None = None) -> Progress:
    lane = status.lane
    ahead = lane["waiting_ms"] * lane["position"] / max(1, lane["waiting"])
    # Of what runs, half is done on average.
    starts_in = (lane["running_ms"] / 2 + ahead) / pace
    return Progress(int(lane["position"]), int(lane["waiting"]), round(starts_in), lane["cause"], load)


def description(request_id: str, status: Status, *, pace: float) -> dict[str, Any]:
    """The body of GET /v1/requests/{id}. `wait` adds up to the time from arrival to the first token, or so far."""
    fields, now = status.fields, float(status.fields["now_ms"])
    arrived = float(fields["arrived_ms"])

    def since(name: str) -> int | None:
        return round(float(fields[name]) - arrived) if name in fields else None

    body: dict[str, Any] = {
        "id": request_id,
        "object": "request",
        "model": fields["lane"],
        "service_tier": Priority(int(fields["priority"])).name.lower(),
        "state": fields["state"],
        "outcome": fields.get("outcome"),
        "error_code": fields.get("code") or None,
        "arrived_at": arrived / 1000,
        "attempts": int(fields["attempt"]) % 1000,
        "predicted_cost_ms": round(float(fields["cost_ms"]), 1),
        "timeline": {
            "leased_ms": since("leased_ms"),
            "first_token_ms": since("first_token_ms"),
            "finished_ms": since("finished_ms"),
        },
        "wait": wait_so_far(status, now),
        "route": json.loads(fields["route"]) if fields.get("route") else None,
        "queue": None,
    }
    if status.lane:
        place = progress(status, pace=pace)
        body["queue"] = {"position": place.position, "waiting": place.waiting,
                         "starts_in_ms": place.starts_in_ms, "cause": place.cause}  # fmt: skip
    return body


def wait_so_far(status: Status, now: float) -> dict[str, int]:
    """Adds, to what the queue knows, the part after the lease of a request that runs."""
    fields, wait = status.fields, dict(status.wait)
    if fields["state"] != "running":
        return wait
    attempt, leased = float(fields.get("prefill_from_ms", fields["attempt_ms"])), float(fields["leased_ms"])
    wait["prefill"] = round(float(fields.get("first_token_ms", now)) - attempt)
    if attempt > leased:
        wait["retry"] = wait.get("retry", 0) + round(attempt - leased)
    return wait

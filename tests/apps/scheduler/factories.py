"""Requests and principals with only what a test cares about."""

from __future__ import annotations

import itertools
from typing import Any

from apps.core.types import InferenceRequest, Priority, SamplingParams
from apps.scheduler.cost import Cost

_numbers = itertools.count(1)


def make_request(*, max_tokens: int = 4, seed: int = 1, stop: tuple[str, ...] = (), **fields: Any) -> InferenceRequest:
    defaults: dict[str, Any] = {
        "id": f"r{next(_numbers)}",
        "org_id": "1",
        "key_id": "1",
        "model": "m",
        "prompts": ((1, 2, 3),),
        "sampling": SamplingParams(max_tokens=max_tokens, seed=seed, stop=stop),
        "priority": Priority.DEFAULT,
    }
    return InferenceRequest(**{**defaults, **fields})


def make_cost(milliseconds: float = 10.0) -> Cost:
    return Cost(fixed_ms=milliseconds, token_ms=0.0, tokens=0)

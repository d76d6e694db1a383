"""A started stack that serves one more model than the first answer's."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.bench.__main__ import own_stack


@contextmanager
def stack_with(model: str) -> Iterator[httpx.Client]:
    """A client of the stack, once the model can run."""
    os.environ["DEMO_MODELS"] = model
    with own_stack() as target:
        headers = {"Authorization": f"Bearer {target.api_key}"}
        with httpx.Client(base_url=target.base_url, headers=headers, timeout=600) as client:
            _wait(client, model)
            yield client


def _wait(client: httpx.Client, model: str) -> None:
    deadline = time.monotonic() + 300
    while client.get(f"/models/{model}").json().get("state") != "ready":
        if time.monotonic() > deadline:
            raise SystemExit(f"{model} was not ready in 300 s")
        time.sleep(0.5)

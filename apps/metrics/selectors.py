"""What the dashboard shows, from ClickHouse."""

from __future__ import annotations

import asyncio
from typing import Any

from apps.core.cache import TtlCache
from apps.metrics import clickhouse

POINTS = 60
_WHERE = "finished_at >= now64(3) - toIntervalSecond({window:UInt32}) AND ({org:String} = '' OR org_id = {org:String})"
_QUANTILES = "quantilesIf(0.5, 0.95, 0.99)"
_SERIES = f"""
SELECT intDiv(toUnixTimestamp(finished_at), {{step:UInt32}}) * {{step:UInt32}} AS at,
       sum(completion_tokens) / {{step:UInt32}} AS tokens_per_second,
       countIf(outcome = 'succeeded') AS succeeded, countIf(outcome = 'refused') AS refused,
       countIf(outcome NOT IN ('succeeded', 'refused')) AS failed,
       {_QUANTILES}(total_ms, outcome = 'succeeded') AS latency_ms,
       {_QUANTILES}(ttft_ms, ttft_ms > 0) AS ttft_ms
FROM requests WHERE {_WHERE} GROUP BY at ORDER BY at
"""
_MODELS = f"""
SELECT model, count() AS requests, countIf(outcome = 'succeeded') AS succeeded, countIf(outcome = 'refused') AS refused,
       sum(prompt_tokens) AS prompt_tokens, sum(completion_tokens) AS completion_tokens,
       sum(cached_tokens) AS cached_tokens,
       {_QUANTILES}(total_ms, outcome = 'succeeded') AS latency_ms,
       {_QUANTILES}(ttft_ms, ttft_ms > 0) AS first_token_ms,
       {_QUANTILES}(queue_ms, outcome != 'refused') AS wait_ms,
       avgIf(token_ms, token_ms > 0) AS token_ms
FROM requests WHERE {_WHERE} GROUP BY model ORDER BY requests DESC
"""
_FAILURES = f"""
SELECT toUnixTimestamp(finished_at) AS at, request_id, model, outcome, code
FROM requests WHERE {_WHERE} AND outcome != 'succeeded' ORDER BY finished_at DESC LIMIT 20
"""


_RATES = f"""
SELECT worker_id, model, sum(completion_tokens) / {{window:UInt32}} AS tokens_per_second
FROM requests WHERE {_WHERE} AND worker_id != '' GROUP BY worker_id, model
"""
RATE_SECONDS = 60


async def rates() -> dict[tuple[str, str], float]:
    """Tokens/s of what finished in the last minute, by worker and model; nothing while ClickHouse does not answer."""
    return await _rates.get(None)


async def _read_rates(_: None) -> dict[tuple[str, str], float]:
    def read() -> list[dict[str, Any]]:
        client = clickhouse.connect()
        try:
            return clickhouse.rows(client, _RATES, {"window": RATE_SECONDS, "org": ""})
        finally:
            client.close()

    try:
        found = await asyncio.to_thread(read)
    except clickhouse.UNAVAILABLE:
        return {}
    return {(row["worker_id"], row["model"]): float(row["tokens_per_second"]) for row in found}


_rates: TtlCache[None, dict[tuple[str, str], float]] = TtlCache(_read_rates, seconds=4.0, entries=1)


async def dashboard(window_seconds: int, org_id: str = "") -> dict[str, Any]:
    """Series, a breakdown by model and the latest failures of the window; of one organization when it is named.

    `available` is False, and the rest empty, while ClickHouse does not answer.
    """
    step = max(1, window_seconds // POINTS)
    parameters = {"window": window_seconds, "step": step, "org": org_id}
    try:
        series, models, failures = await asyncio.to_thread(_read, parameters)
    except clickhouse.UNAVAILABLE:
        return {"available": False, "step": step, "window": window_seconds, "series": [], "models": [], "failures": []}
    return {
        "available": True,
        "step": step,
        "window": window_seconds,
        "series": series,
        "models": models,
        "failures": failures,
    }


def _read(parameters: dict[str, Any]) -> list[list[dict[str, Any]]]:
    client = clickhouse.connect()
    try:
        found = [clickhouse.rows(client, sql, parameters) for sql in (_SERIES, _MODELS, _FAILURES)]
    finally:
        client.close()
    return [[{name: _plain(value) for name, value in row.items()} for row in rows] for rows in found]


def _plain(value: Any) -> Any:
    """JSON has no NaN: a quantile of nothing is null."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value

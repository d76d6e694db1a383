"""/metrics: counters and histograms that the metrics writer keeps in Redis, so that every gateway tells the same.

Keys: `metrics:counters`, a hash of "name|label|..." -> number; `metrics:position`, the last ledger id counted, moved
with the counts in one transition (lua/count.lua), so that an entry read twice counts once.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from redis.asyncio import Redis

from apps.core.redis import LuaScript
from apps.core.types import WorkerSnapshot
from apps.metrics.records import LedgerEntry

CONTENT_TYPE = CONTENT_TYPE_LATEST
MAX_MODELS = 100  # label values; the rest are "other"
_COUNT = LuaScript(Path(__file__).parent / "lua" / "count.lua")
_KEY = "metrics:counters"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From arrival to the first token.", _SECONDS),
    "inter_token_latency_seconds": ("Mean time of a token after the first, per request.", _TOKEN_SECONDS),
    "e2e_request_latency_seconds": ("From arrival to the end.", _SECONDS),
    "request_queue_time_seconds": ("From arrival to a worker.", _SECONDS),
    "request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "request_generation_tokens": ("Generated tokens of a request.", _TOKENS),
}
COUNTERS = {
    "requests": ("Requests by how they ended.", ("model_name", "outcome", "code")),
    "prompt_tokens": ("Prompt tokens processed.", ("model_name",)),
    "generation_tokens": ("Tokens generated.", ("model_name",)),
    "cached_tokens": ("Prompt tokens found in a cache.", ("model_name",)),
}


async def count(redis: Redis, entries: Sequence[tuple[str, LedgerEntry]]) -> None:
    """Adds entries, (ledger id, entry) in the ledger's order. Entries counted before are passed over."""
    rows = [[stream_id, dict(_increments(entry))] for stream_id, entry in entries]
    await _COUNT(redis, keys=[_KEY, "metrics:position"], args=[json.dumps(rows)])


def _increments(entry: LedgerEntry) -> Counter[str]:
    model = entry.model
    found: Counter[str] = Counter()
    found[f"requests|{model}|{entry.outcome}|{entry.code}"] += 1
    found[f"prompt_tokens|{model}"] += entry.prompt_tokens
    found[f"generation_tokens|{model}"] += entry.completion_tokens
    found[f"cached_tokens|{model}"] += entry.cached_tokens
    for name, value in _observations(entry):
        bounds = HISTOGRAMS[name][1]
        bucket = next((str(float(bound)) for bound in bounds if value <= bound), "+Inf")
        found[f"{name}|{model}|{bucket}"] += 1
        # Sums are kept in thousandths: Redis adds integers exactly.
        found[f"{name}|{model}|sum"] += round(value * 1000)
    return found


def _observations(entry: LedgerEntry) -> Iterator[tuple[str, float]]:
    if entry.outcome == "refused":
        return
    yield "e2e_request_latency_seconds", entry.total_ms / 1000
    yield "request_queue_time_seconds", entry.queue_ms / 1000
    yield "request_prompt_tokens", entry.prompt_tokens
    yield "request_generation_tokens", entry.completion_tokens
    if entry.ttft_ms:
        yield "time_to_first_token_seconds", entry.ttft_ms / 1000
    if entry.token_ms:
        yield "inter_token_latency_seconds", entry.token_ms / 1000


async def render(redis: Redis, load: dict[str, Any], workers: Sequence[WorkerSnapshot]) -> bytes:
    """Prometheus' text of everything counted, and of the queue and the workers now."""
    counted = {key: int(value) for key, value in (await redis.hgetall(_KEY)).items()}
    registry = CollectorRegistry()
    registry.register(_Collected([*_counters(counted), *_histograms(counted), *_gauges(load, workers)]))
    return generate_latest(registry)


class _Collected(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def _counters(counted: dict[str, int]) -> Iterator[Metric]:
    for name, (text, labels) in COUNTERS.items():
        family = CounterMetricFamily(f"inference:{name}", text, labels=labels)
        for key, value in _bounded(counted, name).items():
            family.add_metric(key, value)
        yield family


def _bounded(counted: dict[str, int], name: str) -> dict[tuple[str, ...], int]:
    """The counts of one metric by label values; models beyond MAX_MODELS are added up as "other"."""
    totals: defaultdict[tuple[str, ...], int] = defaultdict(int)
    models: set[str] = set()
    for key, value in sorted(counted.items()):
        metric, *labels = key.split("|")
        if metric != name:
            continue
        if labels[0] not in models and len(models) >= MAX_MODELS:
            labels[0] = "other"
        models.add(labels[0])
        totals[tuple(labels)] += value
    return totals


def _histograms(counted: dict[str, int]) -> Iterator[Metric]:
    for name, (text, bounds) in HISTOGRAMS.items():
        family = HistogramMetricFamily(f"inference:{name}", text, labels=("model_name",))
        counts = _bounded(counted, name)
        for model in sorted({labels[0] for labels in counts}):
            running, buckets = 0, []
            for bound in (*map(float, bounds), "+Inf"):
                running += counts.get((model, str(bound)), 0)
                buckets.append((str(bound), running))
            family.add_metric((model,), buckets, counts.get((model, "sum"), 0) / 1000)
        yield family


def _gauges(load: dict[str, Any], workers: Sequence[WorkerSnapshot]) -> Iterator[Metric]:
    running = GaugeMetricFamily("inference:num_requests_running", "Requests on a worker.", labels=("model_name",))
    waiting = GaugeMetricFamily("inference:num_requests_waiting", "Requests in the queue.", labels=("model_name",))
    for model, lane in load["lanes"].items():
        running.add_metric((model,), lane["running"])
        waiting.add_metric((model,), lane["waiting"])
    yield running
    yield waiting
    yield GaugeMetricFamily("inference:dispatchers", "Dispatchers alive.", value=load["dispatchers"])
    up = GaugeMetricFamily("inference:worker_up", "1 for each live worker.", labels=("worker", "device"))
    usage = GaugeMetricFamily(
        "inference:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", labels=("worker", "model_name")
    )
    share = GaugeMetricFamily(
        "inference:engine_forward_share", "Share of a busy engine's time in the model.", labels=("worker", "model_name")
    )
    for worker in workers:
        up.add_metric((worker.worker_id, worker.device), 1)
        for model in worker.models:
            share.add_metric((worker.worker_id, model.model), model.forward_share)
            if model.kv_blocks_total:
                used = 1 - model.kv_blocks_free / model.kv_blocks_total
                usage.add_metric((worker.worker_id, model.model), used)
    yield up
    yield usage
    yield share

"""The one cost unit: predicted milliseconds of a worker, linear in the tokens prefilled and decoded, or in the input and output
units of work that is no text (apps/core/types.py). Pure.

A model of it is fitted for each (model, worker class) from finished requests, whose share of the worker's time the
dispatcher measures (link.py). Until there are enough of them, the worker's own figures stand in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from apps.core.types import InferenceRequest, ResidentModel, TranscribeWork

# What a request is expected to generate when its bound is higher: most answers end long before `max_tokens`.
EXPECTED_TOKENS = 256
TOKENS_A_SECOND = 3.5  # of speech, in a transcript
ENOUGH = 10.0  # finished requests, before a fit is believed
INTERVAL_SIGMAS = 1.2816  # 80% of outcomes are within


@dataclass(frozen=True, slots=True)
class Cost:
    """`fixed_ms` is spent however the request ends; `token_ms` for each token it generates, `tokens` of them expected."""

    fixed_ms: float
    token_ms: float
    tokens: int

    @property
    def expected_ms(self) -> float:
        return self.of(self.tokens)

    def of(self, generated: int) -> float:
        return self.fixed_ms + self.token_ms * generated


@dataclass(frozen=True, slots=True)
class CostModel:
    """GPU-ms a token, with how well it did: `error` is the mean of |predicted - true| / true, `spread` the standard
    deviation of log(true / predicted), `samples` the (decayed) number of finished requests behind it."""

    prefill_ms: float
    decode_ms: float
    samples: float = 0.0
    error: float = 0.0
    spread: float = 0.5

    def ms(self, prompt_tokens: int, generated: int) -> float:
        return self.prefill_ms * prompt_tokens + self.decode_ms * generated

    def interval(self, expected_ms: float) -> tuple[float, float]:
        """Within which four of five outcomes are."""
        factor = math.exp(INTERVAL_SIGMAS * self.spread)
        return expected_ms / factor, expected_ms * factor


def fit(sums: Mapping[str, str]) -> CostModel | None:
    """The non-negative least squares fit of the sums that lua/observe.lua keeps; None before there is enough."""
    value = {name: float(sums.get(name, 0)) for name in ("n", "xx", "xz", "zz", "xy", "zy", "predictions", "error", "spread")}
    if value["n"] < ENOUGH or value["xx"] <= 0 or value["zz"] <= 0:
        return None
    prefill, decode = _solve(value["xx"], value["xz"], value["zz"], value["xy"], value["zy"])
    done = value["predictions"]
    if not done:
        return CostModel(prefill, decode, value["n"])
    return CostModel(prefill, decode, value["n"], value["error"] / done, math.sqrt(value["spread"] / done))


def _solve(xx: float, xz: float, zz: float, xy: float, zy: float) -> tuple[float, float]:
    """Two unknowns; one that would be negative is nothing, and the other takes all."""
    determinant = xx * zz - xz * xz
    if determinant > 1e-9 * xx * zz:
        prefill, decode = (zz * xy - xz * zy) / determinant, (xx * zy - xz * xy) / determinant
        if prefill >= 0 and decode >= 0:
            return prefill, decode
    # Prompt and answer lengths that always go together cannot be told apart either: all is put on the answer.
    return (0.0, zy / zz) if zy / zz > 0 else (xy / xx, 0.0)


def reported(residents: Iterable[ResidentModel]) -> CostModel:
    """What the workers say of themselves; the fastest, so that one slow host makes nobody's share dearer."""
    measured = [r for r in residents if r.decode_ms_per_token > 0]
    prefill = min((r.prefill_ms_per_token for r in measured), default=1.0)
    decode = min((r.decode_ms_per_token for r in measured), default=10.0)
    return CostModel(prefill, decode)


def cheapest(models: Iterable[CostModel]) -> CostModel | None:
    """Of several worker classes that hold a model, the one to price by."""
    return min(models, key=lambda model: model.decode_ms, default=None)


def price(request: InferenceRequest, model: CostModel) -> Cost:
    tokens = request.num_choices * _expected(request)
    return Cost(model.prefill_ms * request.num_prompt_tokens, model.decode_ms, tokens)


def _expected(request: InferenceRequest) -> int:
    """Output of a choice. Of what is no text it is known, but for a transcript's length."""
    if request.work is None:
        return min(request.sampling.max_tokens, EXPECTED_TOKENS)
    if isinstance(request.work, TranscribeWork):
        return min(request.sampling.max_tokens, math.ceil(TOKENS_A_SECOND * request.work.seconds))
    return request.sampling.max_tokens

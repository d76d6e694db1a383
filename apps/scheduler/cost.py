"""The one cost unit: predicted milliseconds of a worker, linear in the tokens prefilled and decoded, or in the input and output
units of work that is no text (apps/core/types.py), and in their product, since each output attends to all of the input; over
what a request takes whatever its size. Pure.

A model of it is fitted for each (model, worker class) from finished requests, whose share of the worker's time the
dispatcher measures (link.py). Until there are enough of them, the worker's own figures stand in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

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
    """GPU-ms a token, a request, and a generated token for each of the prompt (`context_ms`), with how well it did: `error` is
    the mean of |predicted - true| / true, `spread` the standard deviation of log(true / predicted), `samples` the (decayed)
    number of finished requests behind it."""

    prefill_ms: float
    decode_ms: float
    request_ms: float = 0.0
    samples: float = 0.0
    error: float = 0.0
    spread: float = 0.5
    context_ms: float = 0.0

    def ms(self, prompt_tokens: int, generated: int) -> float:
        return self.request_ms + self.prefill_ms * prompt_tokens + self.token_ms(prompt_tokens) * generated

    def token_ms(self, prompt_tokens: int) -> float:
        """Of a generated token after a prompt so long."""
        return self.decode_ms + self.context_ms * prompt_tokens

    def interval(self, expected_ms: float) -> tuple[float, float]:
        """Within which four of five outcomes are."""
        factor = math.exp(INTERVAL_SIGMAS * self.spread)
        return expected_ms / factor, expected_ms * factor


def fit(sums: Mapping[str, str]) -> CostModel | None:
    """The non-negative least squares fit of the sums that lua/observe.lua keeps; None before there is enough."""
    value = {name: float(sums.get(name, 0)) for name in _SUMS}
    if value["n"] < ENOUGH:
        return None
    products = np.array([[value["".join(sorted(a + b))] for b in _FEATURES] for a in _FEATURES])
    prefill, decode, request, context = _solve(products, np.array([value[a + "y"] for a in _FEATURES]))
    done = value["predictions"]
    if not done:
        return CostModel(prefill, decode, request, value["n"], context_ms=context)
    error, spread = value["error"] / done, math.sqrt(value["spread"] / done)
    return CostModel(prefill, decode, request, value["n"], error, spread, context)


_FEATURES = "xz1q"  # tokens of the prompt and generated, one, and the product of the first two
_PAIRS = ("xx", "xz", "zz", "1x", "1z", "11", "qx", "qz", "1q", "qq", "xy", "zy", "1y", "qy")
_SUMS = ("n", *_PAIRS, "predictions", "error", "spread")
# Of what fits alike the first is taken: prompts and answers whose lengths always go together cannot be told apart.
_LINEAR = ((1,), (0,), (0, 1), (1, 2), (0, 2), (0, 1, 2), (2,))
_SUBSETS = (*_LINEAR, (3,), *((*used, 3) for used in _LINEAR))
_USED = np.array([[feature in used for feature in range(len(_FEATURES))] for used in _SUBSETS], float)


def _solve(products: np.ndarray, right: np.ndarray) -> list[float]:
    """As many unknowns as features, none negative: of the fits with some of them, which leave the others nil, the best. All are
    solved in one call, for every request that comes or ends is priced anew."""
    scale = 1 / np.sqrt(np.maximum(products.diagonal(), 1e-300))
    products, right = products * np.outer(scale, scale), right * scale
    parts = products * _USED[:, :, None] * _USED[:, None, :]
    fits = np.linalg.pinv(parts, rcond=1e-9, hermitian=True) @ right * _USED
    losses = np.einsum("fi,ij,fj->f", fits, products, fits) - 2 * fits @ right
    best, least = np.zeros(len(right)), 0.0
    for found, loss in zip(fits, losses.tolist(), strict=True):
        if loss < least - 1e-9 * abs(least) and (found >= 0).all():
            best, least = found, loss
    fitted: list[float] = (best * scale).tolist()
    return fitted


def reported(residents: Iterable[ResidentModel]) -> CostModel:
    """What the workers say of themselves; the fastest, so that one slow host makes nobody's share dearer."""
    measured = [r for r in residents if r.decode_ms_per_token > 0]
    prefill = min((r.prefill_ms_per_token for r in measured), default=1.0)
    decode = min((r.decode_ms_per_token for r in measured), default=10.0)
    return CostModel(prefill, decode)


def cheapest(models: Iterable[CostModel]) -> CostModel | None:
    """Of several worker classes that hold a model, the one to price by."""
    return min(models, key=lambda model: model.ms(EXPECTED_TOKENS, EXPECTED_TOKENS), default=None)


def price(request: InferenceRequest, model: CostModel) -> Cost:
    tokens = request.num_choices * _expected(request)
    return Cost(model.ms(request.num_prompt_tokens, 0), model.token_ms(request.num_prompt_tokens), tokens)


def _expected(request: InferenceRequest) -> int:
    """Output of a choice. Of what is no text it is known, but for a transcript's length."""
    if request.work is None:
        return min(request.sampling.max_tokens, EXPECTED_TOKENS)
    if isinstance(request.work, TranscribeWork):
        return min(request.sampling.max_tokens, math.ceil(TOKENS_A_SECOND * request.work.seconds))
    return request.sampling.max_tokens

"""The one cost unit: predicted milliseconds of a worker, linear in the tokens prefilled and decoded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from apps.core.types import InferenceRequest, ResidentModel

# What a request is expected to generate when its bound is higher: most answers end long before `max_tokens`.
EXPECTED_TOKENS = 256


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


def price(request: InferenceRequest, residents: Iterable[ResidentModel]) -> Cost:
    """Priced by the fastest worker that holds the model, so that one slow host makes nobody's share dearer."""
    measured = [r for r in residents if r.decode_ms_per_token > 0]
    prefill = min((r.prefill_ms_per_token for r in measured), default=1.0)
    decode = min((r.decode_ms_per_token for r in measured), default=10.0)
    tokens = request.num_choices * min(request.sampling.max_tokens, EXPECTED_TOKENS)
    return Cost(prefill * request.num_prompt_tokens, decode, tokens)

"""From logits to tokens, each row by its own rules.

The noise of a token is one uniform number, a function of (seed, choice, token index) alone, put through the inverse of the
row's cumulative distribution: a sequence draws the same tokens alone, in a batch, preempted or resumed elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Many

import torch

from gpu_daemon.engine.sequence import Logprob, Sampled, Sequence

_MASK = (1 << 64) - 1
# A temperature below this picks the likeliest token: dividing by it would leave the range of float32.
_COLDEST = 1e-5


def uniform(seed: int, choice: int, index: int) -> float:
    """In [0, 1): SplitMix64 (Steele, Lea, Flood 2014) over the three numbers in turn."""
    state = seed & _MASK
    for value in (choice, index):
        state = _mix((state ^ (value * 0x9E3779B97F4A7C15)) & _MASK)
    return (_mix(state) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def sample(logits: torch.Tensor, sequences: Many[Sequence]) -> list[Sampled]:
    """`logits` is [rows, vocabulary]; row i belongs to sequences[i]."""
    if all(sequence.sampling.plain_greedy and sequence.grammar is None for sequence in sequences):
        return [Sampled(token_id) for token_id in logits.argmax(-1).tolist()]
    logits = logits.float()
    adjusted = torch.stack([_adjust(row, sequence) for row, sequence in zip(logits, sequences, strict=True)])
    tokens = _draw(adjusted, sequences)
    return [
        Sampled(token_id, _logprob(row, token_id, sequence))
        for row, token_id, sequence in zip(logits, tokens, sequences, strict=True)
    ]


def _adjust(row: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Penalties over what was generated, as OpenAI defines them, logit_bias, and the grammar. Leaves `row` as it is."""
    s = sequence.sampling
    if not (sequence.grammar or s.logit_bias or s.presence_penalty or s.frequency_penalty):
        return row
    row = row.clone()
    counts = Counter(sequence.generated)
    if counts and (s.presence_penalty or s.frequency_penalty):
        ids = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[ids] -= s.presence_penalty + s.frequency_penalty * times
    for token_id, bias in s.logit_bias:
        row[token_id] += bias
    if sequence.grammar is not None:
        row[~torch.from_numpy(sequence.grammar.allowed()).to(row.device)] = float("-inf")
    return row


def _draw(rows: torch.Tensor, sequences: Many[Sequence]) -> list[int]:
    greedy: list[int] = rows.argmax(-1).tolist()
    return [
        greedy[i] if sequence.sampling.temperature < _COLDEST else _draw_one(rows[i], sequence)
        for i, sequence in enumerate(sequences)
    ]


def _draw_one(row: torch.Tensor, sequence: Sequence) -> int:
    s = sequence.sampling
    noise = uniform(s.seed, sequence.choice, sequence.index)
    probabilities = torch.softmax(row / s.temperature, -1)
    if s.top_p >= 1 and not s.top_k and not s.min_p:
        return _invert(probabilities, noise)
    ordered, ids = probabilities.sort(descending=True, stable=True)
    kept = ids[: _kept(ordered, s.top_p, s.top_k, s.min_p)]
    # Drawn in the vocabulary's order: in the sorted one, two tokens that trade places by a rounding error of another
    # batch would move every draw after them.
    remaining = torch.zeros_like(probabilities)
    remaining[kept] = probabilities[kept]
    return _invert(remaining, noise)


def _kept(ordered: torch.Tensor, top_p: float, top_k: int, min_p: float) -> int:
    """How many of the likeliest tokens stay; one at least."""
    keep = len(ordered) if not top_k else min(top_k, len(ordered))
    if top_p < 1:
        before = ordered.cumsum(-1, dtype=torch.float64) - ordered
        keep = min(keep, int((before < top_p).sum()))
    if min_p:
        keep = min(keep, int((ordered >= min_p * ordered[0]).sum()))
    return max(1, keep)


def _invert(probabilities: torch.Tensor, noise: float) -> int:
    """The first index at which the cumulative probability passes `noise` of the whole."""
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    target = torch.tensor(noise, dtype=torch.float64, device=cumulative.device) * cumulative[-1]
    return min(int(torch.searchsorted(cumulative, target, right=True)), len(probabilities) - 1)


def _logprob(row: torch.Tensor, token_id: int, sequence: Sequence) -> Logprob | None:
    """Of the model's own distribution, before temperature and penalties."""
    wanted = sequence.sampling.top_logprobs
    if wanted is None:
        return None
    logprobs = torch.log_softmax(row, -1)
    values, ids = logprobs.topk(wanted) if wanted else (logprobs[:0], logprobs[:0])
    top = tuple(zip((int(i) for i in ids.tolist()), values.tolist(), strict=True))
    return Logprob(token_id, float(logprobs[token_id]), top)

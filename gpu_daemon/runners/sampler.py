"""From logits to tokens, each row by its own rules.

The noise of a token is one uniform number, a function of (seed, choice, token index) alone, put through the inverse of the
row's cumulative distribution: a sequence draws the same tokens alone, in a batch, preempted or resumed elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Many

import torch

from gpu_daemon.engine.sequence import Logprob, Sampled, Sampling, Sequence

_MASK = (1 << 64) - 1
# A temperature below this picks the likeliest token: dividing by it would leave the range of float32.
_COLDEST = 1e-5
_FEW = 1024


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
    """One token a row. Rows are independent of each other: what is done together gives what each would give alone."""
    tokens: list[int] = rows.argmax(-1).tolist()
    drawn = [i for i, sequence in enumerate(sequences) if sequence.sampling.temperature >= _COLDEST]
    whole = [i for i in drawn if not _narrows(sequences[i].sampling)]
    for batch, draw in ((whole, _draw_whole), ([i for i in drawn if i not in whole], _draw_narrowed)):
        if batch:
            chosen = draw(_probabilities(rows[batch], [sequences[i] for i in batch]), [sequences[i] for i in batch])
            for i, token in zip(batch, chosen, strict=True):
                tokens[i] = token
    return tokens


def _narrows(s: Sampling) -> bool:
    return s.top_p < 1 or bool(s.top_k) or bool(s.min_p)


def _probabilities(rows: torch.Tensor, sequences: Many[Sequence]) -> torch.Tensor:
    temperatures = torch.tensor([sequence.sampling.temperature for sequence in sequences], device=rows.device)
    return torch.softmax(rows / temperatures[:, None], -1)


def _draw_whole(probabilities: torch.Tensor, sequences: Many[Sequence]) -> list[int]:
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    return _invert(cumulative, sequences)


def _draw_narrowed(probabilities: torch.Tensor, sequences: Many[Sequence]) -> list[int]:
    """From the likeliest few of each row, put into the vocabulary's order: in order of likelihood, two tokens that trade
    places by a rounding error of another batch would move every draw after them."""
    ordered, ids = _likeliest(probabilities, sequences)
    kept = torch.tensor([_kept(row, s.sampling) for row, s in zip(ordered, sequences, strict=True)], device=ids.device)
    beyond = torch.arange(ordered.shape[1], device=ids.device)[None] >= kept[:, None]
    ids, places = ids.masked_fill(beyond, probabilities.shape[1]).sort(-1)
    cumulative = ordered.masked_fill(beyond, 0).gather(-1, places).cumsum(-1, dtype=torch.float64)
    chosen = _invert(cumulative, sequences)
    return [int(row[place]) for row, place in zip(ids.cpu(), chosen, strict=True)]


def _likeliest(probabilities: torch.Tensor, sequences: Many[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens, in order: as few as surely hold what every row keeps, since sorting a vocabulary is slow."""
    few = min(_FEW, probabilities.shape[1])
    ordered, ids = probabilities.topk(few)
    if few == probabilities.shape[1] or all(_kept(row, s.sampling) < few for row, s in zip(ordered, sequences, strict=True)):
        return ordered, ids
    return probabilities.sort(descending=True, stable=True)


def _kept(ordered: torch.Tensor, s: Sampling) -> int:
    """How many of the likeliest tokens stay; one at least."""
    keep = min(s.top_k or len(ordered), len(ordered))
    if s.top_p < 1:
        before = ordered.cumsum(-1, dtype=torch.float64) - ordered
        keep = min(keep, int((before < s.top_p).sum()))
    if s.min_p:
        keep = min(keep, int((ordered >= s.min_p * ordered[0]).sum()))
    return max(1, keep)


def _invert(cumulative: torch.Tensor, sequences: Many[Sequence]) -> list[int]:
    """The first place in each row at which the cumulative probability passes the row's noise, times the whole."""
    noise = [uniform(s.sampling.seed, s.choice, s.index) for s in sequences]
    whole = cumulative[:, -1:].contiguous()
    targets = torch.tensor(noise, dtype=torch.float64, device=cumulative.device)[:, None] * whole
    # Not beyond the last token that has any probability: rounding must not draw what was ruled out.
    last = torch.searchsorted(cumulative, whole)
    places: list[int] = torch.minimum(torch.searchsorted(cumulative, targets, right=True), last)[:, 0].tolist()
    return places


def _logprob(row: torch.Tensor, token_id: int, sequence: Sequence) -> Logprob | None:
    """Of the model's own distribution, before temperature and penalties."""
    wanted = sequence.sampling.top_logprobs
    if wanted is None:
        return None
    logprobs = torch.log_softmax(row, -1)
    values, ids = logprobs.topk(wanted) if wanted else (logprobs[:0], logprobs[:0])
    top = tuple(zip((int(i) for i in ids.tolist()), values.tolist(), strict=True))
    return Logprob(token_id, float(logprobs[token_id]), top)

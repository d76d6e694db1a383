"""Runs sequences through the step loop without threads, as the engine does."""

from __future__ import annotations

import itertools

from gpu_daemon.engine.kv_cache import KvCache
from gpu_daemon.engine.sequence import Sampling, Sequence
from gpu_daemon.engine.step_scheduler import StepScheduler

_numbers = itertools.count(1)


def make_sequence(tokens: list[int], *, generated: list[int] | None = None, salt: bytes = b"", **sampling) -> Sequence:
    options = {"max_tokens": 8, "seed": 1, "temperature": 0.0, "ignore_eos": True, **sampling}
    return Sequence(0, f"r{next(_numbers)}", 1, 0, tokens + (generated or []), len(tokens), Sampling(**options), salt=salt)


def run_all(
    runner,
    sequences: list[Sequence],
    *,
    step_tokens: int = 64,
    cache: KvCache | None = None,
    scheduler: StepScheduler | None = None,
) -> list[list[int]]:
    """The generated tokens of each, all run together."""
    cache = scheduler.cache if scheduler else cache or KvCache(runner.blocks, runner.block_tokens)
    scheduler = scheduler or StepScheduler(cache, step_tokens, 32)
    scheduler.waiting.extend(sequences)
    while scheduler.running or scheduler.waiting:
        chunks = scheduler.plan()
        results = iter(runner.run(chunks))
        for chunk in chunks:
            sequence = chunk.sequence
            scheduler.advance(chunk)
            if chunk.samples:
                sequence.tokens.append(next(results).token_id)
                if sequence.grammar is not None:
                    sequence.grammar.advance(sequence.tokens[-1])
                complete = sequence.grammar is not None and sequence.grammar.complete
                if complete or sequence.index >= sequence.sampling.max_tokens:
                    scheduler.remove(sequence)
        cache.check_integrity()
    return [sequence.generated for sequence in sequences]

"""The KV cache's and the step scheduler's bookkeeping, without tensors."""

from __future__ import annotations

import random

from gpu_daemon.engine.kv_cache import KvCache
from gpu_daemon.engine.step_scheduler import StepScheduler
from tests.gpu_daemon.driver import make_sequence


def test_nothing_leaks_over_10_000_random_events() -> None:
    rng = random.Random(1)
    cache = KvCache(8, 600)
    scheduler = StepScheduler(cache, 64)
    for _ in range(10_000):
        event = rng.random()
        if event < 0.3 and len(scheduler.waiting) < 20:
            prompt = [rng.randrange(3) for _ in range(rng.randint(1, 60))]
            sequence = make_sequence(prompt, max_tokens=rng.randint(1, 30), salt=rng.choice([b"a", b"b"]))
            scheduler.waiting.append(sequence)
        elif event < 0.9:
            chunks = scheduler.plan()
            assert sum(chunk.count for chunk in chunks) <= 64
            for chunk in chunks:
                samples = chunk.samples
                chunk.sequence.computed += chunk.count
                if samples:
                    chunk.sequence.tokens.append(rng.randrange(3))
                    if chunk.sequence.index >= chunk.sequence.sampling.max_tokens:
                        scheduler.remove(chunk.sequence)
        elif scheduler.sequences():
            scheduler.remove(rng.choice(scheduler.sequences()))  # an abort, anywhere
        cache.check_integrity()
    for sequence in scheduler.sequences():
        scheduler.remove(sequence)
    cache.check_integrity()
    assert cache.free_tokens == 600


def test_decoding_goes_before_prefill_and_the_budget_holds() -> None:
    scheduler = StepScheduler(KvCache(4, 10_000), 10)
    decoding, prompt = make_sequence([1, 2]), make_sequence(list(range(100)))
    scheduler.waiting.append(decoding)
    scheduler.plan()
    decoding.computed = 2
    decoding.tokens.append(5)
    scheduler.waiting.append(prompt)
    assert [(chunk.sequence, chunk.count) for chunk in scheduler.plan()] == [(decoding, 1), (prompt, 9)]


def test_only_the_same_salt_shares_a_beginning() -> None:
    cache = KvCache(4, 10_000)
    first = make_sequence([1, 2, 3, 4], salt=b"a")
    cache.allocate(first)
    first.computed = 4
    cache.free(first)
    stranger, friend = make_sequence([1, 2, 3, 4, 5], salt=b"b"), make_sequence([1, 2, 3, 4, 5], salt=b"a")
    cache.allocate(stranger)
    cache.allocate(friend)
    assert (stranger.computed, friend.computed) == (0, 4)


def test_a_sequence_that_fits_nowhere_else_runs_alone() -> None:
    cache = KvCache(4, 10)
    big, small = make_sequence([1] * 50), make_sequence([1], max_tokens=2)
    assert cache.allocate(big)
    assert not cache.allocate(small)
    cache.free(big)
    assert cache.allocate(small)

"""The KV cache's, its store's and the step scheduler's bookkeeping, without tensors."""

from __future__ import annotations

import random

import pytest

from gpu_daemon.engine.kv_cache import KvCache
from gpu_daemon.engine.kv_store import BlockCosts, HostMemory, KvStore
from gpu_daemon.engine.step_scheduler import StepScheduler
from tests.gpu_daemon.driver import make_sequence

BLOCK = 4
DEAR = BlockCosts(restore_ms=1, compute_ms=100)


class Device:
    """Blocks with contents: what a runner has, in integers."""

    def __init__(self, blocks: int, memory: HostMemory | None = None, costs: BlockCosts = DEAR, model: str = "m") -> None:
        self.contents: list[object] = [None] * blocks
        store = KvStore(memory, model, 10, costs, self.contents.__getitem__, self.contents.__setitem__) if memory else None
        self.cache = KvCache(blocks, BLOCK, store)

    def compute(self, sequence) -> None:
        """Fills the blocks the sequence has not got yet with what belongs there."""
        for depth in range(sequence.computed // BLOCK, -(-len(sequence.tokens) // BLOCK)):
            self.contents[sequence.blocks[depth]] = (sequence.salt, *sequence.tokens[: (depth + 1) * BLOCK])
        sequence.computed = len(sequence.tokens)
        self.cache.learn(sequence)

    def run(self, tokens: list[int], salt: bytes = b""):
        """A whole life: in, computed, out. Asserts that whatever was reused is what it is said to be."""
        sequence = make_sequence(tokens, salt=salt)
        assert self.cache.allocate(sequence)
        for depth in range(sequence.computed // BLOCK):
            assert self.contents[sequence.blocks[depth]] == (salt, *tokens[: (depth + 1) * BLOCK])
        reused = sequence.computed
        self.compute(sequence)
        self.cache.free(sequence)
        self.cache.check_integrity()
        return reused


@pytest.mark.parametrize("seed", range(4))
def test_nothing_leaks_and_nobody_starves_over_10_000_random_events(seed: int) -> None:
    rng = random.Random(seed)
    cache = KvCache(40, BLOCK)
    scheduler = StepScheduler(cache, 64, 8)
    for _ in range(10_000):
        event = rng.random()
        if event < 0.3 and len(scheduler.waiting) < 20:
            prompt = [rng.randrange(3) for _ in range(rng.randint(1, 60))]
            scheduler.waiting.append(make_sequence(prompt, max_tokens=rng.randint(1, 30), salt=rng.choice([b"a", b"b"])))
        elif event < 0.9:
            chunks = scheduler.plan()
            assert sum(chunk.count for chunk in chunks) <= 64
            assert chunks or not scheduler.sequences()
            for chunk in chunks:
                assert len(chunk.sequence.blocks) * BLOCK >= chunk.start + chunk.count
                scheduler.advance(chunk)
                if chunk.samples:
                    chunk.sequence.tokens.append(rng.randrange(3))
                    if chunk.sequence.index >= chunk.sequence.sampling.max_tokens:
                        scheduler.remove(chunk.sequence)
        elif scheduler.sequences():
            scheduler.remove(rng.choice(scheduler.sequences()))  # an abort, anywhere
        cache.check_integrity()
    assert scheduler.preemptions > 0
    for sequence in scheduler.sequences():
        scheduler.remove(sequence)
    cache.check_integrity()
    assert cache.free_tokens == cache.max_tokens


def test_decoding_goes_before_prefill_and_the_budget_holds() -> None:
    scheduler = StepScheduler(KvCache(100, BLOCK), 10, 4)
    decoding, prompt = make_sequence([1, 2]), make_sequence(list(range(100)))
    scheduler.waiting.append(decoding)
    (chunk,) = scheduler.plan()
    scheduler.advance(chunk)
    decoding.tokens.append(5)
    scheduler.waiting.append(prompt)
    assert [(chunk.sequence, chunk.count) for chunk in scheduler.plan()] == [(decoding, 1), (prompt, 9)]


def test_a_short_prompt_does_not_wait_for_all_of_a_long_one() -> None:
    scheduler = StepScheduler(KvCache(1000, BLOCK), 64, 4)
    long, short = make_sequence(list(range(2000))), make_sequence(list(range(20)))
    scheduler.waiting.extend([long, short])
    assert [(chunk.sequence, chunk.count) for chunk in scheduler.plan()] == [(long, 32), (short, 20)]


def test_only_the_same_salt_shares_a_beginning_and_the_last_token_is_always_computed() -> None:
    device = Device(20)
    words = list(range(12))
    assert device.run(words, b"a") == 0
    assert device.run(words, b"b") == 0
    assert device.run(words, b"a") == 8  # the third block holds the last token
    assert device.run([*words, 99], b"a") == 12


def test_two_that_run_at_once_share_their_blocks() -> None:
    device = Device(10)
    first, second = make_sequence(list(range(9))), make_sequence(list(range(9)))
    assert device.cache.allocate(first)
    device.compute(first)
    assert device.cache.allocate(second)
    assert second.blocks[:2] == first.blocks[:2]
    device.cache.free(first)
    device.cache.check_integrity()
    device.cache.free(second)
    device.cache.check_integrity()


def test_what_leaves_the_device_comes_back_from_host_memory() -> None:
    device = Device(4, HostMemory(1000))
    assert device.run(list(range(13))) == 0
    assert device.run([50 + i for i in range(13)]) == 0  # pushes the first out
    assert device.run(list(range(13))) == 12


def test_it_comes_back_on_another_device_after_the_first_is_gone() -> None:
    memory = HostMemory(1000)
    device = Device(8, memory)
    device.run(list(range(13)))
    device.cache.save_all()
    assert Device(8, memory).run(list(range(13))) == 12
    assert Device(8, memory, model="another").run(list(range(13))) == 0


def test_nothing_is_kept_where_computing_is_faster() -> None:
    memory = HostMemory(1000)
    device = Device(4, memory, BlockCosts(restore_ms=3, compute_ms=2))
    device.run(list(range(13)))
    device.cache.save_all()
    assert memory.bytes_used == 0


def test_reuse_is_what_it_is_said_to_be_over_random_turns() -> None:
    rng = random.Random(2)
    device = Device(12, HostMemory(150))
    reused = sum(
        device.run([rng.randrange(2) for _ in range(rng.randint(1, 30))], rng.choice([b"a", b"b"])) for _ in range(3000)
    )
    assert reused > 1000


def test_host_memory_keeps_its_cap_and_what_is_dear() -> None:
    memory = HostMemory(100)
    memory.put(("dear", b"0"), "kept", size=10, worth=50, depth=0)
    for i in range(40):
        memory.put(("cheap", bytes([i])), i, size=10, worth=1, depth=0)
        assert memory.bytes_used <= 100
    assert memory.get(("dear", b"0")) == "kept"
    assert memory.get(("cheap", bytes([0]))) is None
    assert memory.get(("cheap", bytes([39]))) == 39
    memory.put(("huge", b"0"), "no", size=101, worth=1, depth=0)
    assert memory.get(("huge", b"0")) is None


def test_of_one_conversation_the_end_goes_before_the_beginning() -> None:
    memory = HostMemory(30)
    for depth in range(4):
        memory.put(("m", bytes([depth])), depth, size=10, worth=1, depth=depth)
    assert [("m", bytes([depth])) in memory for depth in range(4)] == [True, True, True, False]


def test_what_is_unused_sinks_below_what_is_used_however_dear() -> None:
    memory = HostMemory(50)
    memory.put(("m", b"dear"), 0, size=10, worth=5, depth=0)
    for i in range(100):
        memory.put(("m", bytes([i])), i, size=10, worth=1, depth=0)
        memory.get(("m", bytes([i])))
    assert ("m", b"dear") not in memory

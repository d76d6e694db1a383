"""The static engine: its window as a pure policy, and batches on real models against the continuous engine."""

from __future__ import annotations

import math
import time
from queue import SimpleQueue

import pytest
from tokenizers import Tokenizer

from gpu_daemon.engine.sequence import Delta, FinishReason, Sequence
from gpu_daemon.engine.static_engine import Collector, StaticEngine
from gpu_daemon.errors import LoadFailed
from gpu_daemon.runners.static_runner import StaticRunner
from gpu_daemon.runners.torch_runner import RunnerOptions
from tests.gpu_daemon.conftest import make_runner, make_tiny
from tests.gpu_daemon.driver import make_sequence, run_all
from tests.gpu_daemon.test_runner import PROMPTS, random_prompts

# --- The window ---


def waiting(*lengths: int, window: float = 1.0, max_sequences: int = 4, max_tokens: int = 1000) -> Collector:
    collector = Collector(window, max_sequences, max_tokens)
    collector.waiting.extend(make_sequence([5] * length, max_tokens=10) for length in lengths)
    return collector


def test_a_batch_begins_when_the_window_is_over() -> None:
    collector = waiting(5)
    assert collector.begins_in(100.0) == 1.0
    collector.waiting.append(make_sequence([5]))
    assert collector.begins_in(100.75) == 0.25
    assert collector.begins_in(101.5) == 0
    assert len(collector.begin()) == 2
    assert collector.begins_in(102.0) == math.inf


def test_a_full_batch_does_not_wait() -> None:
    collector = waiting(5, 5, 5, 5, 5)
    assert collector.begins_in(100.0) == 0
    assert len(collector.begin()) == 4
    assert collector.begins_in(107.0) == 1.0, "who came too late waits a window of his own"


def test_a_batch_is_no_larger_than_memory_once_padded() -> None:
    collector = waiting(10, 10, 80, 10, max_tokens=100)
    assert [len(s.tokens) for s in collector.begin()] == [10, 10]
    assert collector.free_tokens == 60
    for sequence in list(collector.running):
        collector.remove(sequence)
    assert [len(s.tokens) for s in collector.begin()] == [80]


def test_one_who_fills_memory_alone_still_runs() -> None:
    assert len(waiting(200, 5, max_tokens=100).begin()) == 1


def test_what_is_aborted_while_it_waits_closes_the_window() -> None:
    collector = waiting(5)
    collector.begins_in(100.0)
    collector.remove(collector.waiting[0])
    assert collector.begins_in(100.5) == math.inf
    assert collector.sequences() == []


# --- Batches ---


class Running:
    """A static engine, and what it delivered."""

    def __init__(self, runner: StaticRunner, *, window: float = 0.1, max_sequences: int = 32) -> None:
        self._deltas: SimpleQueue[Delta] = SimpleQueue()
        collector = Collector(window, max_sequences, runner.max_tokens)
        self.engine = StaticEngine("tiny", runner, collector, lambda _, deltas: [self._deltas.put(d) for d in deltas] and None)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.stop()

    def next(self) -> Delta:
        return self._deltas.get(timeout=60)

    def collect(self, sequences: list[Sequence]) -> dict[str, list[Delta]]:
        """The deltas of each until all have ended."""
        found: dict[str, list[Delta]] = {sequence.request_id: [] for sequence in sequences}
        going = set(found)
        while going:
            delta = self.next()
            assert delta.request_id in going, "a choice said something after its end"
            found[delta.request_id].append(delta)
            if delta.finish_reason is not None:
                going.remove(delta.request_id)
        return found

    def answers(self, sequences: list[Sequence]) -> list[list[int]]:
        self.engine.submit(sequences)
        found = self.collect(sequences)
        for sequence in sequences:
            told = [token for delta in found[sequence.request_id] for token in delta.token_ids]
            assert told == sequence.tokens[len(sequence.tokens) - len(told) :]
            assert [delta.first_index for delta in found[sequence.request_id]][-1] == sequence.index - 1
        return [sequence.generated for sequence in sequences]


def make_static(folder, **options) -> StaticRunner:
    defaults = {"device": "cpu", "max_model_len": 512, "kv_bytes": 2**28}
    return StaticRunner.load(folder, RunnerOptions(**{**defaults, **options}), lambda *_: None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> StaticRunner:
    return make_static(make_tiny(tmp_path_factory.mktemp("tiny") / "llama", "llama"))


@pytest.fixture(scope="module")
def continuous(tmp_path_factory):
    return make_runner(make_tiny(tmp_path_factory.mktemp("tiny") / "llama", "llama"))


def test_greedy_answers_equal_the_continuous_engine(tiny_folder) -> None:
    prompts = random_prompts(60)
    lengths = [1 + i % 17 for i in range(len(prompts))]

    def sequences() -> list[Sequence]:
        return [make_sequence(p, max_tokens=n) for p, n in zip(prompts, lengths, strict=True)]

    with Running(make_static(tiny_folder)) as running:
        assert running.answers(sequences()) == run_all(make_runner(tiny_folder), sequences())


def test_greedy_answers_equal_the_continuous_engine_on_real_weights(smollm2) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in PROMPTS[:12]]

    def sequences() -> list[Sequence]:
        return [make_sequence(p, max_tokens=12) for p in prompts]

    with Running(make_static(smollm2)) as running:
        assert running.answers(sequences()) == run_all(make_runner(smollm2), sequences(), step_tokens=512)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.5},
        {"temperature": 0.8, "top_k": 20, "min_p": 0.01, "presence_penalty": 1.0},
        {"logit_bias": ((7, 100.0),), "top_logprobs": 3},
        {"generated": [5, 6, 7], "temperature": 1.0},
    ],
)
def test_every_option_means_what_it_means_in_the_continuous_engine(llama, continuous, options: dict) -> None:
    def sequences() -> list[Sequence]:
        crowd = [make_sequence(p, temperature=1.0, seed=i) for i, p in enumerate(random_prompts(5))]
        return [make_sequence([9, 8, 7, 6], **{"seed": 11, "max_tokens": 10, **options}), *crowd]

    with Running(llama) as running:
        assert running.answers(sequences()) == run_all(continuous, sequences())


def test_logprobs_come_with_their_tokens(llama) -> None:
    wanted, plain = make_sequence([9, 8, 7], top_logprobs=2), make_sequence([1, 2, 3, 4])
    with Running(llama) as running:
        running.engine.submit([wanted, plain])
        found = running.collect([wanted, plain])
    for delta in found[wanted.request_id]:
        assert [entry.token_id for entry in delta.logprobs] == list(delta.token_ids)
        assert delta.logprobs[0].top[0] == (delta.token_ids[0], pytest.approx(delta.logprobs[0].logprob))
    assert not any(delta.logprobs for delta in found[plain.request_id])


def test_an_end_of_text_ends_its_own_row(llama) -> None:
    ends = make_sequence([9, 8, 7], max_tokens=20, ignore_eos=False, logit_bias=((0, 1000.0),))
    goes_on = make_sequence([9, 8, 7], max_tokens=20)
    with Running(llama) as running:
        running.engine.submit([ends, goes_on])
        found = running.collect([ends, goes_on])
    assert [d.finish_reason for d in found[ends.request_id]] == [FinishReason.STOP]
    assert [d.first_index for d in found[goes_on.request_id]] == list(range(20))
    assert found[goes_on.request_id][-1].finish_reason is FinishReason.LENGTH


def test_an_abort_and_a_deadline_end_a_row_before_the_next_step(llama) -> None:
    first, second, third = (make_sequence([9, 8, n], max_tokens=400) for n in range(3))
    second.deadline = time.monotonic() + 0.3
    with Running(llama) as running:
        running.engine.submit([first, second, third])
        while running.next().request_id != first.request_id:
            pass
        running.engine.abort(first.request_id, 1)
        ends = {}
        while len(ends) < 2:
            delta = running.next()
            assert delta.request_id not in ends
            if delta.finish_reason is not None:
                ends[delta.request_id] = delta.finish_reason
        assert ends == {first.request_id: FinishReason.CANCELLED, second.request_id: FinishReason.EXPIRED}
        assert running.engine.load.running == 1
        running.engine.abort_caller(third.caller)
        while (delta := running.next()).finish_reason is None:
            pass
        assert delta.finish_reason is FinishReason.CANCELLED


def test_stopping_ends_a_batch_within_a_step(llama) -> None:
    sequence = make_sequence([9, 8, 7], max_tokens=500)
    running = Running(llama)
    running.engine.submit([sequence])
    running.next()
    started = time.monotonic()
    running.engine.stop()
    assert time.monotonic() - started < 5
    assert sequence.index < 500


def test_who_comes_late_waits_for_the_whole_batch(llama) -> None:
    long, short, late = (make_sequence([9, n], max_tokens=tokens) for n, tokens in ((8, 60), (7, 2), (6, 2)))
    with Running(llama, window=0.02) as running:
        running.engine.submit([long, short])
        ends = []
        while len(ends) < 3:
            delta = running.next()
            if delta.finish_reason is not None:
                ends.append(delta.request_id)
            if ends == [short.request_id] and late not in running.engine._scheduler.sequences():
                running.engine.submit([late])
    assert ends == [short.request_id, long.request_id, late.request_id]


def test_a_batch_that_dies_takes_only_its_own(llama, monkeypatch) -> None:
    good, generate = make_sequence([5], max_tokens=2), llama.generate

    def dies(batch, after_step) -> None:
        monkeypatch.setattr(llama, "generate", generate)
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(llama, "generate", dies)
    with Running(llama, window=0.01) as running:
        bad = make_sequence([9], max_tokens=2)
        running.engine.submit([bad])
        assert (delta := running.next()).finish_reason is FinishReason.FAILED
        assert delta.error == "out_of_memory"
        assert len(running.answers([good])[0]) == 2


def test_its_load_is_told(llama) -> None:
    llama.warm()
    assert llama.prefill_ms_per_token > 0
    assert llama.decode_ms_per_token > 0
    with Running(llama) as running:
        running.answers([make_sequence(p, max_tokens=6) for p in random_prompts(8)])
        load = running.engine.load
        assert (load.step, load.tokens_total) == (6, llama.max_tokens)
        assert min(load.prefill_ms_per_token, load.decode_ms_per_token) > 0


def test_memory_for_less_than_one_sequence_is_a_clean_failure(tmp_path) -> None:
    folder = make_tiny(tmp_path / "tiny", "llama")
    with pytest.raises(LoadFailed, match="one sequence of 512 tokens"):
        make_static(folder, kv_bytes=4096)

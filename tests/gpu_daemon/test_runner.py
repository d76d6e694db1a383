"""The forward pass and the sampler against `transformers`' own `generate`, alone and in mixed batches."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from gpu_daemon.engine.kv_cache import KvCache
from gpu_daemon.engine.step_scheduler import StepScheduler
from gpu_daemon.errors import LoadFailed
from gpu_daemon.runners.batch import Batch
from gpu_daemon.runners.cpu.decoder import CpuDecoder
from gpu_daemon.runners.sampler import sample, uniform
from gpu_daemon.runners.torch_decoder import TorchDecoder
from gpu_daemon.runners.torch_runner import ARCHITECTURES
from gpu_daemon.runners.weights import take_decoder
from tests.gpu_daemon.conftest import make_runner, make_tiny
from tests.gpu_daemon.driver import make_sequence, run_all

OPENINGS = ["The capital of France is", "Once upon a time", "def fibonacci(n):", "2, 4, 6, 8,", "Water boils at", "a"]
TOPICS = ["the sea", "a lost dog", "tax law", "prime numbers", "Bach", "rain in May", "the Moon", "bread", "chess", "Kyoto"]
TOPICS += ["a red door", "iron", "bees", "the year 1969", "two brothers", "silence", "maps", "the number pi", "soup", "Rome"]
VERBS = ["Explain", "Write a poem about", "List three facts about", "Ask a question about", "Grandmother once told me about"]
VERBS += ["The history of", "class Visitor:  # about", "Q: What is known of", "In one word, describe", "Why do people like"]
PROMPTS = OPENINGS + [f"{verb} {topic}" for verb in VERBS for topic in TOPICS]


def load_reference(folder) -> transformers.PreTrainedModel:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return ARCHITECTURES[architecture].from_pretrained(folder, dtype=torch.float32).eval()


def assert_greedy(folder, prompts: list[list[int]], answers: list[list[int]]) -> None:
    """Every token is the one `generate` would choose: the first few answers are compared with it outright, and of all, each
    token with the likeliest after what comes before it, which is the same by induction and one forward an answer."""
    model = load_reference(folder)
    for prompt, answer in list(zip(prompts, answers, strict=True))[:5]:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": len(answer), "min_new_tokens": len(answer), "do_sample": False, "eos_token_id": None}
        assert model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist() == answer
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            likeliest = model(input_ids=torch.tensor([prompt + answer])).logits[0].argmax(-1).tolist()
        assert likeliest[len(prompt) - 1 : -1] == answer


def random_prompts(count: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(2, 300) for _ in range(rng.randint(1, 90))] for _ in range(count)]


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "torch"])
def test_greedy_tokens_equal_transformers_alone_and_in_mixed_batches(tiny_folder, compiled: bool) -> None:
    prompts = random_prompts(200)
    runner = make_runner(tiny_folder, compiled=compiled)
    together = run_all(runner, [make_sequence(p, max_tokens=12) for p in prompts], step_tokens=64)
    assert_greedy(tiny_folder, prompts, together)
    alone = [run_all(runner, [make_sequence(p, max_tokens=12)])[0] for p in prompts[:40]]
    assert alone == together[:40]


@pytest.mark.parametrize("decoder_class", [CpuDecoder, TorchDecoder])
def test_multimodal_rope_turns_each_section_by_its_own_position(tmp_path, decoder_class) -> None:
    folder = make_tiny(tmp_path, "qwen2_5_vl")
    tokens = torch.tensor([5, 6, 7, 8, 9, 10])
    angles = torch.tensor([[0, 1, 1, 1, 1, 5], [0, 1, 2, 1, 2, 5], [0, 1, 1, 2, 2, 5]])  # a 2 x 2 image between words
    model = load_reference(folder)
    with torch.no_grad():
        expected = model(input_ids=tokens[None], position_ids=angles[:, None]).logits[0, -1]
    options = {"threads": 2} if decoder_class is CpuDecoder else {}
    decoder = decoder_class(take_decoder(model, 64), blocks=4, length=64, **options)
    rows = np.arange(6)
    batch = Batch(tokens.numpy(), rows, angles.numpy(), np.zeros(6, np.int64), np.array([[2]]), ((0, 6),), np.array([5]))
    torch.testing.assert_close(decoder(batch)[0], expected, rtol=1e-4, atol=1e-4)


def test_preempted_sequences_lose_no_token(tiny_folder) -> None:
    prompts = random_prompts(24)
    runner = make_runner(tiny_folder)
    scheduler = StepScheduler(KvCache(16, runner.block_tokens), 64, 32)
    preempted = run_all(runner, [make_sequence(p, max_tokens=40, temperature=1.0) for p in prompts], scheduler=scheduler)
    assert scheduler.preemptions > 0
    assert preempted == run_all(runner, [make_sequence(p, max_tokens=40, temperature=1.0) for p in prompts])


@pytest.mark.timeout(300)
def test_greedy_tokens_equal_transformers_on_real_weights(smollm2) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    assert len(prompts) >= 200
    answers = run_all(make_runner(smollm2), [make_sequence(p, max_tokens=12) for p in prompts], step_tokens=512)
    assert_greedy(smollm2, prompts, answers)
    assert "Paris" in tokenizer.decode(answers[0])


def test_a_cached_beginning_changes_no_token(tiny_folder) -> None:
    runner = make_runner(tiny_folder)
    cache = KvCache(64, 16)
    turn = random_prompts(1)[0] * 2
    first = make_sequence(turn, max_tokens=6)
    run_all(runner, [first], cache=cache)
    longer = [*first.tokens, 7, 8, 9]
    second = make_sequence(longer, max_tokens=6)
    with_cache = run_all(runner, [second], cache=cache)
    assert with_cache == run_all(runner, [make_sequence(longer, max_tokens=6)], cache=KvCache(64, 16))
    assert second.cached == (len(first.tokens) - 1) // 16 * 16


def test_a_seed_draws_the_same_alone_among_others_and_resumed(tiny_folder) -> None:
    runner = make_runner(tiny_folder)
    options = {"temperature": 1.0, "top_p": 0.95, "seed": 11, "max_tokens": 10, "frequency_penalty": 0.5}
    prompt, *others = random_prompts(32)
    (alone,) = run_all(runner, [make_sequence(prompt, **options)])
    crowd = [make_sequence(p, temperature=1.0, seed=i) for i, p in enumerate(others)]
    assert run_all(runner, [make_sequence(prompt, **options), *crowd])[0] == alone
    assert run_all(runner, [make_sequence(prompt, generated=alone[:4], **options)])[0] == alone


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-45},
        {"top_p": 1e-30, "temperature": 2.0},
        {"top_k": 1, "temperature": 2.0},
        {"min_p": 1.0, "temperature": 2.0},
    ],
)
def test_extreme_settings_pick_the_likeliest_token(extreme: dict) -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1)) * 10
    (drawn,) = sample(logits, [make_sequence([1], **{"seed": 9, **extreme})])
    assert drawn.token_id == int(logits.argmax())


def test_samples_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    draws = [sample(logits, [make_sequence([1], temperature=1.0, seed=seed)])[0].token_id for seed in range(4000)]
    for token_id, share in enumerate((0.5, 0.3, 0.2)):
        assert abs(draws.count(token_id) / 4000 - share) < 0.03


def test_bias_penalties_and_logprobs() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    assert sample(logits, [make_sequence([1], logit_bias=((0, -100.0),))])[0].token_id == 1
    assert sample(logits, [make_sequence([1], generated=[0], presence_penalty=1.5)])[0].token_id == 1
    (drawn,) = sample(logits, [make_sequence([1], top_logprobs=2)])
    expected = torch.log_softmax(logits[0], -1)
    assert drawn.logprob.logprob == pytest.approx(float(expected[0]))
    assert [token_id for token_id, _ in drawn.logprob.top] == [0, 1]


def test_noise_is_uniform_and_depends_on_all_three() -> None:
    values = [uniform(seed, choice, index) for seed in range(20) for choice in range(5) for index in range(50)]
    assert len(set(values)) == len(values)
    assert 0 <= min(values) < 0.01 < 0.99 < max(values) < 1
    assert abs(sum(values) / len(values) - 0.5) < 0.02


@pytest.mark.parametrize("config", ["", "[]", '{"architectures": ["EvilForCausalLM"]}', "{"])
def test_strange_model_files_are_a_clean_failure(tmp_path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(LoadFailed):
        make_runner(tmp_path)

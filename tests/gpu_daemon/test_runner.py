"""The forward pass and the sampler against `transformers`' own `generate`, alone and in mixed batches."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from gpu_daemon.engine.kv_cache import KvCache
from gpu_daemon.errors import LoadFailed
from gpu_daemon.runners.sampler import sample, uniform
from tests.gpu_daemon.conftest import make_runner
from tests.gpu_daemon.driver import make_sequence, run_all

PROMPTS = ["The capital of France is", "Once upon a time", "def fibonacci(n):", "2, 4, 6, 8,", "Water boils at", "a"]


def reference(folder, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens,
            do_sample=False, use_cache=True, eos_token_id=None,
        )  # fmt: skip
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def random_prompts(count: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(2, 300) for _ in range(rng.randint(1, 90))] for _ in range(count)]


def test_greedy_tokens_equal_transformers_alone_and_in_mixed_batches(tiny_folder) -> None:
    prompts = random_prompts(40)
    expected = reference(tiny_folder, prompts, 12)
    runner = make_runner(tiny_folder)
    together = run_all(runner, [make_sequence(p, max_tokens=12) for p in prompts], step_tokens=32)
    alone = [run_all(runner, [make_sequence(p, max_tokens=12)])[0] for p in prompts]
    assert together == expected
    assert alone == expected


def test_greedy_tokens_equal_transformers_on_real_weights(smollm2) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    expected = reference(smollm2, prompts, 16)
    runner = make_runner(smollm2)
    assert run_all(runner, [make_sequence(p, max_tokens=16) for p in prompts]) == expected
    assert "Paris" in tokenizer.decode(expected[0])


def test_a_cached_beginning_changes_no_token(tiny_folder) -> None:
    runner = make_runner(tiny_folder)
    cache = KvCache(2, 10_000)
    turn = random_prompts(1)[0] * 2
    first = make_sequence(turn, max_tokens=6)
    run_all(runner, [first], cache=cache)
    longer = [*first.tokens, 7, 8, 9]
    second = make_sequence(longer, max_tokens=6)
    with_cache = run_all(runner, [second], cache=cache)
    assert with_cache == run_all(runner, [make_sequence(longer, max_tokens=6)], cache=KvCache(2, 10_000))
    assert second.cached == len(first.tokens) - 1


def test_a_seed_draws_the_same_alone_among_others_and_resumed(tiny_folder) -> None:
    runner = make_runner(tiny_folder)
    options = {"temperature": 1.0, "top_p": 0.95, "seed": 11, "max_tokens": 10, "frequency_penalty": 0.5}
    prompt, *others = random_prompts(8)
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

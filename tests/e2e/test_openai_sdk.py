"""The `openai` SDK against the whole stack, on real weights."""

from __future__ import annotations

import openai
import pytest

from tests.e2e.conftest import RunningStack

MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


@pytest.fixture
def client(stack: RunningStack):
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.key, max_retries=0, timeout=60) as client:
        yield client


def ask(client: openai.OpenAI, **fields):
    return client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, "max_tokens": 24, **fields})


def test_a_greedy_answer_is_right_and_counted(client) -> None:
    answer = ask(client, temperature=0)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id
    assert answer.service_tier == "default"


def test_a_stream_has_the_role_once_the_text_and_usage_last(client) -> None:
    chunks = list(ask(client, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert [c.choices[0].delta.role for c in chunks if c.choices and c.choices[0].delta.role] == ["assistant"]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == ask(client, temperature=0).choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert len({c.id for c in chunks}) == 1


def test_usage_is_streamed_only_to_who_asks(client) -> None:
    assert all(chunk.choices and chunk.usage is None for chunk in ask(client, stream=True, max_tokens=4))


def test_a_seed_repeats_itself_and_choices_differ(client) -> None:
    def texts() -> list[str]:
        return [choice.message.content for choice in ask(client, seed=7, n=3, temperature=1.2).choices]

    first = texts()
    assert first == texts()
    assert len(set(first)) > 1


def test_a_stop_string_ends_the_answer_and_is_not_shown(client) -> None:
    answer = ask(client, temperature=0, stop=["Paris"], stream=False)
    assert "Paris" not in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs_name_the_likeliest_tokens(client) -> None:
    answer = ask(client, temperature=0, logprobs=True, top_logprobs=3, max_tokens=5)
    for entry in answer.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob <= 0
        assert bytes(entry.bytes).decode(errors="replace") == entry.token


def test_logit_bias_bans_and_forces(client) -> None:
    first = ask(client, temperature=0, max_tokens=1, logprobs=True).choices[0].logprobs.content[0]
    banned = ask(client, temperature=0, max_tokens=1, logit_bias={504: -100, 1885: 100})
    assert banned.choices[0].message.content != first.token


def test_penalties_change_a_repetitive_answer(client) -> None:
    prompt = [{"role": "user", "content": "Repeat the word echo forever: echo echo echo echo echo"}]
    plain = ask(client, messages=prompt, temperature=0, max_tokens=40)
    punished = ask(client, messages=prompt, temperature=0, max_tokens=40, frequency_penalty=2, presence_penalty=2)
    assert plain.choices[0].message.content != punished.choices[0].message.content


def test_both_names_of_the_token_limit(client) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, **{name: 3})
        assert answer.usage.completion_tokens == 3
        assert answer.choices[0].finish_reason == "length"


def test_completions_take_text_lists_and_token_ids(client) -> None:
    one = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0)
    assert "Paris" in one.choices[0].text
    several = client.completions.create(model=MODEL, prompt=["One, two,", "A, B,"], max_tokens=3, temperature=0)
    assert [choice.index for choice in several.choices] == [0, 1]
    ids = client.completions.create(model=MODEL, prompt=[504, 3575, 282], max_tokens=3, logprobs=2, temperature=0)
    assert len(ids.choices[0].logprobs.tokens) == 3


def test_models_are_listed_and_described(client) -> None:
    assert {model.id for model in client.models.list()} >= {MODEL, "qwen3-14b", "kokoro-82m"}
    described = client.models.retrieve(MODEL)
    assert described.state == "ready"
    assert described.max_model_len == 8192


@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model_not_found"),
        ({"model": "kokoro-82m"}, openai.NotFoundError, "model_not_found"),
        ({"model": "qwen3-14b"}, openai.InternalServerError, "model_not_loaded"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "context_length_exceeded"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value"),
        ({"extra_body": {"tp_size": 2}}, openai.BadRequestError, "unsupported_parameter"),
        ({"service_tier": "priority"}, openai.PermissionDeniedError, "priority_not_allowed"),
    ],
)
def test_refusals_are_the_sdk_s_own_exceptions(client, fields, error, code) -> None:
    with pytest.raises(error) as refusal:
        ask(client, **fields)
    assert refusal.value.code == code
    assert refusal.value.request_id


def test_fields_without_meaning_here_are_accepted(client) -> None:
    answer = ask(client, user="u", store=False, metadata={"a": "b"}, max_tokens=1)
    assert answer.choices


def test_an_unknown_key_is_refused(stack: RunningStack) -> None:
    stranger = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="sk-" + "x" * 43, max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError) as refusal:
        stranger.models.list()
    assert refusal.value.code == "invalid_api_key"

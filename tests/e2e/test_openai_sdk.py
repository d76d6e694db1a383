"""The `openai` SDK against the whole stack, on real weights."""

from __future__ import annotations

import json

import jsonschema
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


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 30}, "unit": {"enum": ["celsius", "fahrenheit"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
WEATHER = {"type": "function", "function": {"name": "get_weather"}}
ASK = [{"role": "user", "content": "What is the weather in Paris?"}]


def as_schema(strict: bool | None) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": strict}}


@pytest.mark.parametrize("strict", [True, False, None])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_json_schema_is_followed(client, strict, temperature) -> None:
    options = {"response_format": as_schema(strict), "temperature": temperature, "seed": 3, "n": 2, "max_tokens": 200}
    for choice in ask(client, **options).choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), PERSON)


def test_a_json_schema_is_followed_in_a_stream(client) -> None:
    chunks = list(ask(client, response_format=as_schema(True), stream=True, max_tokens=200, seed=1))
    jsonschema.validate(json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks)), PERSON)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_any_json_object_and_what_is_cut_short(client) -> None:
    whole = ask(client, response_format={"type": "json_object"}, temperature=0, max_tokens=400).choices[0]
    if whole.finish_reason == "stop":
        assert isinstance(json.loads(whole.message.content), dict)
    cut = ask(client, response_format=as_schema(True), max_tokens=3).choices[0]
    assert cut.finish_reason == "length"
    assert cut.message.content.startswith("{")


def test_plain_text_is_a_format_too(client) -> None:
    assert "Paris" in ask(client, response_format={"type": "text"}, temperature=0).choices[0].message.content


@pytest.mark.parametrize("choice", ["required", WEATHER])
def test_a_call_that_must_be_is_made(client, choice) -> None:
    options = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 120}
    answer = ask(client, messages=ASK, temperature=0, **options).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    assert call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        jsonschema.validate(arguments, TOOLS[0]["function"]["parameters"])
    else:
        assert choice == "required"
        assert arguments == {}


def test_streamed_calls_have_their_name_once_and_arguments_in_pieces(client) -> None:
    options = {"tools": TOOLS, "tool_choice": WEATHER, "max_tokens": 120, "temperature": 0}
    whole = ask(client, messages=ASK, **options).choices[0].message.tool_calls[0]
    chunks = list(ask(client, messages=ASK, stream=True, **options))
    pieces = [piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or []]
    assert [(piece.id is not None, piece.type, piece.function.name) for piece in pieces[:2]] == [
        (True, "function", "get_weather"), (False, None, None),
    ]  # fmt: skip
    assert {piece.index for piece in pieces} == {0}
    assert all(piece.id is None and piece.function.name is None for piece in pieces[1:])
    assert len(pieces) > 3
    assert "".join(piece.function.arguments for piece in pieces) == whole.function.arguments
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_sdk_s_own_accumulator_puts_a_stream_together(client) -> None:
    options = {"model": MODEL, "messages": ASK, "tools": TOOLS, "tool_choice": WEATHER, "max_tokens": 120}
    with client.chat.completions.stream(**options) as stream:
        choice = stream.get_final_completion().choices[0]
    (call,) = choice.message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), TOOLS[0]["function"]["parameters"])
    assert choice.finish_reason == "tool_calls"


def test_a_model_may_answer_in_words_and_must_where_there_is_no_choice(client) -> None:
    for choice in ("auto", "none"):
        answer = ask(client, tools=TOOLS, tool_choice=choice, temperature=0, max_tokens=60).choices[0]
        assert answer.message.content or answer.message.tool_calls
        for call in answer.message.tool_calls or []:
            assert call.function.name in ("get_weather", "get_time")
        assert choice == "auto" or not answer.message.tool_calls


def test_the_result_of_a_call_goes_back_to_the_model(client) -> None:
    first = ask(client, messages=ASK, tools=TOOLS, tool_choice=WEATHER, max_tokens=120).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "Sunny, 21 degrees."}
    answer = ask(client, messages=[*ASK, first, result], temperature=0)
    plain = ask(client, messages=ASK, temperature=0)
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens + 20


def test_a_model_that_does_not_think_says_so_in_its_usage(client) -> None:
    answer = ask(client, reasoning_effort="none", extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0
    assert not hasattr(answer.choices[0].message, "reasoning_content")


def test_fields_without_meaning_here_are_accepted(client) -> None:
    answer = ask(client, user="u", store=False, metadata={"a": "b"}, max_tokens=1)
    assert answer.choices


def test_an_unknown_key_is_refused(stack: RunningStack) -> None:
    stranger = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="sk-" + "x" * 43, max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError) as refusal:
        stranger.models.list()
    assert refusal.value.code == "invalid_api_key"

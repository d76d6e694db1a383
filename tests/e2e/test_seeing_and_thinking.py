"""Pictures and thoughts through chats, responses and messages: tiny models, whose words are chance and whose shapes are not."""

from __future__ import annotations

import base64
import json

import anthropic
import openai
import openresponses_types.types as spec
import pytest

from tests.e2e.bad_input import SEEING
from tests.e2e.conftest import RunningStack
from tests.e2e.test_responses import COMPLIANCE, EVENTS, check, frames, user
from tests.pictures import data_url, picture

THINKER = "qwen3-14b"
QUESTION = "What is this?"
PICTURE = data_url(picture(112, 56))
SEEN = {"input": [user([{"type": "input_text", "text": QUESTION}, {"type": "input_image", "image_url": PICTURE}])]}
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture
def client(media_stack: RunningStack):
    with openai.OpenAI(base_url=f"{media_stack.url}/v1", api_key=media_stack.key, max_retries=0, timeout=110) as client:
        yield client


@pytest.fixture
def claude(media_stack: RunningStack):
    with anthropic.Anthropic(base_url=media_stack.url, api_key=media_stack.key, max_retries=0, timeout=110) as client:
        yield client


# --- Seeing -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_all_that_the_compliance_suite_asks_of_a_model_that_sees(media_stack: RunningStack, stream: bool) -> None:
    with media_stack.client() as http:
        for name, body in {**COMPLIANCE, "a picture": SEEN}.items():
            effortless = {key: value for key, value in body.items() if key != "reasoning"}  # it does not think
            sent = {"model": SEEING, "max_output_tokens": 40, "stream": stream, **effortless}
            answer = http.post("/v1/responses", json=sent)
            assert answer.status_code == 200, (name, answer.text)
            events = frames(answer.text) if stream else []
            for event in events:
                EVENTS[event["type"]].model_validate(event)
            whole = events[-1]["response"] if stream else answer.json()
            check(whole)
            assert whole["output"], name


def test_a_picture_is_counted_and_not_computed_again(client) -> None:
    parts = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": PICTURE}}]
    asked = {"model": SEEING, "messages": [{"role": "user", "content": parts}], "max_tokens": 4}
    first, again = (client.chat.completions.create(**asked).usage for _ in range(2))
    assert first.prompt_tokens_details.to_dict()["image_tokens"] == 8
    assert again.prompt_tokens_details.cached_tokens > 8
    blind = {**asked, "model": "smollm2-135m"}
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(**blind)
    assert refusal.value.param == "messages[0].content[1].image_url"


def test_a_conversation_about_a_picture_goes_on(client) -> None:
    first = client.responses.create(model=SEEING, max_output_tokens=4, **SEEN)
    second = client.responses.create(model=SEEING, max_output_tokens=4, input="And its colour?", previous_response_id=first.id)
    assert second.usage.input_tokens > first.usage.input_tokens
    kept = client.responses.input_items.list(first.id).data[0].content
    assert [part.type for part in kept] == ["input_text", "input_image"]


def test_a_message_may_have_a_picture(claude) -> None:
    data = base64.b64encode(picture(112, 56)).decode()
    shown = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    asked = {"role": "user", "content": [shown, {"type": "text", "text": QUESTION}]}
    answer = claude.messages.create(model=SEEING, max_tokens=4, messages=[asked])
    said = claude.messages.create(model=SEEING, max_tokens=4, messages=[{"role": "user", "content": QUESTION}])
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens > said.usage.input_tokens + 8


# --- Thinking: what must end as JSON begins with a thought ------------------------------------------------------------------


def test_a_response_has_its_reasoning_as_an_item_with_events_of_its_own(client) -> None:
    asked = {"model": THINKER, "input": QUESTION, "max_output_tokens": 60, "reasoning": {"effort": "medium"},
             "text": {"format": {"type": "json_object"}}}  # fmt: skip
    events = list(client.responses.create(**asked, stream=True))
    for event in events:  # of thoughts the specification has another name than the SDK, whose name is ours
        kind = event.type.replace("reasoning_text", "reasoning")
        EVENTS[kind].model_validate({**event.to_dict(), "type": kind})
    kinds = [event.type for event in events]
    added, done = kinds.index("response.output_item.added"), kinds.index("response.output_item.done")
    assert events[added].item.type == events[done].item.type == "reasoning"
    assert kinds[added + 1] == "response.content_part.added"
    assert set(kinds[added + 2 : done - 2]) == {"response.reasoning_text.delta"}
    assert kinds[done - 2 : done] == ["response.reasoning_text.done", "response.content_part.done"]
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert thought
    assert events[done].item.content[0].text == thought
    last = events[-1].response
    assert last.output[0].type == "reasoning"
    assert last.usage.output_tokens_details.reasoning_tokens > 0
    spec.ResponseResource.model_validate(last.to_dict())


def test_a_message_has_its_thinking_as_a_block_with_deltas_of_its_own(claude) -> None:
    asked = {"model": THINKER, "max_tokens": 1100, "messages": [{"role": "user", "content": QUESTION}],
             "thinking": {"type": "enabled", "budget_tokens": 1024},
             "output_config": {"format": {"type": "json_schema", "schema": OBJECT}}}  # fmt: skip
    with claude.messages.stream(**{**asked, "max_tokens": 1100}) as stream:
        events = [event for event in stream if event.type in ("content_block_start", "content_block_delta", "message_stop")]
        final = stream.get_final_message()
    assert events[0].content_block.type == "thinking"
    assert events[1].delta.type == "thinking_delta"
    assert final.content[0].type == "thinking"
    assert final.content[0].thinking
    if final.stop_reason == "end_turn":
        assert json.loads(final.content[-1].text).keys() == {"a"}


def test_a_chat_has_its_reasoning_by_both_names(client) -> None:
    asked = {"model": THINKER, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 40,
             "response_format": {"type": "json_object"}}  # fmt: skip
    answer = client.chat.completions.create(**asked, reasoning_effort="high")
    message = answer.choices[0].message.to_dict()
    assert message["reasoning_content"] == message["reasoning"] != ""
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    silent = client.chat.completions.create(**asked, reasoning_effort="none")
    assert "reasoning_content" not in silent.choices[0].message.to_dict()
    assert silent.usage.completion_tokens_details.reasoning_tokens == 0

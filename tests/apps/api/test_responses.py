"""Responses and messages from their parts: what items become, and what events become, reasoning included."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from asgiref.sync import sync_to_async
from django.core.management import call_command
from django.utils import timezone
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from apps.accounts.models import Organization, Plan
from apps.api.anthropic.render import MessageRenderer
from apps.api.anthropic.schemas import CreateMessage
from apps.api.models import StoredResponse
from apps.api.paging import page
from apps.api.prepare import Prepared
from apps.api.responses import items, seal, store
from apps.api.responses.render import ResponseRenderer
from apps.api.responses.schemas import CreateResponse
from apps.api.schemas import parse
from apps.core.errors import InvalidRequest, NotFound, Unavailable
from apps.core.types import ChoiceFinished, FinishReason, Outcome, RequestFinished, TextDelta, ToolCallDelta, Usage
from apps.fleet.selectors import ModelCard
from apps.fleet.tokenizers import ModelTokenizer
from tests.apps.scheduler.factories import make_request

USER = {"type": "message", "role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}


def chat(*sent: dict) -> list[tuple[int, dict]]:
    body = parse(CreateResponse, {"model": "m", "input": list(sent)})
    return list(items.chat([items.plain(item) for item in body.input], lambda text: text))


def test_reasoning_words_and_calls_are_one_message_of_the_assistant_s() -> None:
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok"}]}
    output = {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "x"}]}
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert chat(USER, THOUGHT, said, CALL, output) == [
        (0, {"role": "user", "content": [{"type": "text", "text": "hi"}]}),
        (1, {"role": "assistant", "content": "ok", "reasoning_content": "hm", "tool_calls": [call]}),
        (4, {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "x"}]}),
    ]


def test_words_after_words_or_calls_are_a_message_of_their_own() -> None:
    said = {"type": "message", "role": "assistant", "content": "a"}
    roles = [(number, message["content"]) for number, message in chat(said, said, CALL, said)]
    assert roles == [(0, "a"), (1, "a"), (3, "a")]


def test_a_seal_opens_for_its_organization_alone() -> None:
    sealed = seal.sealed("1", "secret")
    assert seal.opened("1", sealed, "p") == "secret"
    assert "secret" not in sealed
    for org, text in (("2", sealed), ("1", sealed[:-4]), ("1", "é")):
        with pytest.raises(InvalidRequest):
            seal.opened(org, text, "p")


# --- Events ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(smollm2: Path) -> Prepared:
    card = ModelCard("smollm2-135m", "t", "text", "o", context_length=8192, parameters=1, thinking=False, created=0)
    return Prepared(make_request(id="resp_" + "0" * 24), card, ModelTokenizer(smollm2), "default")


EVENTS = [
    TextDelta(0, 0, (1,), "", reasoning="Let me "),
    TextDelta(0, 1, (2,), "", reasoning="see."),
    TextDelta(0, 2, (3,), "I look."),
    TextDelta(0, 3, (4,), "", tool_calls=(ToolCallDelta(0, id="call_0", name="f"), ToolCallDelta(0, arguments='{"a":'))),
    TextDelta(0, 4, (5,), "", tool_calls=(ToolCallDelta(0, arguments=" 1}"),)),
    TextDelta(0, 5, (6,), "", tool_calls=(ToolCallDelta(1, id="call_1", name="g"), ToolCallDelta(1, arguments="{}"))),
]
END = RequestFinished(Outcome.SUCCEEDED, Usage(10, 6, 4, 2))


def response_renderer(prepared: Prepared) -> ResponseRenderer:
    body = parse(CreateResponse, {"model": "smollm2-135m", "input": "hi"})
    return ResponseRenderer(prepared, body.echo(tier="default"), 1)


def stream(renderer, events: list) -> list[dict]:
    bodies = [*renderer.opening(), *(body for event in events for body in renderer.step(event))]
    return json.loads(json.dumps(bodies))  # as they were when they were sent


def test_a_response_s_items_open_and_close_one_after_another(prepared: Prepared) -> None:
    events = [*EVENTS, ChoiceFinished(0, FinishReason.TOOL_CALLS), END]
    bodies = stream(response_renderer(prepared), events)
    for body in bodies:
        TypeAdapter(ResponseStreamEvent).validate_json(json.dumps(body), strict=True)
    response = bodies[-1]["response"]
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert response["output"][0]["content"] == [{"type": "reasoning_text", "text": "Let me see."}]
    assert [item["arguments"] for item in response["output"][2:]] == ['{"a": 1}', "{}"]
    assert len({item["id"] for item in response["output"]}) == 4
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    kinds = [body["type"].removeprefix("response.") for body in bodies]
    assert kinds[2:9] == [
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done",
        "content_part.done", "output_item.done",
    ]  # fmt: skip
    assert kinds[-5:] == ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
                          "output_item.done", "completed"]  # fmt: skip
    whole = response_renderer(prepared).whole(events)
    Response.model_validate_json(json.dumps(whole), strict=True)
    assert whole["output"] == response["output"]


def test_a_response_that_fails_keeps_what_was_said_as_incomplete(prepared: Prepared) -> None:
    renderer = response_renderer(prepared)
    stream(renderer, EVENTS[:3])
    *_, last = renderer.failed(Unavailable("The worker was lost.", code="worker_lost"), "")
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"] == {"code": "worker_lost", "message": "The worker was lost."}
    assert [item["status"] for item in last["response"]["output"]] == ["completed", "incomplete"]


def test_an_answer_of_nothing_is_a_message_of_nothing(prepared: Prepared) -> None:
    response = response_renderer(prepared).whole([ChoiceFinished(0, FinishReason.STOP), END])
    assert [part["text"] for item in response["output"] for part in item["content"]] == [""]


def test_a_message_s_blocks_open_and_close_one_after_another(prepared: Prepared) -> None:
    events = [*EVENTS, ChoiceFinished(0, FinishReason.TOOL_CALLS), END]
    bodies = stream(MessageRenderer(prepared), events)
    for body in bodies:
        if body["type"] != "ping":
            TypeAdapter(RawMessageStreamEvent).validate_json(json.dumps(body), strict=True)
    message = MessageRenderer(prepared).whole(events)
    Message.model_validate_json(json.dumps(message), strict=True)
    assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert message["content"][0]["thinking"] == "Let me see."
    assert message["content"][2]["input"] == {"a": 1}
    assert message["stop_reason"] == "tool_use"
    assert (message["usage"]["input_tokens"], message["usage"]["cache_read_input_tokens"]) == (6, 4)
    deltas = [body["delta"]["type"] for body in bodies if body["type"] == "content_block_delta"]
    assert deltas == ["thinking_delta", "thinking_delta", "signature_delta", "text_delta", *["input_json_delta"] * 3]
    assert [body["index"] for body in bodies if body["type"] == "content_block_start"] == [0, 1, 2, 3]


def test_a_tool_use_that_was_cut_short_has_no_input(prepared: Prepared) -> None:
    message = MessageRenderer(prepared).whole([*EVENTS[3:4], ChoiceFinished(0, FinishReason.LENGTH), END])
    assert (message["stop_reason"], message["content"][0]["input"]) == ("max_tokens", {})


def test_a_message_of_blocks_is_a_chat() -> None:
    sent = {
        "model": "m",
        "max_tokens": 5,
        "system": [{"type": "text", "text": "s"}],
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "a"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"b": 1}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "no", "is_error": True},
                {"type": "text", "text": "go on"},
            ]},
        ],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "stop_sequences": [str(n) for n in range(16)],
        "output_config": {"effort": "high"},
    }  # fmt: skip
    chat, places = parse(CreateMessage, sent).chat()
    assert [message.role for message in chat.messages] == ["system", "user", "assistant", "tool", "user"]
    assert places == ["system", "messages[0]", "messages[1]", "messages[2]", "messages[2]"]
    assert (chat.messages[2].thought, chat.messages[2].tool_calls[0].function.arguments) == ("hm", '{"b": 1}')
    assert chat.messages[3].text == "Error: no"
    assert (chat.max_calls, chat.reasoning_effort, len(chat.stops)) == (1, "high", 16)


# --- The store ---------------------------------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
async def test_a_stored_response_lapses_and_is_purged() -> None:
    plan = await sync_to_async(Plan.objects.create)(name="keeping")
    org = str((await sync_to_async(Organization.objects.create)(name="keeping", plan=plan)).pk)
    await store.save(org, {"id": "resp_1", "output": [{"id": "msg_1"}], "text": "a\0b"}, [{"id": "in_1"}])
    assert (await store.response(org, "resp_1"))["text"] == "a\0b"
    assert [item["id"] for item in await store.conversation(org, "resp_1")] == ["in_1", "msg_1"]
    await sync_to_async(StoredResponse.objects.update)(expires_at=timezone.now() - timedelta(seconds=1))
    with pytest.raises(NotFound):
        await store.response(org, "resp_1")
    await sync_to_async(call_command)("purge_responses", verbosity=0)
    assert await sync_to_async(StoredResponse.objects.count)() == 0


@pytest.mark.parametrize(
    ("query", "ids", "more"),
    [
        ({}, "dcba", False),
        ({"order": "asc", "limit": "2"}, "ab", True),
        ({"order": "asc", "limit": "2", "after": "b"}, "cd", False),
        ({"after": "a"}, "", False),
    ],
)
def test_a_list_is_read_page_by_page(query, ids, more) -> None:
    found = page([{"id": name} for name in "abcd"], query)
    assert ("".join(row["id"] for row in found["data"]), found["has_more"]) == (ids, more)


@pytest.mark.parametrize("query", [{"limit": "0"}, {"limit": "101"}, {"limit": "x"}, {"order": "up"}, {"after": "z"}])
def test_other_pages_are_refused_by_name(query) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        page([{"id": "a"}], query)
    assert refusal.value.param in query

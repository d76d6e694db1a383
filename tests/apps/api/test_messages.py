"""Messages with calls and results, and what an answer's events become."""

from __future__ import annotations

import pytest

from apps.api.messages import conversation
from apps.api.render import Said, said
from apps.api.schemas import ChatRequest, parse
from apps.core.errors import InvalidRequest
from apps.core.types import TextDelta, ToolCallDelta

USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLS = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL], "reasoning": "hm"}
TOOL = {"type": "function", "function": {"name": "f"}}


def body(**fields) -> ChatRequest:
    return parse(ChatRequest, {"model": "m", "messages": [USER], **fields})


def test_a_conversation_with_a_call_is_what_templates_read() -> None:
    result = {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "x"}]}
    assert conversation(body(messages=[USER, CALLS, result]).messages) == [
        USER,
        {
            "role": "assistant", "content": "", "reasoning_content": "hm",
            "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "x", "tool_call_id": "c1"},
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", ["", "{", "[1]", "9" * 5000, "[" * 5000])
def test_arguments_that_are_no_object_stay_what_they_are(arguments: str) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    message = conversation(body(messages=[USER, {**CALLS, "tool_calls": [call]}]).messages)[1]
    assert message["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    ("choice", "offered", "callable_now", "must"),
    [(None, 1, 1, False), ("auto", 1, 1, False), ("none", 0, 0, False), ("required", 1, 1, True), (TOOL, 1, 1, True)],
)
def test_what_a_choice_means(choice, offered: int, callable_now: int, must: bool) -> None:
    request = body(tools=[TOOL], tool_choice=choice)
    assert (len(request.offered), len(request.callable), request.must_call) == (offered, callable_now, must)


@pytest.mark.parametrize(
    ("fields", "thinking"),
    [
        ({}, None),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high"}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"chat_template_kwargs": {}}, None),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "none"}, False),
    ],
)
def test_what_is_asked_about_thinking(fields: dict, thinking: bool | None) -> None:
    assert body(**fields).thinking is thinking


def test_thinking_and_not_thinking_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        _ = body(chat_template_kwargs={"enable_thinking": False}, reasoning_effort="high").thinking


EVENTS = [
    TextDelta(0, 0, (1,), "", reasoning="hm"),
    TextDelta(0, 1, (2,), "ok"),
    TextDelta(0, 2, (3,), "", tool_calls=(ToolCallDelta(0, id="c0", name="f"),)),
    TextDelta(0, 3, (4,), "", tool_calls=(ToolCallDelta(0, '{"a"'),)),
    TextDelta(0, 4, (5,), "", tool_calls=(ToolCallDelta(0, ": 1}"), ToolCallDelta(1, "{}", id="c1", name="g"))),
]


def test_deltas_say_each_thing_once() -> None:
    assert [said(event) for event in EVENTS] == [
        {"reasoning_content": "hm", "reasoning": "hm"},
        {"content": "ok"},
        {"tool_calls": [{"index": 0, "id": "c0", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {
            "tool_calls": [
                {"index": 0, "function": {"arguments": ": 1}"}},
                {"index": 1, "id": "c1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ]
        },
    ]
    assert said(TextDelta(0, 0, (1,), "")) == {"content": ""}


def test_a_whole_message_has_all_of_them() -> None:
    whole = Said()
    for event in EVENTS:
        whole.add(event)
    calls = [("c0", "f", '{"a": 1}'), ("c1", "g", "{}")]
    assert whole.message == {
        "role": "assistant", "content": "ok", "refusal": None, "reasoning_content": "hm", "reasoning": "hm",
        "tool_calls": [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in calls],
    }  # fmt: skip
    assert Said().message == {"role": "assistant", "content": "", "refusal": None}

"""Reasoning, content and tool calls out of a text, however it is cut."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.core.types import FinishReason, OutputForm, SequenceDelta, Thought
from apps.scheduler.codec import decode_event
from apps.scheduler.output import OutputParser
from apps.scheduler.queue import Lease
from apps.scheduler.running import RunningText
from tests.apps.scheduler.factories import make_request
from tests.apps.scheduler.test_text import Letters

EVERYTHING = OutputForm(Thought.EXPECTED, tool_calls=True)
ARGUMENTS = st.dictionaries(
    st.text('ab}"\\n', max_size=3), st.text('}{"\\\n</tool_call>', max_size=12) | st.integers(), max_size=3
)


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def read(text: str, form: OutputForm, cuts: list[int]) -> tuple[str, str, list[tuple[str, str, str]]]:
    """(content, reasoning, [(id, name, arguments)]), put together as clients do."""
    parser = OutputParser(form, "c")
    content = reasoning = ""
    calls: list[tuple[str, str, str]] = []
    edges = [0, *sorted(cuts), len(text)]
    for start, end in itertools.pairwise(edges):
        parts = parser.push(text[start:end], at_end=False)
        content, reasoning = content + parts.content, reasoning + parts.reasoning
        assert len({piece.index for piece in parts.calls}) == len(parts.calls)
        for piece in parts.calls:
            if piece.id:
                assert piece.index == len(calls)
                calls.append((piece.id, piece.name, ""))
            identity, name, arguments = calls[piece.index]
            calls[piece.index] = (identity, name, arguments + piece.arguments)
    last = parser.push("", at_end=True)
    for piece in last.calls:
        identity, name, arguments = calls[piece.index]
        calls[piece.index] = (identity, name, arguments + piece.arguments)
    return content + last.content, reasoning + last.reasoning, calls


cut_anywhere = st.lists(st.integers(0, 400), max_size=30)


@given(st.text("ab <>/\n", max_size=20), st.text("ab <>\n", max_size=20), st.lists(ARGUMENTS, max_size=3), cut_anywhere)
def test_every_part_arrives_whole_however_it_is_cut(thought: str, said: str, calls: list[dict], cuts: list[int]) -> None:
    spelled = [json.dumps(arguments, ensure_ascii=False) for arguments in calls]
    text = f"<think>\n{thought}\n</think>\n\n{said}" + "\n".join(call("f", arguments) for arguments in spelled)
    content, reasoning, found = read(text, EVERYTHING, [min(cut, len(text)) for cut in cuts])
    assert reasoning == thought.strip("\n").rstrip()
    assert content == (said.lstrip("\n").rstrip() if calls else said.lstrip("\n"))
    assert found == [(f"c{i}", "f", arguments) for i, arguments in enumerate(spelled)]


@given(st.text("<think>/ tol_ca\n", max_size=30), cut_anywhere)
def test_text_without_a_form_is_shown_as_it_is(text: str, cuts: list[int]) -> None:
    assert read(text, OutputForm(), [min(cut, len(text)) for cut in cuts]) == (text, "", [])


@given(st.text("<thcal_>x\n", max_size=30).filter(lambda text: "<tool_call>" not in text), cut_anywhere)
def test_what_only_looks_like_a_tag_is_content(text: str, cuts: list[int]) -> None:
    assert read(text, OutputForm(tool_calls=True), [min(cut, len(text)) for cut in cuts])[0] == text


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"a": {"b": 1}', '{"a": {"b": 1}'),
        ('<tool_call>\n{"name": "f", "arguments": {"a": {"b": 1}}', '{"a": {"b": 1}}'),
        ('<tool_call>\n{"name": "f", "arguments": {"a": {"b": 1}}}', '{"a": {"b": 1}}'),
        ('<tool_call>\n{"name": "f", "arguments": {"a": "}', '{"a": "}'),
        ('<tool_call>\n{"name": "f", "arguments": ', ""),
    ],
)
def test_a_call_that_is_cut_short_shows_what_it_has(text: str, arguments: str) -> None:
    for cuts in ([], list(range(len(text)))):
        assert read(text, OutputForm(tool_calls=True), cuts) == ("", "", [("c0", "f", arguments)])


def test_a_prompt_that_began_the_thought_needs_no_tag() -> None:
    assert read("hm\n</think>\n\nyes", OutputForm(Thought.BEGUN), [1]) == ("yes", "hm", [])


def test_a_model_that_does_not_think_after_all_just_answers() -> None:
    assert read("  <thin ice", OutputForm(Thought.EXPECTED), list(range(11))) == ("  <thin ice", "", [])


def test_a_thought_without_end_is_all_reasoning() -> None:
    assert read("<think>a</thi", OutputForm(Thought.EXPECTED), [3]) == ("", "a</thi", [])


def deltas(text: str, first: int = 0, reason: FinishReason | None = FinishReason.STOP) -> list[SequenceDelta]:
    """One token a character and step."""
    ends = [None] * (len(text) - 1) + [reason]
    return [SequenceDelta("r-1", 1, 0, first + i, (ord(c),), finish_reason=ends[i]) for i, c in enumerate(text)]


def events(running: RunningText, text: str, first: int = 0, reason: FinishReason | None = FinishReason.STOP) -> list:
    emissions = [running.apply([delta]) for delta in deltas(text, first, reason)]
    events.reasoning = sum(emission.reasoning_tokens for emission in emissions)  # type: ignore[attr-defined]
    return [decode_event(row[3]) for emission in emissions for row in emission.deltas]


TEXT = "<think>\nhm\n</think>\n\nok\n" + call("f", '{"a": 1}')


def test_a_request_taken_up_by_another_attempt_shows_the_rest_and_no_more() -> None:
    request = make_request(id="chatcmpl-1", form=EVERYTHING)
    whole = events(RunningText(Lease(request, 1, 0), Letters), TEXT)
    for cut in range(1, len(TEXT)):
        log = events(RunningText(Lease(request, 1, 0), Letters), TEXT[:cut], reason=None)
        again = RunningText(Lease(request, 2, 0), Letters)
        again.replay(log)
        rest = events(again, TEXT[cut:], first=cut)
        assert [*log, *rest] == whole


def test_a_stop_after_a_call_is_for_the_client_to_act_and_thoughts_are_counted() -> None:
    request = make_request(id="chatcmpl-1", form=EVERYTHING)
    assert events(RunningText(Lease(request, 1, 0), Letters), TEXT)[-1].reason is FinishReason.TOOL_CALLS
    assert events.reasoning == len("\nhm\n</think>") + 1  # type: ignore[attr-defined]
    cut = events(RunningText(Lease(request, 1, 0), Letters), TEXT[:-20], reason=FinishReason.LENGTH)
    assert cut[-1].reason is FinishReason.LENGTH

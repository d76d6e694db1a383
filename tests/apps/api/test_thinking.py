"""Reasoning from the prompt to the message: a tiny model with a thinking vocabulary, through the real engine's parts."""

from __future__ import annotations

import json

import jsonschema
import pytest
from tokenizers import Tokenizer

from apps.api.grammar import AnswerForm
from apps.api.render import Said
from apps.core.types import FinishReason, OutputForm, SequenceDelta, TextDelta
from apps.fleet.tokenizers import ModelTokenizer
from apps.scheduler.codec import decode_event
from apps.scheduler.queue import Lease
from apps.scheduler.running import RunningText
from gpu_daemon.engine.grammar import GrammarCompiler
from tests.apps.fleet.test_tools_and_thinking import KNOWING, make
from tests.apps.scheduler.factories import make_request
from tests.gpu_daemon.conftest import make_runner, make_tiny
from tests.gpu_daemon.driver import make_sequence, run_all

ANSWER = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "sure": {"type": "boolean"}},
    "required": ["name", "sure"],
    "additionalProperties": False,
}
QUESTION = [{"role": "user", "content": "Who?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_tiny(tmp_path_factory.mktemp("thinking"), "qwen3")
    config = json.loads((folder / "config.json").read_text())
    make(folder, KNOWING)
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 257}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def answer(folder, form: AnswerForm, thinking: bool | None, *, end_bias: float) -> tuple[Said, int, str]:
    """(the message, its reasoning tokens, why it ended)"""
    tokenizer = ModelTokenizer(folder)
    prompt = tokenizer.encode_chat(QUESTION, (), thinking)
    thought = tokenizer.thought_after(prompt, thinking)
    form = AnswerForm(form.schema, form.functions, form.must_call, form.max_calls, thought)
    runner = make_runner(folder)
    end = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("</think>")
    sequence = make_sequence(prompt, max_tokens=150, temperature=1.0, logit_bias=((end, end_bias),))
    compiler = GrammarCompiler(folder / "tokenizer.json", runner.vocab_size, runner.eos_ids)
    (sequence.grammar,) = compiler.compile(form.lark(tokenizer.tags), [[]])
    (ids,) = run_all(runner, [sequence])
    output = OutputForm(thought, tool_calls=bool(form.functions))
    running = RunningText(Lease(make_request(id="chatcmpl-1", form=output), 1, 0), tokenizer.decoder)
    said, reasoning = Said(), 0
    for index, token_id in enumerate(ids):
        reason = FinishReason.STOP if index == len(ids) - 1 else None
        emission = running.apply([SequenceDelta("r", 1, 0, index, (token_id,), finish_reason=reason)])
        reasoning += emission.reasoning_tokens
        for row in emission.deltas:
            event = decode_event(row[3])
            if isinstance(event, TextDelta):
                said.add(event)
            else:
                said.reason = event.reason.value
    return said, reasoning, said.reason


def test_a_form_follows_the_reasoning(folder) -> None:
    said, reasoning, _ = answer(folder, AnswerForm(schema=ANSWER), None, end_bias=3)
    jsonschema.validate(json.loads(said.text), ANSWER)
    assert reasoning >= len(said.reasoning) + 2 > 2  # the tags, and a token a byte


def test_a_call_follows_the_reasoning(folder) -> None:
    said, reasoning, reason = answer(
        folder, AnswerForm(functions=[("f", ANSWER)], must_call=True, max_calls=1), True, end_bias=3
    )
    (call,) = said.calls
    jsonschema.validate(json.loads(call["function"]["arguments"]), ANSWER)
    assert (said.message["content"], reason) == (None, "tool_calls")
    assert reasoning > 2


def test_without_thinking_the_form_comes_at_once(folder) -> None:
    said, reasoning, _ = answer(folder, AnswerForm(schema=ANSWER), False, end_bias=100)
    jsonschema.validate(json.loads(said.text), ANSWER)
    assert (said.reasoning, reasoning) == ("", 0)
    assert "reasoning_content" not in said.message


def test_reasoning_without_end_is_no_answer(folder) -> None:
    said, reasoning, _ = answer(folder, AnswerForm(schema=ANSWER), None, end_bias=-100)
    assert said.text == ""
    assert said.reasoning
    assert reasoning == 150

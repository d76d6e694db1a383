"""Grammars of answers: hostile schemas are refused soon, good ones allow what they should."""

from __future__ import annotations

import asyncio
import time

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from apps.api.grammar import AnswerForm, check
from apps.core.errors import InvalidRequest
from apps.core.types import Thought
from tests.hostile_schemas import HARMLESS, REFUSED

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
SPECIALS = ("<|end|>", "<|start|>")
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
PARIS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
CLOCK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
FUNCTIONS = (("weather", CITY), ("clock", {"type": "object", "properties": {}, "additionalProperties": False}))


def byte_level(tags: tuple[str, ...]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: place for place, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIALS])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return tokenizer


def allows(form: AnswerForm, text: str, tags: tuple[str, ...]) -> bool | None:
    """Whether the grammar allows the text, token after token; None when it wants more."""
    tokenizer = byte_level(tags)
    vocabulary = LLTokenizer(tokenizer.to_str(), eos_token=[256])
    matcher = LLMatcher(vocabulary, form.lark(tags), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    for token_id in tokenizer.encode(text).ids:
        if not matcher.compute_logit_bias()[token_id]:
            return False
        matcher.consume_token(token_id)
    return True if matcher.is_accepting() else None


MUST = AnswerForm(functions=FUNCTIONS, must_call=True)
MAY = AnswerForm(functions=FUNCTIONS)
ONE = AnswerForm(functions=FUNCTIONS, max_calls=1)
JSON = AnswerForm(schema=CITY)
EITHER = AnswerForm(schema=CITY, functions=FUNCTIONS)
THINKS = AnswerForm(schema=CITY, thought=Thought.EXPECTED)
THINKING = AnswerForm(schema=CITY, thought=Thought.BEGUN)
THINKS_AND_MAY = AnswerForm(functions=FUNCTIONS, thought=Thought.EXPECTED)


@pytest.mark.parametrize("tags", [(), TAGS, TAGS[2:]], ids=["spelled", "tokens", "some"])
@pytest.mark.parametrize(
    ("form", "text", "allowed"),
    [
        (MUST, PARIS, True),
        (MUST, f"{PARIS}\n{CLOCK}", True),
        (MUST, "Let me see.", False),
        (MUST, PARIS.replace("Paris", "Paris\n"), False),
        (MUST, PARIS.replace("weather", "stranger"), False),
        (MUST, CLOCK.replace("{}", '{"city": "x"}'), False),
        (MUST, PARIS[:-12], None),
        (MAY, "Hello <b>there</b>\n{}", True),
        (MAY, "", True),
        (MAY, f"Let me see.\n{PARIS}\n{CLOCK}", True),
        (MAY, "Let me see. <tool_call>\nno", False),
        (ONE, PARIS, True),
        (ONE, f"{PARIS}\n", False),
        (JSON, '{"city": "é\\n"}', True),
        (JSON, '{"city":\n"x"}', False),
        (JSON, '{"city": "x"} ', False),
        (EITHER, '{"city": "x"}', True),
        (EITHER, PARIS, True),
        (EITHER, "words", False),
        (THINKS, '<think>\nhm {"a"} </b>\n</think>\n\n{"city": "x"}', True),
        (THINKS, '<think></think>{"city": "x"}', True),
        (THINKS, '{"city": "x"}', False),
        (THINKS, "<think>\nhm", None),
        (THINKING, 'hm\n</think>\n\n{"city": "x"}', True),
        (THINKS_AND_MAY, "<think>\nhm\n</think>\n\nHello", True),
        (THINKS_AND_MAY, f"<think>\nhm\n</think>\n\n{PARIS}", True),
    ],
)  # fmt: skip
def test_what_is_allowed(form: AnswerForm, text: str, allowed: bool | None, tags: tuple[str, ...]) -> None:
    assert allows(form, text, tags) is allowed


@pytest.mark.parametrize("name", REFUSED)
async def test_a_hostile_schema_is_refused_within_a_second_and_others_go_on(name: str) -> None:
    # Processor time, all threads': a neighbour on the machine must not fail the test, and holding the GIL costs as much.
    longest, last = 0.0, time.process_time()

    async def tick() -> None:
        nonlocal longest, last
        while True:
            await asyncio.sleep(0.005)
            now = time.process_time()
            longest, last = max(longest, now - last), now

    ticking = asyncio.create_task(tick())
    started = time.process_time()
    with pytest.raises(InvalidRequest) as refusal:
        await check(AnswerForm(schema=REFUSED[name]), ["response_format.json_schema.schema"])
    assert time.process_time() - started < 1
    ticking.cancel()
    assert longest < 0.25
    assert (refusal.value.code, refusal.value.param) == ("invalid_schema", "response_format.json_schema.schema")
    assert len(refusal.value.message) < 300
    assert "/" not in refusal.value.message.partition(":")[2]


@pytest.mark.parametrize("name", HARMLESS)
async def test_what_only_looks_hostile_is_enforced(name: str) -> None:
    started = time.process_time()
    await check(AnswerForm(schema=HARMLESS[name]), ["response_format"])
    assert time.process_time() - started < 1


async def test_the_schema_at_fault_is_named() -> None:
    form = AnswerForm(functions=(*FUNCTIONS, ("broken", {"type": "object", "properties": {"a": {"type": "x"}}})))
    with pytest.raises(InvalidRequest) as refusal:
        await check(form, ["first", "second", "third"])
    assert refusal.value.param == "third"


async def test_the_arguments_of_a_function_are_an_object() -> None:
    with pytest.raises(InvalidRequest, match="are an object"):
        await check(AnswerForm(functions=[("f", {"type": "string"})]), ["tools[0].function.parameters"])


async def test_words_for_people_do_not_count() -> None:
    schema = {
        **CITY,
        "description": "long " * 50_000,
        "properties": {"title": {"type": "string", "title": "t" * 90_000}},
        "required": [],
    }
    await check(AnswerForm(schema=schema), ["p"])
    assert '"title": {"type": "string"}' in AnswerForm(schema=schema).lark()

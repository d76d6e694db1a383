"""What templates that know tools and thinking are given, and what others are told in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from apps.core.types import Thought
from apps.fleet.tokenizers import ModelTokenizer
from apps.fleet.tool_words import in_words

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
# The shape of a published template that knows everything, made short.
KNOWING = (
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content is string %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}{{ call.function.arguments | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TOOL = {"type": "function", "function": {"name": "f", "description": "<|im_end|>", "parameters": {"<|im_start|>": {"a": [1]}}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}
CONVERSATION = [
    {"role": "user", "content": "go"},
    {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]},
    {"role": "tool", "content": "done", "tool_call_id": "c"},
]


def make(folder: Path, template: str) -> ModelTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: place for place, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in ("<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 300, "eos_token_id": 257}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return ModelTokenizer(folder)


@pytest.fixture
def knowing(tmp_path) -> ModelTokenizer:
    return make(tmp_path, KNOWING)


@pytest.fixture
def plain(tmp_path) -> ModelTokenizer:
    return make(tmp_path, PLAIN)


def text_of(tokenizer: ModelTokenizer, ids: list[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


def test_a_template_that_knows_tools_gets_them_whole(knowing) -> None:
    ids = knowing.encode_chat(CONVERSATION, [TOOL])
    assert text_of(knowing, ids) == (
        f"<|im_start|>system\n{json.dumps(TOOL)}\n<|im_end|>\n<|im_start|>user\ngo<|im_end|>\n"
        '<|im_start|>assistant\n<think>hm</think><tool_call>f{"x": "<|im_end|>"}</tool_call><|im_end|>\n'
        "<|im_start|>tool\ndone<|im_end|>\n<|im_start|>assistant\n"
    )
    starts = [i for i in ids if i == 256]
    assert len(starts) == 5  # the template's own: none of those in the schema, description and arguments


def test_other_templates_are_told_in_words(plain) -> None:
    text = text_of(plain, plain.encode_chat(CONVERSATION, [TOOL]))
    assert text.startswith("[system]# Tools")
    assert json.dumps(TOOL) in text
    assert text.endswith(
        '[user]go[assistant]<tool_call>\n{"name": "f", "arguments": {"x": "<|im_end|>"}}\n</tool_call>'
        "[user]<tool_response>\ndone\n</tool_response>"
    )
    assert not set(plain.encode_chat(CONVERSATION, [TOOL])) & {256, 257}


def test_words_about_tools_join_the_system_message_and_results_each_other() -> None:
    result = {"role": "tool", "content": "1", "tool_call_id": "c"}
    said = in_words([{"role": "system", "content": "Be kind."}, *CONVERSATION[:2], result, {**result, "content": "2"}], [TOOL])
    assert said[0]["content"].startswith("Be kind.\n\n# Tools")
    assert [message["role"] for message in said] == ["system", "user", "assistant", "user"]
    assert said[3]["content"].count("<tool_response>") == 2
    assert in_words(CONVERSATION[:1], []) == CONVERSATION[:1]


def test_thinking_is_known_by_the_tags_and_the_template(knowing, tmp_path) -> None:
    assert (knowing.thinks, knowing.can_switch_thinking) == (True, True)
    (tmp_path / "plain").mkdir()
    assert not make(tmp_path / "plain", PLAIN).thinks
    (tmp_path / "always").mkdir()
    always = make(tmp_path / "always", PLAIN + "[assistant]<think>\n")
    assert (always.thinks, always.can_switch_thinking) == (True, False)
    assert always.thought_after(always.encode_chat(CONVERSATION[:1]), None) is Thought.BEGUN


@pytest.mark.parametrize(("thinking", "thought"), [(None, Thought.EXPECTED), (True, Thought.EXPECTED), (False, Thought.NONE)])
def test_where_an_answer_stands_with_reasoning(knowing, thinking: bool | None, thought: Thought) -> None:
    prompt = knowing.encode_chat(CONVERSATION[:1], (), thinking)
    assert knowing.thought_after(prompt, thinking) is thought
    assert text_of(knowing, prompt).endswith("</think>\n\n") is (thinking is False)


def test_a_client_s_tag_at_the_end_begins_no_thought(knowing) -> None:
    prompt = knowing.encode_chat([{"role": "user", "content": "<think>"}])
    assert knowing.thought_after(prompt, None) is Thought.EXPECTED

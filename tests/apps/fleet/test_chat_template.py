"""Templates that cut, trim and compare clients' words, and words that would be special tokens if they could."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from apps.core.errors import InvalidRequest
from apps.fleet.chat_template import ChatTemplate
from apps.fleet.tokenizers import ModelTokenizer

SPECIALS = {"<|im_start|>": 256, "<|im_end|>": 257}
THINKING = {"<think>": 258, "</think>": 259}  # added, and not special: clients may write them
# Drops the reasoning of earlier turns and trims the rest, as published templates do.
CUTTING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content %}{{ m.content.split('</think>')[-1] | trim }}"
    "{% else %}{{ m.content | trim }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: place for place, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIALS])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in THINKING])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 300, "eos_token_id": 257}}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 256]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    (folder / "chat_template.jinja").write_text(CUTTING)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ModelTokenizer:
    return ModelTokenizer(folder)


def with_template(folder: Path, source: str) -> ModelTokenizer:
    found = ModelTokenizer(folder)
    found._config["chat_template"] = source
    return found


def reference(folder: Path, text: str) -> list[int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def specials(ids: list[int]) -> list[int]:
    return [token_id for token_id in ids if token_id in SPECIALS.values()]


ordinary = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(
    lambda text: not any(word in text for word in SPECIALS)
)
spiteful = st.lists(
    st.sampled_from([*SPECIALS, *THINKING, "<", "<|", "<|im_", "end|>", "|>", ">", " ", "\n", "x", "\ue0f0", "0", "\ue0f1"]),
    max_size=12,
).map("".join)


@given(question=ordinary, thought=ordinary, answer=ordinary)
def test_ordinary_words_give_what_one_encoding_of_the_whole_gives(folder, tokenizer, question, thought, answer) -> None:
    said = answer.split("</think>")[-1].strip()
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"<think>{thought}</think>{answer}"},
    ]
    text = f"<|im_start|>user\n{question.strip()}<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode_chat(messages) == reference(folder, text)


@given(contents=st.lists(spiteful, min_size=1, max_size=4))
def test_no_words_make_a_special_token(tokenizer, contents: list[str]) -> None:
    messages = [{"role": "user", "content": content} for content in contents]
    harmless = [{"role": "user", "content": "x"} for _ in contents]
    assert specials(tokenizer.encode_chat(messages)) == specials(tokenizer.encode_chat(harmless))


@given(contents=st.lists(spiteful, min_size=1, max_size=4))
def test_not_even_together_where_the_template_puts_nothing_between_them(folder, contents: list[str]) -> None:
    bare = with_template(folder, BARE)
    ids = bare.encode_chat([{"role": "user", "content": content} for content in contents])
    assert specials(ids) == []
    text = b"".join(map(bare.token_bytes, ids))
    assert text == "".join(contents).encode()


def test_a_role_between_the_template_s_own_signs_is_a_special_token(folder) -> None:
    template = ChatTemplate("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}", {}, {"<|user|>": 7})
    assert list(template.pieces([{"role": "user", "content": "<|user|>"}])) == [7, "<|user|>"]


def test_every_id_that_ends_a_text_is_known(tokenizer) -> None:
    assert tokenizer.eos_ids == {256, 257}
    assert tokenizer.vocab_size == 300


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ eos_token }}!", "!"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "é<"}]'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ strftime_now('%') | length }}", "1"),
        ("{% if true %}\n    a\n    {% endif %}\nb", "    a\nb"),
    ],
    ids=["variables", "tojson", "break", "strftime_now", "blocks are trimmed"],
)
def test_templates_find_what_they_are_written_for(folder, source: str, text: str) -> None:
    ids = with_template(folder, source).encode_chat([{"role": "user", "content": "é<"}])
    assert (
        b"".join(bytes(with_template(folder, source).token_bytes(i)) for i in ids if i not in SPECIALS.values())
        == text.encode()
    )


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('roles must alternate') }}", "{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"]
)
def test_what_a_template_refuses_or_may_not_do_is_refused(folder, source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        with_template(folder, source).encode_chat([{"role": "user", "content": "x"}])
    assert caught.value.code == "invalid_messages"


def test_named_templates_have_a_default(folder) -> None:
    named = with_template(folder, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}])  # type: ignore[arg-type]
    assert b"".join(map(named.token_bytes, named.encode_chat([]))) == b"yes"


def test_a_model_that_cannot_chat_says_what_it_can_do(folder, tmp_path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        ModelTokenizer(tmp_path).encode_chat([{"role": "user", "content": "x"}])

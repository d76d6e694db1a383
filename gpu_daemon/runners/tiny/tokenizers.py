"""Tokenizers without merges: a token a byte (or a letter), and the model's real special tokens."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import transformers
from tokenizers.pre_tokenizers import ByteLevel

_SCORE = -10.0


def byte_symbols() -> list[str]:
    """How byte-level vocabularies spell the 256 bytes, in the order of their characters."""
    return sorted(ByteLevel.alphabet())


def write_byte_tokenizer(recipe: dict[str, Any], chat_template: str, target: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json` of a byte-level vocabulary, special tokens before or behind the bytes."""
    added = recipe["added_tokens"]
    tokens = [*added, *byte_symbols()] if recipe["added_tokens_first"] else [*byte_symbols(), *added]
    ids = {token: number for number, token in enumerate(tokens)}
    plain = set(recipe["not_special"])
    whole: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[token], **_added(token, special=token not in plain)} for token in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": ids, "merges": []},
    }  # fmt: skip
    _write_json(target / "tokenizer.json", whole)
    config = {
        "tokenizer_class": recipe["class"],
        "model_max_length": recipe["model_max_length"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **recipe["special_tokens"],
        "chat_template": chat_template,
    }
    _write_json(target / "tokenizer_config.json", config)


def clip_tokenizer(recipe: dict[str, Any]) -> transformers.PreTrainedTokenizerBase:
    """256 bytes, the same at the end of a word, and the two marks around a text."""
    symbols = byte_symbols()
    specials = recipe["special_tokens"]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), specials["bos_token"], specials["eos_token"]]
    vocab = {token: number for number, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=recipe["model_max_length"], **specials)


def t5_tokenizer(recipe: dict[str, Any]) -> transformers.PreTrainedTokenizerBase:
    """Letters, digits and a little punctuation, each as likely as the other, and the extra ids."""
    specials = recipe["special_tokens"]
    scored = [(piece, 0.0) for piece in (specials["pad_token"], specials["eos_token"], specials["unk_token"])]
    pieces = ["▁", *string.ascii_letters, *string.digits, *".,!?'-"]
    scored += [(piece, _SCORE) for piece in pieces]
    return transformers.T5Tokenizer(
        vocab=scored, extra_ids=recipe["extra_ids"], model_max_length=recipe["model_max_length"], **specials
    )


def _added(content: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": content, **flags, "special": special}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

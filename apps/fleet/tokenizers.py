"""Text to token ids and back, on the site: the cost of a request is known before it is admitted.

A chat template is rendered with a private mark in place of each message's text. The template's own words may become
special tokens; a client's never do, whatever they spell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

from django.conf import settings
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from apps.core.errors import InvalidRequest, Unavailable

# Opens and closes a mark: private-use characters that are refused in clients' text.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_REPLACEMENT = "\ufffd"


@lru_cache(maxsize=32)
def tokenizer_for(model: str) -> ModelTokenizer:
    """The tokenizer in the model's folder, read once. Raises Unavailable when it is not there or cannot be read."""
    folder = settings.ENV.models_dir / model
    try:
        return ModelTokenizer(folder)
    except (OSError, ValueError, KeyError):
        raise Unavailable(
            f"The files of {model} are missing or damaged on this installation. An operator can fetch them with "
            f"`manage.py models pull {model}`.",
            code="model_not_loaded",
            param="model",
            retry_after_seconds=30,
        ) from None


class ModelTokenizer:
    """One model's vocabulary and chat template."""

    def __init__(self, folder: Path) -> None:
        self._config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
        model = json.loads((folder / "config.json").read_text())
        self._with_specials = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._plain.encode_special_tokens = True
        self.vocab_size: int = model["vocab_size"]
        eos = model.get("eos_token_id", [])
        self.eos_ids = frozenset(eos if isinstance(eos, list) else [eos])
        added = self._with_specials.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    def encode(self, text: str) -> list[int]:
        """Ids of a client's text; the spelling of a special token is plain text here."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation up to where the assistant speaks. Raises InvalidRequest for what the template refuses."""
        marked = [{**m, "content": f"{_OPEN}{index}{_CLOSE}"} for index, m in enumerate(messages)]
        ids: list[int] = []
        text = ""  # not encoded yet: a client's words and the template's ordinary ones are encoded as one
        for piece in self._render(marked).split(_OPEN):
            index, mark, words = piece.rpartition(_CLOSE)
            text += messages[int(index)]["content"] if mark else ""
            for part in self._special_pattern.split(words):
                if part in self._special_words:
                    ids += [*self.encode(text), self._special_words[part]]
                    text = ""
                else:
                    text += part
        return ids + self.encode(text)

    @cached_property
    def _special_words(self) -> dict[str, int]:
        return {token.content: i for i, token in self._with_specials.get_added_tokens_decoder().items()}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._special_words, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @cached_property
    def _template(self) -> Any:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda layout: datetime.now().astimezone().strftime(layout)
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        return environment.from_string(self._config["chat_template"])

    def _render(self, messages: list[dict[str, str]]) -> str:
        specials = {k: v for k, v in self._config.items() if k.endswith("_token") and isinstance(v, str)}
        try:
            rendered: str = self._template.render(messages=messages, add_generation_prompt=True, **specials)
        except TemplateError:
            message = "The model's chat template does not allow these messages in this order."
            raise InvalidRequest(message, code="invalid_messages", param="messages") from None
        return rendered

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; of byte-level vocabularies, exactly."""
        token = self._with_specials.id_to_token(token_id)
        if token is None:
            return b""
        if all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        return bytes(token.encode())

    def token_text(self, token_id: int) -> str:
        """A token by itself, unfinished characters replaced."""
        return self.token_bytes(token_id).decode(errors="replace")

    def decoder(self) -> TextDecoder:
        return TextDecoder(self)


class TextDecoder:
    """Ids to text as they come: whole characters only, special tokens left out."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending = b""

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete."""
        known = (i for i in ids if i not in self._tokenizer.special_ids)
        self._pending += b"".join(self._tokenizer.token_bytes(i) for i in known)
        end = _whole_characters(self._pending)
        text, self._pending = self._pending[:end].decode(errors="replace"), self._pending[end:]
        return text

    def flush(self) -> str:
        """What is left at the end: a character that never was completed shows as one replacement character."""
        text, self._pending = (_REPLACEMENT if self._pending else ""), b""
        return text


def _whole_characters(data: bytes) -> int:
    """Length of the part of `data` that does not end inside a UTF-8 character."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # the byte that begins the last character
            return len(data) - back if _width(byte) > back else len(data)
    return len(data)


def _width(first: int) -> int:
    """Bytes of the UTF-8 character that begins with `first`; 1 for what begins none."""
    return 2 if first >> 5 == 0b110 else 3 if first >> 4 == 0b1110 else 4 if first >> 3 == 0b11110 else 1


def _byte_of() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, other bytes for U+0100 and on (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_of()


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)

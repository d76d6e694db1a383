"""Text to token ids and back, on the site: the cost of a request is known before it is admitted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from django.conf import settings
from tokenizers import Tokenizer

from apps.core.errors import InvalidRequest, Unavailable
from apps.core.types import Thought
from apps.fleet.chat_template import ChatTemplate
from apps.fleet.pictures import picture_sizes

LONG_CHARACTERS = 4_000
_TAIL_TOKENS = 12  # more than <think> and a line break are ever spelled with
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
        config = _read(folder / "config.json")
        text_config = config.get("text_config", config)  # a vision model keeps its language model's figures there
        generation = folder / "generation_config.json"
        self.vocab_size: int = text_config["vocab_size"]
        self.hidden_size: int = text_config.get("hidden_size") or text_config.get("d_model") or 0
        self.eos_ids = _ids(text_config) | (_ids(_read(generation)) if generation.is_file() else frozenset())
        # Of a model that sees: what its pictures take, and the token that is repeated for each.
        self.picture_sizes = picture_sizes(folder) if "vision_config" in config else None
        self.picture_token: int | None = config.get("image_token_id")
        self._template_file = folder / "chat_template.jinja"
        self._config = _read(folder / "tokenizer_config.json")
        self._tokenizer = _tokenizer(folder / "tokenizer.json")
        added = self._tokenizer.get_added_tokens_decoder()
        self._specials: dict[str, int] = {token.content: i for i, token in added.items() if token.special}
        self.tags = frozenset(token.content for token in added.values() if not token.special)
        self.special_ids = frozenset(self._specials.values())

    def encode(self, text: str) -> list[int]:
        """Ids of a client's text; the spelling of a special token is plain text here."""
        if len(text) < LONG_CHARACTERS:
            found = self._tokenizer.encode(text, add_special_tokens=False)
        else:  # Lets other threads run meanwhile: `encode` holds the interpreter's lock to its end.
            (found,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        ids: list[int] = found.ids
        return ids

    def encode_framed(self, text: str) -> list[int]:
        """As `encode`, within the special tokens that the model was trained to see around a text."""
        (found,) = self._tokenizer.encode_batch([text], add_special_tokens=True)
        ids: list[int] = found.ids
        return ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
        pictures: Sequence[int] = (),
    ) -> list[int]:
        """Ids of a conversation up to where the assistant speaks, with as many for each picture as `pictures` says. Raises
        InvalidRequest for what the template refuses."""
        ids: list[int] = []
        left = list(pictures)
        for piece in self._template.pieces(messages, tools, thinking):
            if not isinstance(piece, int):
                ids += self.encode(piece)
            elif left and piece == self.picture_token:
                ids += [piece] * left.pop(0)
            else:
                ids.append(piece)
        if left:
            raise InvalidRequest("The model's chat template shows no images.", code="invalid_messages", param="messages")
        return ids

    @property
    def thinks(self) -> bool:
        """Whether the model reasons before it answers: its vocabulary has the tags and its template uses them."""
        return {"<think>", "</think>"} <= self.tags and self._template.knows_thinking

    @property
    def can_switch_thinking(self) -> bool:
        return self.thinks and self._template.can_switch_thinking

    def thought_after(self, prompt: Sequence[int], thinking: bool | None) -> Thought:
        """Where the answer to a prompt stands with the model's reasoning; `thinking` is what the prompt was made with."""
        if not self.thinks or thinking is False:
            return Thought.NONE
        end = b"".join(map(self.token_bytes, prompt[-_TAIL_TOKENS:]))
        return Thought.BEGUN if end.rstrip().endswith(b"<think>") else Thought.EXPECTED

    @cached_property
    def _template(self) -> ChatTemplate:
        variables = {key: _spelling(token) for key, token in self._config.items() if key.endswith("_token")}
        return ChatTemplate(self._template_source(), variables, self._specials)

    def _template_source(self) -> str:
        source = self._config.get("chat_template")
        if isinstance(source, list):  # named ones; "default" is for plain conversations
            source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
        if source is None and self._template_file.is_file():
            source = self._template_file.read_text()
        if source is None:
            message = "The model has no chat template, so it cannot chat; it can complete text at /v1/completions."
            raise InvalidRequest(message, code="no_chat_template", param="model")
        return str(source)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; of byte-level vocabularies, exactly."""
        token = self._tokenizer.id_to_token(token_id)
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


def _read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} does not hold an object")
    return found


def _tokenizer(path: Path) -> Tokenizer:
    """Raises ValueError for a file that is none: the library raises bare Exceptions."""
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise ValueError(f"{path.name} is not a tokenizer's file") from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()  # some files ask for a fixed length, for batches of other libraries
    tokenizer.no_truncation()
    return tokenizer


def _ids(config: dict[str, Any]) -> frozenset[int]:
    """The ids that end a text, which files give as one, as several or not at all."""
    eos = config.get("eos_token_id")
    return frozenset(eos) if isinstance(eos, list) else frozenset() if eos is None else frozenset({eos})


def _spelling(token: Any) -> str:
    """Of a special token, which files give as text or as an object that has it."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""

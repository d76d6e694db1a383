"""Renders a model's chat template around clients' words, and tells the one from the other.

The template sees clients' words as they are, because templates cut, trim and compare them, but for the spelling of
special tokens: those travel through it as private marks. What the template itself writes may become special tokens;
what a client writes never does, whatever it spells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from apps.core.errors import InvalidRequest
from apps.fleet.tool_words import in_words

# Around the number of a veiled spelling. Private-use characters; a client's own ones are veiled like a spelling.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


class ChatTemplate:
    """`specials` are the spellings and ids of the special tokens; `variables` are what else the template may name."""

    def __init__(self, source: str, variables: Mapping[str, str], specials: Mapping[str, int]) -> None:
        environment = _environment()
        self._template = environment.from_string(source)
        self._names = meta.find_undeclared_variables(environment.parse(source))
        self._source = source
        self._variables = variables
        self._specials = specials
        longest_first = sorted(specials, key=len, reverse=True)
        spellings = "|".join(map(re.escape, longest_first)) or "(?!)"  # the latter matches nothing
        self._spellings = re.compile(f"({spellings})")
        self._veiled = re.compile(f"{spellings}|{_OPEN}|{_CLOSE}")
        # What could become a spelling beside other words: the last character of a head is veiled, the first of a tail.
        self._heads = tuple({word[:end] for word in specials for end in range(1, len(word))})
        self._tails = tuple({word[start:] for word in specials for start in range(1, len(word))})

    @property
    def knows_tools(self) -> bool:
        return "tools" in self._names

    @property
    def knows_thinking(self) -> bool:
        return "<think>" in self._source

    @property
    def can_switch_thinking(self) -> bool:
        return "enable_thinking" in self._names

    def pieces(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), thinking: bool | None = None
    ) -> Iterator[str | int]:
        """The conversation up to where the assistant speaks: plain text, and ids of special tokens between it.

        A template that does not know tools is told of them in words; `thinking` is what it takes for enable_thinking.

        Raises InvalidRequest for messages that the template refuses.
        """
        originals: list[str] = []
        if not self.knows_tools:
            messages, tools = in_words(messages, tools), ()
        veiled = self._veil_all(list(messages), originals)
        options = {"tools": self._veil_all(list(tools), originals) or None}
        if thinking is not None:
            options["enable_thinking"] = thinking
        for part in self._spellings.split(self._render(veiled, options)):
            if part in self._specials:
                yield self._specials[part]
            elif part:
                yield _MARK.sub(lambda found: originals[int(found[1])], part)

    def _veil_all(self, value: Any, originals: list[str]) -> Any:
        """`value` with every text in it veiled, names of fields included: those of a tool's schema are a client's too."""
        if isinstance(value, str):
            return self._veil(value, originals)
        if isinstance(value, list):
            return [self._veil_all(item, originals) for item in value]
        if isinstance(value, Mapping):
            return {self._veil(key, originals): self._veil_all(item, originals) for key, item in value.items()}
        return value

    def _veil(self, text: str, originals: list[str]) -> str:
        """The text with marks in place of spellings; `originals` gets what each mark stands for."""

        def mark(original: str) -> str:
            originals.append(original)
            return f"{_OPEN}{len(originals) - 1}{_CLOSE}"

        text = self._veiled.sub(lambda found: mark(found[0]), text)
        body = text.strip()
        start = len(text) - len(text.lstrip())
        end = start + len(body)
        if body.endswith(self._heads):
            text = text[: end - 1] + mark(text[end - 1]) + text[end:]
        if body.startswith(self._tails) and len(body) > 1:
            text = text[:start] + mark(text[start]) + text[start + 1 :]
        return text

    def _render(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._variables, **options)
        except TemplateError:
            message = "The model's chat template does not allow these messages in this order."
            raise InvalidRequest(message, code="invalid_messages", param="messages") from None


def _environment() -> ImmutableSandboxedEnvironment:
    """What published templates are written for."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().astimezone().strftime(layout)
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, not escaped for HTML as Jinja's own filter does it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)

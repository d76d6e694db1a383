"""The grammar of an answer, in llguidance's dialect of Lark, and whether one can be enforced.

The written form is the same for every model: `<tool_call>`, a line `{"name": ..., "arguments": {...}}`, `</tool_call>`.
Where the vocabulary has a tag as a token of its own it must be that token; elsewhere it is spelled out.
JSON is written without whitespace but a space after `:` and `,`, so a model cannot go on for ever in blanks, and a line
break is the end of a call's JSON.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from apps.core.errors import InvalidRequest
from apps.core.types import Thought

Schema = Mapping[str, Any]
MAX_SCHEMA_CHARACTERS = 64 << 10  # of all schemas together, descriptions left out
MAX_STRING = 1_000  # a name, a value or a pattern
MAX_PATTERNS = 32
MAX_MET_PATTERNS = 8  # where several may hold for one string: each pair of them is intersected
MAX_CALLS = 16
# As the daemon's (gpu_daemon/engine/grammar.py), so what passes here passes there.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
_THREADS = 2
_PROBES = 4
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY = r"/(?s:.*)/"
_UNSUPPORTED = re.compile(r"Unimplemented keys: \[([^\]]{1,200})\]")
_executor = ThreadPoolExecutor(_THREADS, "grammar")


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What an answer may be. `functions` are the (name, schema of the arguments) that may be called."""

    schema: Schema | None = None
    functions: Sequence[tuple[str, Schema]] = ()
    must_call: bool = False
    max_calls: int = MAX_CALLS
    thought: Thought = Thought.NONE

    @property
    def is_free(self) -> bool:
        return self.schema is None and not self.functions

    def lark(self, tag_tokens: Collection[str] = ()) -> str:
        """The grammar; `tag_tokens` are the tags that the vocabulary has as tokens."""
        return "\n".join(self._rules({tag: tag if tag in tag_tokens else f'"{tag}"' for tag in _TAGS}))

    def _rules(self, tags: Mapping[str, str]) -> Iterator[str]:
        opening = f"{tags['<think>']} " if self.thought is Thought.EXPECTED else ""
        thought = "" if self.thought is Thought.NONE else rf"{opening}{_until('THOUGHT', tags['</think>'])} /\n{{0,2}}/ "
        yield f"start: {thought}({' | '.join(self._replies(tags))})"
        yield _free_text("THOUGHT", "</think>", tags)
        yield _free_text("TEXT", "<tool_call>", tags)
        if self.schema is not None:
            yield f"json: {_json(self.schema)}"
        if self.functions:
            names = " | ".join(f"f{i}" for i in range(len(self.functions)))
            yield rf'call: "\n" ({names}) "\n" {tags["</tool_call>"]}'
        for i, (name, schema) in enumerate(self.functions):
            head = json.dumps(f'{{"name": "{name}", "arguments": ')
            yield f'f{i}: {head} a{i} "}}"\na{i}: {_json(schema)}'

    def _replies(self, tags: Mapping[str, str]) -> Iterator[str]:
        if not self.must_call:
            yield "json" if self.schema is not None else "TEXT"
        if self.functions:
            more = rf' ("\n" {tags["<tool_call>"]} call){{0,{self.max_calls - 1}}}' if self.max_calls > 1 else ""
            talks = not self.must_call and self.schema is None
            opening = _until("TEXT", tags["<tool_call>"]) if talks else tags["<tool_call>"]
            yield f"{opening} call{more}"


_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def _until(text: str, tag: str) -> str:
    """Free text up to a tag: where the tag is spelled out, one lexeme that ends with it."""
    return f"until_{text.lower()}" if tag.startswith('"') else f"{text} {tag}"


def _free_text(name: str, end: str, tags: Mapping[str, str]) -> str:
    """Text that never spells out the tag that ends it, so that the tag is always read as what it is."""
    escaped = end.replace("/", r"\/")
    free = f"{name}: {_ANY} & ~/(?s:.*){escaped}(?s:.*)/"
    return f'{free}\nuntil_{name.lower()}[suffix="{end}"]: {_ANY}' if tags[end].startswith('"') else free


def _json(schema: Schema) -> str:
    return f"%json {json.dumps({**_bare(schema), 'x-guidance': _LAYOUT})}"


def _bare(schema: Any) -> Any:
    """Without words that are for people: agents' tools are mostly made of them."""
    if isinstance(schema, list):
        return [_bare(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: value if key in ("enum", "const", "default", "examples") else _bare(value)
        for key, value in schema.items()
        if not (key in ("description", "title") and isinstance(value, str))
    }


async def check(form: AnswerForm, params: Sequence[str]) -> None:
    """Raises InvalidRequest, which names the parameter, for a schema that is none, is too much or fits nothing.

    `params` names each schema: of the answer where there is one, then of each function.
    """
    schemas = [*([form.schema] if form.schema is not None else []), *(schema for _, schema in form.functions)]
    bound = [(param, _bare(schema)) for param, schema in zip(params, schemas, strict=True)]
    left = MAX_SCHEMA_CHARACTERS
    for param, schema in bound:
        left -= len(json.dumps(schema))
        if left < 0:
            raise _refusal(param, f"schemas may have {MAX_SCHEMA_CHARACTERS} characters in all, descriptions aside")
        _check_parts(param, schema)
    for param, (_, schema) in zip(params[len(bound) - len(form.functions) :], form.functions, strict=True):
        if schema["type"] != "object":
            raise _refusal(param, "the arguments of a function are an object")
    await asyncio.get_running_loop().run_in_executor(_executor, _compile_all, form, bound)


def _check_parts(param: str, schema: Schema) -> None:
    """Bounds what the compiler's own limits do not see."""
    patterns = met = 0
    for part in _walk(schema):
        if isinstance(part, str):
            if len(part) > MAX_STRING:
                raise _refusal(param, f"a name, value or pattern has more than {MAX_STRING} characters")
            continue
        named = part.get("patternProperties")
        patterns += (len(named) if isinstance(named, dict) else 0) + ("pattern" in part)
        met += "allOf" in part or ("pattern" in part and not part.keys().isdisjoint({"$ref", "anyOf"}))
        if "x-guidance" in part:
            raise _refusal(param, "x-guidance is not a keyword of JSON Schema")
    limit = MAX_MET_PATTERNS if met else MAX_PATTERNS
    if patterns > limit:
        raise _refusal(param, f"it has more than {limit} patterns" + (" and combines them" if met else ""))


def _walk(schema: Any) -> Iterator[dict[str, Any] | str]:
    """Every object and string of a schema, names included."""
    if isinstance(schema, str):
        yield schema
    elif isinstance(schema, list):
        for item in schema:
            yield from _walk(item)
    elif isinstance(schema, dict):
        yield schema
        for key, value in schema.items():
            yield key
            yield from _walk(value)


def _compile_all(form: AnswerForm, schemas: Sequence[tuple[str, Schema]]) -> None:
    """Each schema by itself, which tells whose fault it is, then the whole. Runs on a thread; the library lets others run."""
    bytes_only = LLTokenizer("byte")
    for param, schema in schemas:
        _compile(bytes_only, f"start: {_json(schema)}", param)
    if len(schemas) > 1:
        _compile(bytes_only, form.lark(), schemas[0][0].partition(".")[0].partition("[")[0])


def _compile(tokenizer: LLTokenizer, lark: str, param: str) -> None:
    matcher = LLMatcher(tokenizer, lark, log_level=0, limits=_LIMITS)
    _walk_into(matcher)
    if matcher.is_error():
        raise _refusal(param, _reason(matcher.get_error()))
    if matcher.is_stopped() and not matcher.is_accepting():
        raise _refusal(param, "nothing fits it")


def _walk_into(matcher: LLMatcher) -> None:
    """A few steps along the grammar: some limits, and dead ends, are met only there."""
    for _ in range(_PROBES):
        if matcher.is_stopped():  # errors too
            return
        allowed = matcher.compute_logit_bias()  # a byte a token: 200 where it may come next
        matcher.consume_token(max(allowed.rfind(b"\xc8", 0, 256), 0))


def _reason(problem: str) -> str:
    """What the client should know of the compiler's words."""
    if found := _UNSUPPORTED.search(problem):
        return f"keywords that are not supported: {found[1]}"
    if "oneOf" in problem:
        return "oneOf is supported only where its members exclude each other; use anyOf"
    if "Unsatisfiable" in problem or "NoExtension" in problem:
        return "nothing fits it"
    if any(word in problem.lower() for word in ("too many", "too large", "fuel", "max is", "limit")):
        return "it is too complex"
    return "it is not a JSON Schema that can be enforced"


def _refusal(param: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {reason}.", code="invalid_schema", param=param)

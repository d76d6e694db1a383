"""The OpenAI bodies we take, as strict schemas. What is unknown or not supported is refused by name, never ignored."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from apps.api.constraints import AllowedTools, Effort, NamedTool, ResponseFormat, TemplateOptions, Tool, ToolChoice, Tools
from apps.api.grammar import MAX_CALLS
from apps.api.messages import Message
from apps.api.strict import Number, Strict, Text, invalid, unsupported
from apps.core.errors import InvalidRequest
from apps.core.types import Priority

MAX_MESSAGES = 256
MAX_LOGIT_BIAS = 1024
MAX_CHOICES = 4
MAX_STOPS = 4
MAX_PROMPTS = 32
_UNION_MEMBERS = frozenset({"str", "list"})  # and what begins with a capital


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False
    include_queue: bool = False  # ours: the place in the queue, while waiting


class Tiered(Strict):
    """What every body that names a model takes. A field sent as null is as if it were not sent."""

    ignored = frozenset({"user", "store", "metadata", "safety_identifier", "prompt_cache_key", "verbosity"})
    model: str
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None

    @property
    def priority(self) -> Priority | None:
        """None: whatever the key's class is."""
        return None if self.service_tier in (None, "auto") else Priority[self.service_tier.upper()]


class Sampling(Tiered):
    """What both endpoints of text take."""

    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: Number | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: (
        Annotated[str, Field(min_length=1, max_length=64)]
        | Annotated[list[Annotated[Text, Field(min_length=1, max_length=64)]], Field(max_length=MAX_STOPS)]
        | None
    ) = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Number], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def include_queue(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_queue

    def biases(self, vocab_size: int) -> tuple[tuple[int, float], ...]:
        """Raises InvalidRequest for what is not a token of the model, or not between -100 and 100."""
        biases = []
        for key, bias in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and int(key) < vocab_size):
                raise invalid(f"logit_bias: {key[:20]!r} is not a token id of this model.", "logit_bias")
            if not -100 <= bias <= 100 or not math.isfinite(bias):
                raise invalid("logit_bias: values are between -100 and 100.", "logit_bias")
            biases.append((int(key), bias))
        return tuple(biases)


class ChatRequest(Sampling):
    ignored = Sampling.ignored - {"prompt_cache_key"}

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateOptions | None = None
    session_id: Annotated[Text, Field(min_length=1, max_length=64)] | None = None  # ours
    prompt_cache_key: Annotated[Text, Field(max_length=64)] | None = None

    @property
    def session(self) -> str | None:
        """The client's name for the conversation."""
        return self.session_id or self.prompt_cache_key or None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def top(self) -> int | None:
        """How many alternatives to report; None is no logprobs. Raises InvalidRequest for top_logprobs alone."""
        if not self.logprobs:
            if self.top_logprobs is not None:
                raise invalid("top_logprobs needs logprobs to be true.", "top_logprobs")
            return None
        return self.top_logprobs or 0

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model may call. Raises InvalidRequest for a choice that the tools do not offer."""
        tools, choice = self.tools or [], self.tool_choice
        names = [tool.function.name for tool in tools]
        if len(set(names)) < len(names):
            raise invalid("tools: each function has a name of its own.", "tools")
        if choice not in (None, "none", "auto") and not tools:
            raise invalid("tool_choice: needs tools.", "tool_choice")
        for name in self._chosen or ():
            if name not in names:
                raise invalid(f"tool_choice: {name} is not one of tools.", "tool_choice")
        return [] if choice == "none" else tools

    @property
    def callable(self) -> list[Tool]:
        """Of the tools that the model is shown, those it may call now."""
        chosen = self._chosen
        return [tool for tool in self.offered if chosen is None or tool.function.name in chosen]

    @property
    def _chosen(self) -> list[str] | None:
        """The functions that the choice names; None is all."""
        if isinstance(self.tool_choice, NamedTool):
            return [self.tool_choice.function.name]
        if isinstance(self.tool_choice, AllowedTools):
            return [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
        return None

    @property
    def must_call(self) -> bool:
        if isinstance(self.tool_choice, AllowedTools):
            return self.tool_choice.allowed_tools.mode == "required"
        return self.tool_choice not in (None, "none", "auto")

    @property
    def max_calls(self) -> int:
        one = self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedTool)
        return 1 if one else MAX_CALLS

    @property
    def thinking(self) -> bool | None:
        """Whether the model is to think; None leaves it to the model. Raises InvalidRequest for a contradiction."""
        asked = self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None
        if self.reasoning_effort is None:
            return asked
        wanted = self.reasoning_effort != "none"
        if asked is not None and asked != wanted:
            raise invalid("reasoning_effort: contradicts chat_template_kwargs.enable_thinking.", "reasoning_effort")
        return wanted


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Sampling):
    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: Literal[False] | None = None
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def token_limit(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens  # the default of this endpoint

    @property
    def top(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Every prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


_Schema = TypeVar("_Schema", bound=Strict)


def parse(schema: type[_Schema], body: dict[str, Any]) -> _Schema:
    """The body as `schema`. Raises InvalidRequest that names the first field it cannot take."""
    known = {name: value for name, value in body.items() if name not in schema.ignored}
    try:
        return schema.model_validate(known)
    except ValidationError as error:
        raise _from_pydantic(error) from None


def _from_pydantic(error: ValidationError) -> InvalidRequest:
    problem = min(error.errors(include_url=False), key=_rank)
    param = _path(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return unsupported(param)
    if problem["type"] in ("unknown_type", "unknown_role"):
        param += "." + problem["type"].removeprefix("unknown_")
        return invalid(f"{param}: {problem['msg']}.", param)
    if problem["type"] == "missing":
        return InvalidRequest(f"{param} is required.", code="missing_required_parameter", param=param)
    return invalid(f"{param}: {problem['msg'].removeprefix('Value error, ')}.", param)


def _rank(problem: Any) -> tuple[bool, bool, int]:
    """What is said first: what we do not know; of a union, what is wrong in the member that it seems to be; the innermost."""
    mismatch = problem["type"].endswith("_type") and problem["type"] != "unknown_type"
    return problem["type"] != "extra_forbidden", mismatch, -len(problem["loc"])


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 3, "role") -> "messages[3].role". Names of union members, which are not in the body, are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in _UNION_MEMBERS and not part[0].isupper():
            path += f".{part}" if path else part
    return path

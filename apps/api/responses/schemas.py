"""The body of `POST /v1/responses`, and the chat that it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from apps.api.constraints import MAX_TOOLS, Effort, Schema
from apps.api.responses.items import MAX_ITEMS, Body, Item
from apps.api.schemas import ChatRequest, parse
from apps.api.strict import Name, Number, Strict, Text, by_type

# What a chat's fields are called here.
NAMES = (
    (r"^messages$", "input"),
    (r"\.tool_call_id$", ".call_id"),
    (r"^response_format\.json_schema", "text.format"),
    (r"^(tools\[\d+\])\.function", r"\1"),
    (r"^max_completion_tokens$", "max_output_tokens"),
    (r"^reasoning_effort$", "reasoning.effort"),
)
MAX_SUMMARY_TOKENS = 512  # of a compaction
_SHORT = Annotated[Text, Field(max_length=64)]


class FunctionTool(Strict):
    type: Literal["function"]
    name: Name
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None  # enforced either way


class NamedFunction(Strict):
    type: Literal["function"]
    name: Name


class AllowedTools(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] = "auto"
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MAX_TOOLS)]


class TextFormat(Strict):
    type: Literal["text", "json_object"]


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    name: Name
    description: Text | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None  # enforced either way


class TextOptions(Strict):
    format: (
        Annotated[
            Annotated[TextFormat, Tag("Text")]
            | Annotated[TextFormat, Tag("JsonObject")]
            | Annotated[JsonSchemaFormat, Tag("JsonSchema")],
            by_type("text", "json_object", "json_schema"),
        ]
        | None
    ) = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Strict):
    effort: Effort | None = None
    summary: Literal["auto"] | None = None  # there is none: reasoning is shown as it is


class StreamOptions(Strict):
    include_obfuscation: bool = False


class Turn(ChatRequest):
    """A chat that may also bound its calls."""

    max_tool_calls: int | None = None

    @property
    def max_calls(self) -> int:
        return min(super().max_calls, self.max_tool_calls or super().max_calls)


class Conversation(Strict):
    """What is said to whom. A field sent as null is as if it were not sent."""

    model: str
    input: Text | Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: Text | None = None
    previous_response_id: Text | None = None
    prompt_cache_key: _SHORT | None = None
    session_id: Annotated[Text, Field(min_length=1, max_length=64)] | None = None  # ours

    @property
    def session(self) -> str | None:
        return self.session_id or self.prompt_cache_key or None

    def chat(self, messages: Sequence[Body]) -> Turn:
        """Raises InvalidRequest in a chat's terms."""
        instructions = [{"role": "system", "content": self.instructions}] if self.instructions else []
        asked = {"model": self.model, "messages": [*instructions, *messages], **self._options()}
        return parse(Turn, {name: value for name, value in asked.items() if value is not None})

    def _options(self) -> Body:
        """The chat's other fields; those that are None are not sent."""
        return {}


class CompactRequest(Conversation):
    def _options(self) -> Body:
        return {"max_completion_tokens": MAX_SUMMARY_TOKENS, "temperature": 0}


class CreateResponse(Conversation):
    store: bool | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[
            Annotated[NamedFunction, Tag("Function")] | Annotated[AllowedTools, Tag("AllowedTools")],
            by_type("function", "allowed_tools"),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = Field(None, ge=1)
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    metadata: (
        Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[Text, Field(max_length=512)]], Field(max_length=16)]
        | None
    ) = None
    user: Text | None = None
    safety_identifier: _SHORT | None = None

    @property
    def stores(self) -> bool:
        return self.store is not False

    def _options(self) -> Body:
        same = ("parallel_tool_calls", "max_tool_calls", "temperature", "top_p", "presence_penalty", "frequency_penalty",
                "stream", "service_tier")  # fmt: skip
        return {
            "tools": [_tool(tool) for tool in self.tools or ()] or None,
            "tool_choice": self._choice(),
            "response_format": self._format(),
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "max_completion_tokens": self.max_output_tokens,
            **{name: getattr(self, name) for name in same},
            **self._logprobs(),
        }

    def _choice(self) -> Any:
        choice = self.tool_choice
        if isinstance(choice, NamedFunction):
            return _named(choice)
        if isinstance(choice, AllowedTools):
            allowed = {"mode": choice.mode, "tools": [_named(tool) for tool in choice.tools]}
            return {"type": "allowed_tools", "allowed_tools": allowed}
        return choice

    def _format(self) -> Body | None:
        wanted = self.text.format if self.text else None
        if isinstance(wanted, JsonSchemaFormat):
            return {"type": "json_schema", "json_schema": wanted.model_dump(by_alias=True, exclude={"type"})}
        return None if wanted is None else wanted.model_dump()

    def _logprobs(self) -> Body:
        """`top_logprobs` of 0 asks for none, unless they are to be included."""
        included = "message.output_text.logprobs" in (self.include or ())
        return {"logprobs": True, "top_logprobs": self.top_logprobs or 0} if included or self.top_logprobs else {}

    def echo(self, *, tier: str) -> Body:
        """What a response says of how it was asked for."""
        wanted = self.text.format if self.text else None
        choice = self.tool_choice
        return {
            "instructions": self.instructions,
            "previous_response_id": self.previous_response_id,
            "store": self.stores,
            "tools": [_shown(tool) for tool in self.tools or ()],
            "tool_choice": choice.model_dump() if isinstance(choice, Strict) else choice or "auto",
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "max_tool_calls": self.max_tool_calls,
            "text": {
                "format": wanted.model_dump(by_alias=True) if wanted else {"type": "text"},
                "verbosity": (self.text and self.text.verbosity) or "medium",
            },
            "reasoning": {"effort": self.reasoning.effort if self.reasoning else None, "summary": None},
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "max_output_tokens": self.max_output_tokens,
            "top_logprobs": self.top_logprobs or 0,
            "truncation": "disabled",
            "background": False,
            "service_tier": tier,
            "metadata": self.metadata or {},
            "user": self.user,
            "safety_identifier": self.safety_identifier,
            "prompt_cache_key": self.prompt_cache_key,
        }


def _tool(tool: FunctionTool) -> Body:
    return {"type": "function", "function": tool.model_dump(exclude={"type"})}


def _shown(tool: FunctionTool) -> Body:
    return {**tool.model_dump(), "strict": tool.strict is not False}


def _named(tool: NamedFunction) -> Body:
    return {"type": "function", "function": {"name": tool.name}}


class SocketResponse(CreateResponse):
    """`response.create` over a socket, which streams in any case."""

    type: Literal["response.create"]
    stream: None = None
    stream_options: None = None
    background: None = None

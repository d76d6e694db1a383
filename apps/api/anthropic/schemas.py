"""The body of `POST /v1/messages`, and the chat that it asks for."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from apps.api.anthropic.blocks import AssistantMessage, Body, CacheControl, TextBlock, UserMessage, joined
from apps.api.constraints import MAX_TOOLS, Schema
from apps.api.schemas import MAX_MESSAGES, ChatRequest, parse
from apps.api.strict import Name, Number, Strict, Text, by_type, invalid

MAX_STOPS = 16
_Stop = Annotated[Text, Field(min_length=1, max_length=64)]
# What a chat's fields are called here.
NAMES = (
    (r"\.tool_call_id$", ".tool_use_id"),
    (r"\.image_url$", ""),
    (r"^response_format\.json_schema", "output_config.format"),
    (r"^(tools\[\d+\])\.function\.parameters", r"\1.input_schema"),
    (r"^(tools\[\d+\])\.function", r"\1"),
    (r"^stop\b", "stop_sequences"),
    (r"^reasoning_effort$", "thinking"),
)


class CustomTool(Strict):
    type: Literal["custom"] | None = None
    name: Name
    description: Text | None = None
    input_schema: Schema
    strict: bool | None = None  # enforced either way
    cache_control: CacheControl | None = None

    @property
    def chat(self) -> Body:
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {"type": "function", "function": function}


class AnyChoice(Strict):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class ToolChoice(Strict):
    type: Literal["tool"]
    name: Name
    disable_parallel_tool_use: bool | None = None


class ThinkingOn(Strict):
    type: Literal["enabled"]
    budget_tokens: int = Field(ge=1024)  # a wish: `max_tokens` is what bounds an answer here


class ThinkingOff(Strict):
    type: Literal["disabled", "adaptive"]


class Metadata(Strict):
    user_id: Text | None = Field(None, max_length=256)


class JsonFormat(Strict):
    type: Literal["json_schema"]
    schema_: Schema = Field(alias="schema")


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class Chat(ChatRequest):
    """A chat with as many stop strings as Anthropic's clients may send."""

    stop: Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None


def _role(value: Any) -> str:
    role = value.get("role") if isinstance(value, dict) else value.role
    return str(role).capitalize()


class CountTokens(Strict):
    """What a prompt is made of. A field sent as null is as if it were not sent."""

    model: str
    messages: Annotated[
        list[
            Annotated[
                Annotated[UserMessage, Tag("User")] | Annotated[AssistantMessage, Tag("Assistant")],
                Discriminator(_role, custom_error_type="unknown_role", custom_error_message="is user or assistant"),
            ]
        ],
        Field(min_length=1, max_length=MAX_MESSAGES),
    ]
    system: Text | list[TextBlock] | None = None
    tools: Annotated[list[CustomTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: (
        Annotated[
            Annotated[AnyChoice, Tag("Auto")]
            | Annotated[AnyChoice, Tag("Any")]
            | Annotated[AnyChoice, Tag("None")]
            | Annotated[ToolChoice, Tag("Tool")],
            by_type("auto", "any", "tool", "none"),
        ]
        | None
    ) = None
    thinking: (
        Annotated[
            Annotated[ThinkingOn, Tag("Enabled")]
            | Annotated[ThinkingOff, Tag("Disabled")]
            | Annotated[ThinkingOff, Tag("Adaptive")],
            by_type("enabled", "disabled", "adaptive"),
        ]
        | None
    ) = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None

    def chat(self) -> tuple[Chat, list[str]]:
        """The chat, and where each of its messages came from. Raises InvalidRequest in the chat's terms."""
        if isinstance(self.messages[-1], AssistantMessage):
            param = f"messages[{len(self.messages) - 1}]"
            raise invalid(f"{param}: the last message is the user's; an answer cannot be begun for the model.", param)
        said = [(f"messages[{n}]", message) for n, whole in enumerate(self.messages) for message in whole.chat()]
        if self.system:
            said.insert(0, ("system", {"role": "system", "content": joined(self.system)}))
        asked = {"model": self.model, "messages": [message for _, message in said], **self._options()}
        chat = parse(Chat, {name: value for name, value in asked.items() if value is not None})
        return chat, [place for place, _ in said]

    def _options(self) -> Body:
        """The chat's other fields; those that are None are not sent."""
        config = self.output_config or OutputConfig()
        schema = config.format and {"name": "output", "schema": config.format.schema_}
        return {
            "tools": [tool.chat for tool in self.tools or ()] or None,
            "tool_choice": self._choice(),
            "parallel_tool_calls": False if self.tool_choice and self.tool_choice.disable_parallel_tool_use else None,
            "response_format": schema and {"type": "json_schema", "json_schema": schema},
            "reasoning_effort": self._effort(config),
        }

    def _choice(self) -> Any:
        if isinstance(self.tool_choice, ToolChoice):
            return {"type": "function", "function": {"name": self.tool_choice.name}}
        return None if self.tool_choice is None else {"any": "required"}.get(self.tool_choice.type, self.tool_choice.type)

    def _effort(self, config: OutputConfig) -> str | None:
        if self.thinking is not None and self.thinking.type == "disabled":
            return "none"
        return config.effort or ("medium" if isinstance(self.thinking, ThinkingOn) else None)


class CreateMessage(CountTokens):
    max_tokens: int = Field(ge=1, le=2**31 - 1)
    stop_sequences: Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None
    temperature: Number | None = Field(None, ge=0, le=1)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    stream: bool | None = None
    metadata: Metadata | None = None  # accepted without effect
    service_tier: Literal["auto", "standard_only"] | None = None
    session_id: Annotated[Text, Field(min_length=1, max_length=64)] | None = None  # ours

    SAME: ClassVar = ("max_tokens", "temperature", "top_p", "top_k", "stream")

    def _options(self) -> Body:
        return {
            **super()._options(),
            **{name: getattr(self, name) for name in self.SAME},
            "stop": self.stop_sequences or None,
            "service_tier": "default" if self.service_tier == "standard_only" else None,
        }

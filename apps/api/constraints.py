"""What clients may ask of an answer's form: a response format, tools and the choice among them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from apps.api.strict import Name, Strict, Text, by_type, invalid

MAX_TOOLS = 128
Schema = dict[str, Any]


class NamedSchema(Strict):
    name: Name
    description: Text | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None  # enforced either way


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @property
    def schema_to_follow(self) -> Schema | None:
        """None for plain text. Raises InvalidRequest for a json_schema that is missing or has no place."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise invalid("response_format.json_schema: belongs to the type json_schema.", "response_format.json_schema")
        if self.json_schema is not None:
            return self.json_schema.schema_ or {}
        return {"type": "object"} if self.type == "json_object" else None


class Function(Strict):
    name: Name
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None  # enforced either way

    @property
    def schema_to_follow(self) -> Schema:
        """Of the arguments, which always are an object."""
        if not self.parameters:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}


class Tool(Strict):
    type: Literal["function"]
    function: Function

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates read it."""
        function = {"name": self.function.name, "description": self.function.description or ""}
        return {"type": "function", "function": {**function, "parameters": self.function.parameters or {}}}


class FunctionName(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class Allowed(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Strict):
    """All tools are shown, some may be called: what is cached of the prompt stays what it was."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowed


Tools = Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)]
ToolChoice = (
    Literal["none", "auto", "required"]
    | Annotated[
        Annotated[NamedTool, Tag("Function")] | Annotated[AllowedTools, Tag("AllowedTools")],
        by_type("function", "allowed_tools"),
    ]
)


class TemplateOptions(Strict):
    """What peers call chat_template_kwargs, as far as it is known here."""

    enable_thinking: bool | None = None


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

"""The messages of a conversation: how clients send them, and how chat templates read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from apps.api.strict import Name, Strict, Text, by_type, invalid
from apps.core.errors import InvalidRequest

MAX_CALLS = 128


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ImageUrl(Strict):
    url: Text
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Strict):
    """An image, whichever API it came by: images.py reads it."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[
    Annotated[TextPart, Tag("Text")] | Annotated[ImagePart, Tag("ImageUrl")],
    by_type("text", "image_url"),
]


class CalledFunction(Strict):
    name: Name
    arguments: Text

    @property
    def plain(self) -> dict[str, Any]:
        """Arguments as an object, as templates expect them, where the client's JSON is one."""
        try:
            parsed = json.loads(self.arguments)
        except (ValueError, RecursionError):
            parsed = None
        return {"name": self.name, "arguments": parsed if isinstance(parsed, dict) else self.arguments}


class ToolCall(Strict):
    id: Text = Field(min_length=1, max_length=100)
    type: Literal["function"]
    function: CalledFunction


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=64)] | None = None
    name: str | None = Field(None, max_length=64)
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MAX_CALLS)] | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None  # another name of the same
    refusal: None = None  # answers have it, and clients send them back

    @property
    def text(self) -> str:
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> list[tuple[int, ImageUrl]]:
        """Each with its place in the content."""
        parts = self.content if isinstance(self.content, list) else ()
        return [(place, part.image_url) for place, part in enumerate(parts) if isinstance(part, ImagePart)]

    @property
    def thought(self) -> str:
        return self.reasoning_content or self.reasoning or ""

    @property
    def characters(self) -> int:
        calls = sum(len(call.function.arguments) for call in self.tool_calls or ())
        return len(self.text) + len(self.thought) + calls

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates read it; `developer` is another name of `system`."""
        plain: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        if self.images and isinstance(self.content, list):
            plain["content"] = [_plain(part) for part in self.content]
        if self.thought:
            plain["reasoning_content"] = self.thought
        if self.tool_calls:
            plain["tool_calls"] = [{"id": c.id, "type": c.type, "function": c.function.plain} for c in self.tool_calls]
        if self.tool_call_id:
            plain["tool_call_id"] = self.tool_call_id
        return plain


def _plain(part: TextPart | ImagePart) -> dict[str, str]:
    return {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as templates read them. Raises InvalidRequest for fields that do not belong to their role."""
    called: set[str] = set()
    for place, message in enumerate(messages):
        _check(message, f"messages[{place}]", called)
        called.update(call.id for call in message.tool_calls or ())
    return [message.plain for message in messages]


def _check(message: Message, param: str, called: set[str]) -> None:
    assistant = message.role == "assistant"
    if message.content is None and not (assistant and message.tool_calls):
        raise _content_missing(message, f"{param}.content")
    if not assistant:
        for field in ("tool_calls", "reasoning_content", "reasoning"):
            if getattr(message, field) is not None:
                raise invalid(f"{param}.{field}: only the assistant has it.", f"{param}.{field}")
    if message.role != "user" and message.images:
        place = f"{param}.content[{message.images[0][0]}].image_url"
        raise invalid(f"{place}: only the user's messages have images.", place)
    if message.role != "tool" and message.tool_call_id is not None:
        raise invalid(f"{param}.tool_call_id: only messages of the role tool have it.", f"{param}.tool_call_id")
    if message.role == "tool" and message.tool_call_id not in called:
        raise invalid(f"{param}.tool_call_id: is the id of a call in an earlier message.", f"{param}.tool_call_id")


def _content_missing(message: Message, param: str) -> InvalidRequest:
    if "content" not in message.model_fields_set:
        return InvalidRequest(f"{param} is required.", code="missing_required_parameter", param=param)
    return invalid(f"{param}: only an assistant's message with tool_calls may be without it.", param)

"""Messages as Anthropic shapes them, in blocks, and the chat that they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from apps.api.strict import Name, Strict, Text, by_type

MAX_BLOCKS = 256
Body = dict[str, Any]
Id = Annotated[Text, Field(min_length=1, max_length=100)]


class CacheControl(Strict):
    """Accepted without effect: what can be cached is cached anyway."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Strict):
    cache_control: CacheControl | None = None


class TextBlock(Block):
    type: Literal["text"]
    text: Text
    citations: None = None  # answers have it, and clients send them back


class Base64Source(Strict):
    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: Text


class UrlSource(Strict):
    type: Literal["url"]
    url: Text


class ImageBlock(Block):
    type: Literal["image"]
    source: Annotated[
        Annotated[Base64Source, Tag("Base64")] | Annotated[UrlSource, Tag("Url")],
        by_type("base64", "url"),
    ]

    @property
    def url(self) -> str:
        source = self.source
        return source.url if isinstance(source, UrlSource) else f"data:{source.media_type};base64,{source.data}"


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: Id
    name: Name
    input: dict[str, Any]


Shown = Annotated[Annotated[TextBlock, Tag("Text")] | Annotated[ImageBlock, Tag("Image")], by_type("text", "image")]


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: Id
    content: Text | Annotated[list[Shown], Field(max_length=MAX_BLOCKS)] | None = None
    is_error: bool | None = None


class ThinkingBlock(Strict):
    type: Literal["thinking"]
    thinking: Text
    signature: Text


UserBlock = Annotated[
    Annotated[TextBlock, Tag("Text")] | Annotated[ImageBlock, Tag("Image")] | Annotated[ToolResultBlock, Tag("ToolResult")],
    by_type("text", "image", "tool_result"),
]
AssistantBlock = Annotated[
    Annotated[TextBlock, Tag("Text")] | Annotated[ThinkingBlock, Tag("Thinking")] | Annotated[ToolUseBlock, Tag("ToolUse")],
    by_type("text", "thinking", "tool_use"),
]


class UserMessage(Strict):
    role: Literal["user"]
    content: Text | Annotated[list[UserBlock], Field(min_length=1, max_length=MAX_BLOCKS)]

    def chat(self) -> Iterator[Body]:
        """Results of tools are messages of their own; what stands between them is the user's."""
        if isinstance(self.content, str):
            yield {"role": "user", "content": self.content}
            return
        parts: list[Body] = []
        for block in self.content:
            if not isinstance(block, ToolResultBlock):
                parts.append(_part(block))
                continue
            if parts:
                yield {"role": "user", "content": parts}
                parts = []
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)}
        if parts:
            yield {"role": "user", "content": parts}


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Text | Annotated[list[AssistantBlock], Field(min_length=1, max_length=MAX_BLOCKS)]

    def chat(self) -> Iterator[Body]:
        if isinstance(self.content, str):
            yield {"role": "assistant", "content": self.content}
            return
        calls = [_call(block) for block in self.content if isinstance(block, ToolUseBlock)]
        text = "".join(block.text for block in self.content if isinstance(block, TextBlock))
        thought = "".join(block.thinking for block in self.content if isinstance(block, ThinkingBlock))
        message: Body = {"role": "assistant", "content": text or (None if calls else "")}
        if calls:
            message["tool_calls"] = calls
        yield {**message, "reasoning_content": thought} if thought else message


def joined(blocks: str | Sequence[TextBlock]) -> str:
    return blocks if isinstance(blocks, str) else "\n".join(block.text for block in blocks)


def _part(block: TextBlock | ImageBlock) -> Body:
    if isinstance(block, ImageBlock):
        return {"type": "image_url", "image_url": {"url": block.url}}
    return {"type": "text", "text": block.text}


def _result(block: ToolResultBlock) -> str | list[Body]:
    content = block.content or ""
    if block.is_error and isinstance(content, str):
        return f"Error: {content}"
    parts = content if isinstance(content, str) else [_part(part) for part in content]
    return [{"type": "text", "text": "Error:"}, *parts] if block.is_error and isinstance(parts, list) else parts


def _call(block: ToolUseBlock) -> Body:
    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}

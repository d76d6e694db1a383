"""The items of a response's conversation: how clients send them, how they are kept, and the chat that they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from apps.api.strict import Name, Strict, Text, by_type

MAX_ITEMS = 512
Body = dict[str, Any]
Id = Annotated[Text, Field(min_length=1, max_length=100)]
Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Strict):
    type: Literal["input_text"]
    text: Text


class InputImage(Strict):
    type: Literal["input_image"]
    image_url: Text
    detail: Literal["auto", "low", "high"] | None = None


class OutputText(Strict):
    type: Literal["output_text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Refusal(Strict):
    type: Literal["refusal"]
    refusal: Text


Input = Annotated[
    Annotated[InputText, Tag("InputText")] | Annotated[InputImage, Tag("InputImage")],
    by_type("input_text", "input_image"),
]
Content = Annotated[
    Annotated[InputText, Tag("InputText")]
    | Annotated[InputImage, Tag("InputImage")]
    | Annotated[OutputText, Tag("OutputText")]
    | Annotated[Refusal, Tag("Refusal")],
    by_type("input_text", "input_image", "output_text", "refusal"),
]


class MessageItem(Strict):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Annotated[list[Content], Field(max_length=64)]
    id: Id | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(Strict):
    type: Literal["function_call"]
    call_id: Id
    name: Name
    arguments: Text
    id: Id | None = None
    status: Status | None = None


class FunctionCallOutputItem(Strict):
    type: Literal["function_call_output"]
    call_id: Id
    output: Text | Annotated[list[Input], Field(min_length=1, max_length=64)]
    id: Id | None = None
    status: Status | None = None


class SummaryText(Strict):
    type: Literal["summary_text"]
    text: Text


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(Strict):
    type: Literal["reasoning"]
    summary: list[SummaryText]
    content: list[ReasoningText] | None = None
    encrypted_content: None = None  # reasoning is shown here as it is
    id: Id | None = None
    status: Status | None = None


class CompactionItem(Strict):
    type: Literal["compaction"]
    encrypted_content: Text
    id: Id | None = None


class ItemReference(Strict):
    type: Literal["item_reference"]
    id: Id


Item = Annotated[
    Annotated[MessageItem, Tag("Message")]
    | Annotated[FunctionCallItem, Tag("FunctionCall")]
    | Annotated[FunctionCallOutputItem, Tag("FunctionCallOutput")]
    | Annotated[ReasoningItem, Tag("Reasoning")]
    | Annotated[CompactionItem, Tag("Compaction")]
    | Annotated[ItemReference, Tag("ItemReference")],
    by_type("message", "function_call", "function_call_output", "reasoning", "compaction", "item_reference", default="message"),
]
_PREFIXES = {
    "message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs", "compaction": "cmp",
}  # fmt: skip


def item_id(kind: str, response_id: str, number: int) -> str:
    """Names the response that the item belongs to, so that a reference finds it."""
    return f"{_PREFIXES[kind]}_{response_id.removeprefix('resp_')}{number:04x}"


def response_of(item_id: str) -> str:
    """The response whose items have such ids."""
    return f"resp_{item_id.partition('_')[2][:-4]}"


def plain(item: Strict) -> Body:
    """An item of the client's as it is stored and listed: with a status, and its content in parts."""
    body = item.model_dump(exclude_none=True)
    if body["type"] not in ("reasoning", "compaction"):
        body.setdefault("status", "completed")
    if isinstance(body.get("content"), str):
        kind = "output_text" if body["role"] == "assistant" else "input_text"
        body["content"] = [{"type": kind, "text": body["content"]}]
    for part in body.get("content", ()):
        if part["type"] == "output_text":
            part.setdefault("annotations", [])
        elif part["type"] == "input_image":
            part.setdefault("detail", "auto")
    return body


def chat(items: Sequence[Body], unseal: Callable[[str], str]) -> Iterator[tuple[int, Body]]:
    """The items as messages of a chat, each with the number of the item it began with. `unseal` opens a compaction.

    Calls join the assistant's words before them, and reasoning what it led to.
    """
    said: Body | None = None
    begun = 0
    for number, item in enumerate(items):
        if item["type"] in ("reasoning", "function_call") or item.get("role") == "assistant":
            if said is not None and not _goes_on(said, item):
                yield begun, said
                said = None
            if said is None:
                begun, said = number, {"role": "assistant", "content": None}
            _add(said, item)
            continue
        if said is not None:
            yield begun, said
            said = None
        yield number, _message(item, unseal)
    if said is not None:
        yield begun, said


def _goes_on(said: Body, item: Body) -> bool:
    """Whether an item belongs to the assistant's message: words come once in it, and before its calls."""
    if item["type"] == "function_call":
        return True
    return said["content"] is None and "tool_calls" not in said


def _add(said: Body, item: Body) -> None:
    if item["type"] == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        said.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
    elif item["type"] == "reasoning":
        thought = "".join(part["text"] for part in item.get("content") or item["summary"])
        said["reasoning_content"] = said.get("reasoning_content", "") + thought
    else:
        said["content"] = "".join(part.get("text", part.get("refusal", "")) for part in item["content"])


def _message(item: Body, unseal: Callable[[str], str]) -> Body:
    if item["type"] == "compaction":
        return {"role": "user", "content": f"Summary of our conversation so far:\n{unseal(item['encrypted_content'])}"}
    if item["type"] == "function_call_output":
        return {"role": "tool", "tool_call_id": item["call_id"], "content": _parts(item["output"])}
    return {"role": item["role"], "content": _parts(item["content"])}


def _parts(content: str | list[Body]) -> str | list[Body]:
    return content if isinstance(content, str) else [_part(part) for part in content] or ""


def _part(part: Body) -> Body:
    if part["type"] == "input_image":
        return {"type": "image_url", "image_url": {"url": part["image_url"], "detail": part.get("detail")}}
    return {"type": "text", "text": part.get("text", part.get("refusal", ""))}
